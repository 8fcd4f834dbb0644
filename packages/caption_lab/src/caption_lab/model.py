"""The captioner: an encoder and a decoder, and the options that depend on which ones they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from caption_lab.clipcap import language_vocabulary
from caption_lab.config import REAL, TINY, TINY_LANGUAGE, DecoderOptions, TrainConfig, check, complete_words
from caption_lab.decoder import CAPTIONERS, Output, Sizes
from caption_lab.encoder import Encoder
from caption_lab.losses import OBJECTIVES
from caption_lab.vocabulary import Vocabulary, build_vocabulary
from labs_common.errors import LabError
from labs_common.scenes.files import is_drawn


class ImageCaptioningModel(nn.Module):
    """Looks with `encoder`, writes with `decoder`."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, rows: torch.Tensor, of_rows: torch.Tensor, words: torch.Tensor) -> Output:
        """Predicts what follows each of the words (captions, length) about the pictures `of_rows` (captions,).

        `rows` (pictures, …) are of the encoder's front: what a picture's captions share is computed once.
        """
        return self.decoder(self.encoder.back(rows), words, of_rows)


def make_model(kind: str, encoder: Encoder, options: DecoderOptions, vocabulary: Vocabulary) -> ImageCaptioningModel:
    """Puts a fresh decoder for the vocabulary's words and its longest caption behind an encoder; set the seed first."""
    sizes = Sizes(len(vocabulary), encoder.width, encoder.places, vocabulary.length + 1)
    return ImageCaptioningModel(encoder, CAPTIONERS[kind].decoder(sizes, options))


def make_vocabulary(config: TrainConfig, captions: Sequence[str]) -> Vocabulary:
    """Returns the words of the training captions, or the tokens of the language model that writes.

    Raises:
        LabError: no word is frequent enough, or there is no such language model.
    """
    if CAPTIONERS[config.model].language:
        return language_vocabulary(captions, config.vocabulary, config.decoder.language_model)
    return build_vocabulary(captions, config.vocabulary)


def complete(config: TrainConfig) -> TrainConfig:
    """Returns the config with a default in the place of what was left to the captioner, the encoder and the data.

    Raises:
        LabError: options that contradict each other, or are out of range.
    """
    check(config)
    kind, writes = CAPTIONERS[config.model], OBJECTIVES[config.objective].writes
    encoder, decoder, training, words = config.encoder, config.decoder, config.training, config.vocabulary
    if writes != (config.start is not None):
        names = _names(OBJECTIVES, "writes")
        raise LabError(
            f"--objective {names} and --start RUN belong together: it goes on from a captioner that can write"
        )
    if writes and (training.scheduled_sampling or decoder.mask_words or training.label_smoothing):
        raise LabError(f"--objective {config.objective}: has no use for --scheduled-sampling, --mask-words and "
                       "--label-smoothing; drop them")  # fmt: skip
    if decoder.mask_words and not kind.words_at_once:
        raise LabError(f"--mask-words: works with --model {_names(CAPTIONERS, 'words_at_once')} only")
    if decoder.plain and config.model != "show_attend_tell":
        raise LabError("--plain: works with --model show_attend_tell only")
    if encoder.pool and not kind.one_vector:
        raise LabError(f"--pool: works with --model {_names(CAPTIONERS, 'one_vector')} only; the others look at places")
    if not kind.language and (decoder.language_model or decoder.lora or decoder.prefix != DecoderOptions.prefix):
        raise LabError(
            f"--language-model, --lora, --prefix: work with --model {_names(CAPTIONERS, 'language')} only; drop them"
        )
    fixed = ("width", "layers", "heads")
    if kind.language and any(getattr(decoder, name) != getattr(DecoderOptions, name) for name in fixed):
        raise LabError(f"--width, --layers, --heads: --model {config.model} has those of --language-model; drop them")
    if kind.language and (words.min_count or words.vocabulary_size):
        raise LabError(f"--min-count, --vocabulary-size: --model {config.model} writes the tokens of --language-model; "
                       "drop them")  # fmt: skip
    if config.start is not None:  # it brings all the rest
        own = replace(training, learning_rate=training.learning_rate or 5e-5, epochs=training.epochs or 5)
        return replace(config, training=own)
    drawn = is_drawn(config.data.data)
    name = encoder.encoder or (TINY if drawn else REAL)
    language = decoder.language_model or (TINY_LANGUAGE if drawn else "openai-community/gpt2") if kind.language else ""
    tiny = name == TINY
    width = decoder.width or (kind.width if tiny else 512)
    if kind.words_at_once and width % decoder.heads:
        raise LabError(f"--width {width}: must be a multiple of --heads {decoder.heads}")
    dropout = 0.0 if tiny else kind.dropout
    return replace(
        config,
        # The tiny encoder's one mean would say too little: nine parts of the picture side by side.
        encoder=replace(encoder, encoder=name, pool=(encoder.pool or (3 if tiny else 1)) if kind.one_vector else 0),
        decoder=replace(
            decoder,
            width=0 if kind.language else width,
            dropout=dropout if decoder.dropout is None else decoder.dropout,
            language_model=language,
        ),
        vocabulary=words if kind.language else complete_words(words, drawn),
        training=replace(
            training,
            learning_rate=training.learning_rate or kind.rates[not tiny],
            epochs=training.epochs or (3 if drawn else 20),
        ),
    )


def _names(table: Mapping[str, Any], trait: str) -> str:
    """Names the entries of a table that have this trait."""
    return " or ".join(name for name, entry in table.items() if getattr(entry, trait))
