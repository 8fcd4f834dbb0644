"""Captions as numbers: a SentencePiece model trained on them, CLIP's own BPE, or any Hugging Face tokenizer.

All three end as one kind of thing, a fast Hugging Face tokenizer, which is saved with the model.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from labs_common.decoding import SpecialTokens
from labs_common.errors import LabError
from labs_common.saved import load_auto

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"  # the end is not 2: transformers' CLIP misreads that
LONGEST = 77  # pieces of a caption: CLIP's own context length
FILLED = -1  # fills captions after their end: a library's own number for that may also be a word
COVERED = 99  # per cent of the training captions that are not cut, if no length is asked for


@dataclass(frozen=True)
class Words:
    """A tokenizer and the most pieces of a caption, start and end among them."""

    backend: Any
    length: int

    @property
    def end(self) -> int:
        """The number of the end token."""
        found = self.backend.eos_token_id
        return int(self.backend.sep_token_id if found is None else found)

    @property
    def pad(self) -> int:
        """The number that fills a caption after its end; no tower reads it."""
        found = self.backend.pad_token_id
        return self.end if found is None else int(found)

    @property
    def start(self) -> int | None:
        """The number of the start token, if it has one that is not the end token too, as GPT-2's and OPT's is."""
        found = self.backend.bos_token_id
        found = self.backend.cls_token_id if found is None else found
        return None if found == self.end else found

    @property
    def special(self) -> SpecialTokens | None:
        """The tokens that are no words; None where there is none to start with, and so nothing to write from."""
        if self.start is None:
            return None
        never = {self.start, self.pad, self.backend.unk_token_id} - {self.end, None}
        return SpecialTokens(self.start, self.end, self.pad, tuple(sorted(never)))

    def sentence(self, numbers: Sequence[int]) -> str:
        """Joins the pieces that are words."""
        return self.backend.decode(list(numbers), skip_special_tokens=True).strip()

    def __len__(self) -> int:
        return len(self.backend)

    def numbers(self, sentence: str) -> list[int]:
        """Cuts a sentence into the numbers of its pieces, from start to end token, at most `length` of them."""
        first = [] if self.start is None else [self.start]
        found = self.backend(sentence, add_special_tokens=False, verbose=False).input_ids
        return [*first, *found[: self.length - len(first) - 1], self.end]

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        """Returns the sentences as numbers (sentences, length of the longest)."""
        return self.together([self.numbers(sentence) for sentence in sentences])

    def together(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Pads captions of several lengths to one tensor (captions, longest)."""
        found = np.full((len(rows), max(map(len, rows), default=1)), self.pad, dtype=np.int64)
        for place, row in enumerate(rows):
            found[place, : len(row)] = row
        return torch.from_numpy(found)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`."""
        self.backend.save_pretrained(folder)


@dataclass(frozen=True)
class ReleasedWords(Words):
    """A library's own tokenizer: `read` cuts sentences into numbers, filled up where the model was trained so."""

    read: Callable[[Sequence[str]], Sequence[list[int]]]
    special: SpecialTokens | None = None  # of a model that writes

    @property
    def end(self) -> int:
        """The end token, which nothing here looks for: the library's own code does."""
        return FILLED

    @property
    def pad(self) -> int:
        """The number that fills a caption after its end."""
        return FILLED

    def __len__(self) -> int:
        return int(getattr(self.backend, "vocab_size", 0))

    def sentence(self, numbers: Sequence[int]) -> str:
        """Joins the pieces that are words; only open_clip's own tokenizer is asked."""
        words = [number for number in numbers if number not in self.backend.all_special_ids]
        return self.backend.decode(words).strip()

    def numbers(self, sentence: str) -> list[int]:
        """Cuts a sentence into numbers, at most `length` of them."""
        return list(self.read([sentence])[0])

    def __call__(self, sentences: Sequence[str]) -> torch.Tensor:
        """Returns the sentences as numbers (sentences, length of the longest)."""
        return self.together(self.read(sentences))


def make_words(kind: str, captions: Sequence[str], vocabulary: int, length: int, option: str = "--tokenizer") -> Words:
    """Makes the tokenizer of this kind; one that is trained learns from `captions`. Length 0 is taken from them.

    Raises:
        LabError: it cannot be had, or lacks an end token.
    """
    if kind == "sentencepiece":
        backend: Any = trained_sentencepiece(captions, vocabulary)
    elif kind == "clip":
        backend = clip_bpe()
    else:
        others = "sentencepiece, clip" if option == "--tokenizer" else "own"
        remedy = f"take {others}, a name, or a directory with a tokenizer.json"
        backend = load_auto(AutoTokenizer.from_pretrained, kind, said=f"{option} {kind}: its tokenizer", remedy=remedy)
    if backend.eos_token_id is None and backend.sep_token_id is None:
        raise LabError(f"{option} {kind}: has no token that ends a sentence; take another")
    words = Words(backend, length or LONGEST)
    if not length:
        lengths = [len(words.numbers(caption)) for caption in captions]
        words = Words(backend, int(np.ceil(np.percentile(lengths, COVERED))))
    return words


def trained_sentencepiece(captions: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a unigram SentencePiece model (Kudo 2018) on the captions, in small letters, as a fast tokenizer.

    Raises:
        LabError: there are too few captions.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=written, model_type="unigram", vocab_size=vocabulary,
            hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="nmt_nfkc_cf",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece=PAD, unk_piece=UNKNOWN, bos_piece=START, eos_piece=END,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = f"cannot be trained on {len(captions)} captions ({str(error).splitlines()[-1]})"
        raise LabError(f"--tokenizer sentencepiece: {reason}; take --tokenizer clip") from error
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [(model.id_to_piece(number), model.get_score(number)) for number in range(len(model))]
    fast = Tokenizer(models.Unigram(pieces, 1))
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    # For other programs that read it; ours add both tokens themselves, so that a cut caption still ends.
    fast.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", pair=f"{START} $A {END} $B {END}", special_tokens=[(START, 2), (END, 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, unk_token=UNKNOWN, bos_token=START, eos_token=END
    )


def clip_bpe() -> CLIPTokenizer:
    """Returns CLIP's byte-pair vocabulary of 49,408, from the file that comes with open_clip."""
    known = SimpleTokenizer()
    merges = sorted(known.bpe_ranks, key=lambda pair: known.bpe_ranks[pair])
    start, end = "<|startoftext|>", "<|endoftext|>"  # OpenAI's names; open_clip's own are others
    special = {"<start_of_text>": start, "<end_of_text>": end}
    numbers = {special.get(name, name): number for name, number in known.encoder.items()}
    return CLIPTokenizer(vocab=numbers, merges=merges, bos_token=start, eos_token=end, unk_token=end, pad_token=end)


def load_words(folder: Path, length: int) -> Words:
    """Reads what `Words.save` wrote.

    Raises:
        LabError: it is missing or broken.
    """
    backend = load_auto(
        PreTrainedTokenizerFast.from_pretrained, folder, said=f"{folder}: its tokenizer", remedy="train the model again"
    )
    if backend.eos_token_id is None and backend.sep_token_id is None:  # the library does without tokenizer_config.json
        raise LabError(
            f"{folder}: its tokenizer_config.json names no token that ends a sentence; train the model again"
        )
    return Words(backend, length)
