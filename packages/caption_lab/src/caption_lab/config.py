"""Every option of the lab, once, with its help text and default. Imports nothing heavy: `--help` is fast."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from labs_common.errors import LabError
from labs_common.options import (
    CacheOptions,
    CaptionDataOptions,
    CommandOptions,
    ComparisonOptions,
    Count,
    CountOrZero,
    DecodingOptions,
    NotNegative,
    OnBadData,
    PageOptions,
    PlanOptions,
    RunOptions,
    ShareBelowOne,
    TrainingOptions,
    number,
    one_of,
)

Model = Annotated[str, one_of("caption_lab.decoder:CAPTIONERS")]
Objective = Annotated[str, one_of("caption_lab.losses:OBJECTIVES")]
Watch = Literal["cider", "bleu-4", "loss"]
TINY, TINY_LANGUAGE = "tiny-cnn", "tiny-gpt2"
REAL = "vit_base_patch32_clip_quickgelu_224.openai"  # CLIP's features fit captions; its cost is small beside others'
TRAIN, FINISHED = "caption_lab.train", "vocabulary.json"  # the command that writes a captioner, and a file of one


@dataclass
class EncoderOptions:
    """The part that looks at the picture."""

    encoder: str = ""
    """tiny-cnn (pre-trained here on first use, offline) or any timm name: resnet50, efficientnet_b0, convnext_tiny. By
    default tiny-cnn for drawn scenes, and for photographs CLIP's vit_base_patch32_clip_quickgelu_224.openai."""
    pretrained: bool = True
    """Start from timm's pre-trained weights (downloaded on first use), or from random ones."""
    weights: Path | None = None
    """Start from this .safetensors file of the same architecture; a classifier in it is not used."""
    image_size: CountOrZero = 0
    """Side of the pictures that the encoder sees, in pixels; 0 takes the encoder's own. Twice the side gives four times
    as many places to attend to: 448 makes 14 × 14 of most networks."""
    views: Count = 1
    """Versions of each training picture, which take turns by epoch: the plain one, and others of which a part of 70 to
    100 % is cut out. Disk and time of the kept features grow as many times."""
    pool: CountOrZero = 0
    """show_tell sees the picture as one vector: the means over so many parts of it across and down, side by side. 0
    takes 1, which is the global feature of the papers, and 3 with the tiny encoder."""
    unfreeze: CountOrZero = 0
    """The number of the encoder's last stages that train as well. What is before them is computed once and kept."""


@dataclass
class DecoderOptions:
    """The part that writes the words."""

    width: CountOrZero = 0
    """Width of words and states; 0 takes 512, and with the tiny encoder 256 for an LSTM and 128 for the transformer."""
    layers: Count = 2
    """Layers of the transformer. The LSTMs have one, clipcap those of its language model."""
    heads: Count = 8
    """Attention heads of the transformer."""
    dropout: Annotated[float | None, number(float, "[0, 1)", None)] = None
    """Share of values that are dropped in training; by default 0.1 for the transformer and clipcap and 0.3 for the
    LSTMs, with the tiny encoder none."""
    attention_penalty: NotNegative = 1.0
    """Weight of show_attend_tell's doubly stochastic penalty: every place should be looked at as much as any other."""
    language_model: str = ""
    """clipcap writes by this causal language model of transformers, a hub id or directory, which stays frozen; by
    default tiny-gpt2 for drawn scenes (pre-trained here on first use, offline), and openai-community/gpt2."""
    prefix: Count = 10
    """Vectors that clipcap turns a picture into, for the language model to go on from."""
    lora: CountOrZero = 0
    """Rank of LoRA matrices that clipcap trains in the language model's linear layers; 0 trains the prefix only."""
    plain: bool = False
    """Let show_attend_tell attend by its state alone, softmax(W h + b) over the places, without a gate; by default each
    place is compared with the state, as in the paper."""
    mask_words: ShareBelowOne = 0.0
    """Share of the transformer's input words that are replaced by a mask in training."""


@dataclass
class VocabularyOptions:
    """The rules by which captions become words."""

    lowercase: bool = True
    """Write everything small."""
    punctuation: bool = False
    """Keep punctuation, each mark a word of its own; else it is taken out (man's becomes mans, t-shirt becomes t
    shirt)."""
    digits: bool = True
    """Keep digits."""
    symbols: bool = False
    """Keep symbols such as & and $, each a word of its own."""
    min_count: CountOrZero = 0
    """Words that occur less often in the training captions become <unk>; 0 takes 1 for drawn scenes and 3 for other
    data."""
    vocabulary_size: CountOrZero = 0
    """Keep at most this many words, the most frequent ones; 0 keeps all."""
    max_length: CountOrZero = 0
    """Most words of a caption, longer ones are cut; 0 takes the length that 99 % of the training captions stay
    within."""


@dataclass
class CaptionTrainingOptions(TrainingOptions):
    """The optimizer, its schedule, and the evaluations between epochs."""

    epochs: CountOrZero = 0
    """Passes over the training captions; 0 takes 3 for drawn scenes, 5 for --objective scst, else 20."""
    batch_size: Count = 64
    """Captions per optimizer step, over all processes together; pictures with --objective scst."""
    learning_rate: NotNegative = 0.0
    """Highest learning rate, reached after the warm-up; 0 takes 3e-3 for an LSTM and 2e-3 for the transformer and
    clipcap with the tiny encoder, 4e-4, 3e-4 and 1e-4 with a real one, 5e-5 for --objective scst."""
    encoder_learning_rate: NotNegative = 1e-4
    """That of the encoder's stages that train."""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled weight decay."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the target's weight that is spread over all words."""
    scheduled_sampling: ShareBelowOne = 0.0
    """Share of the input words that the model's own guesses replace at the end of training, rising from none."""
    by_picture: bool = False
    """Put all captions of a picture into the same batch: what they share is computed once, which makes an epoch of
    show_attend_tell up to three times shorter, and batches less varied."""
    watch: Watch = "cider"
    """The score on the validation pictures by which --keep-best and --patience tell what is best."""
    keep_best: bool = True
    """Save the weights of the best evaluation at the end; --no-keep-best saves those of the last step."""
    watch_pictures: Count = 200
    """The number of validation pictures that are captioned after every epoch."""


@dataclass
class TrainConfig:
    """Trains a model that describes pictures, and reports how well it does.

    `python -m caption_lab.train` alone works offline: it pre-trains a small CNN on drawn shapes, then learns to
    describe drawn scenes. The real thing is the same command:
    `accelerate launch -m caption_lab.train --model transformer --encoder efficientnet_b0 --data flickr8k`.
    Then `python -m caption_lab.caption photo.jpg --checkpoint runs/…`.
    """

    model: Model = "transformer"
    """show_tell: an LSTM that saw the picture once (Vinyals et al. 2015). show_attend_tell: an LSTM that looks at a
    part of it for each word (Xu et al. 2015). transformer: attention to words and picture. clipcap: a frozen language
    model goes on from the picture (Mokady et al. 2021)."""
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: CaptionTrainingOptions = field(default_factory=CaptionTrainingOptions)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    objective: Objective = "cross-entropy"
    """cross-entropy: the next word of the training captions. scst: more CIDEr in the captions that the model itself
    writes (self-critical, Rennie et al. 2017); needs --start."""
    clip_score: str = ""
    """Judge the test captions by this CLIP of transformers too, a hub id or directory: openai/clip-vit-base-patch32."""
    start: Path | None = None
    """Begin with the model of this finished run, of which the encoder, decoder and vocabulary are taken."""


@dataclass
class EvaluateConfig:
    """Measures a trained captioner on pictures with captions: BLEU, ROUGE-L, CIDEr-D, diversity; writes a report.

    `python -m caption_lab.evaluate --checkpoint runs/…` uses the test pictures that the run set aside;
    `--data flickr8k --split all` any others.
    """

    checkpoint: Path | None = None
    """Directory of a finished run, or an image-to-text model of transformers by hub id or directory
    (Salesforce/blip-image-captioning-base); by default the newest run under runs/."""
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    split: Literal["train", "validation", "test", "all"] = "test"
    """The pictures to describe; without --data, of the run's own."""
    seed: Annotated[int | None, number(int, "[0, inf)", None)] = None
    """Seed of the splits of data without official lists; by default the run's, and 0 for a released model."""
    beams: str = "1,3,5"
    """Beam widths to compare, separated by commas. Captions shown are of --beam, by default the run's; if it is not
    among these, of the first."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    clip_score: str = ""
    """Judge captions by this CLIP of transformers too, a hub id or directory: openai/clip-vit-base-patch32."""
    prompt: str = ""
    """What the captions of a released BLIP or GIT begin with, which is cut off; by default "a picture of" for BLIP, as
    its authors do; none goes without."""
    batch_size: Count = 64
    """Pictures at once."""
    output: Path | None = None
    """Directory of the report; by default evaluation-… in the run's."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class CaptionConfig:
    """Describes pictures: `python -m caption_lab.caption photo.jpg holiday/ "more/*.png" --checkpoint runs/…`."""

    pictures: tyro.conf.Positional[tuple[str, ...]] = ()
    """Picture files, directories of them, or patterns with *."""
    checkpoint: Path | None = None
    """Directory of a finished run; by default the newest under runs/."""
    heatmap: Path | None = None
    """Also draw into this file where the model looked for each word; of several pictures into one each (NAME-1.png,
    …)."""
    word: str = ""
    """Draw into --heatmap this word of the caption alone, large."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    seed: CountOrZero = 0
    """Seed of --top-p."""
    batch_size: Count = 32
    """Pictures at once."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures that cannot be read: stop and name them, or leave them out."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class DemoConfig:
    """Serves a page that describes pictures: `python -m caption_lab.demo --checkpoint runs/…` (extra `demo`)."""

    checkpoint: Path | None = None
    """Directory of a finished run; by default the newest under runs/."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    page: PageOptions = field(default_factory=PageOptions)
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class PrepareConfig:
    """Looks at the captions before anything is trained: vocabulary, lengths, samples; writes files and a report.

    `python -m caption_lab.prepare --data flickr8k` writes vocabulary.json and tokenizer.json.
    """

    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    output: Path | None = None
    """Directory of what is written; by default a new one under runs/."""
    seed: CountOrZero = 0
    """Seed of the splits and of the pictures that are shown."""
    command: CommandOptions = field(default_factory=CommandOptions)


@dataclass
class CompareConfig:
    """Trains several captioners on the same captions with one budget and reports on them beside the papers' figures.

    `python -m caption_lab.compare` alone compares the three models offline. The same command started again goes on
    where it was stopped. For real: `python -m caption_lab.compare --data flickr8k --epochs 20 --models
    show_tell:encoder=resnet50,show_attend_tell:encoder=resnet50,transformer:encoder=efficientnet_b0`
    """

    models: str = "show_tell,show_attend_tell,transformer"
    """Models, separated by commas; options of one follow after colons: transformer:mask_words=0.1:encoder=resnet18."""
    vocabulary: VocabularyOptions = field(default_factory=VocabularyOptions)
    data: CaptionDataOptions = field(default_factory=CaptionDataOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    training: CaptionTrainingOptions = field(default_factory=CaptionTrainingOptions)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


@dataclass
class ComparedOptions:
    """The options that may follow a model's name after colons."""

    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    learning_rate: NotNegative = 0.0
    """Highest learning rate."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the target's weight that is spread over all words."""
    scheduled_sampling: ShareBelowOne = 0.0
    """Share of the input words that the model's own guesses replace at the end of training."""


def complete_words(options: VocabularyOptions, drawn: bool) -> VocabularyOptions:
    """Returns the options with a default for --min-count: drawn scenes have no rare words to leave out."""
    return dataclasses.replace(options, min_count=options.min_count or (1 if drawn else 3))


def check(config: TrainConfig) -> None:
    """Refuses options that contradict each other, or files that are not there, whatever the captioner and objective.

    Raises:
        LabError: there are some.
    """
    encoder = config.encoder
    if config.start is not None:
        given = (dataclasses.replace(encoder, unfreeze=0, views=1), config.decoder, config.vocabulary)
        if given != (EncoderOptions(), DecoderOptions(), VocabularyOptions()):
            raise LabError(
                "--start brings its encoder, decoder and vocabulary: drop their options (but --unfreeze and --views)"
            )
    if encoder.weights is not None and not encoder.weights.is_file():
        raise LabError(f"--weights {encoder.weights}: no such file")
    if encoder.weights is not None and encoder.weights.suffix != ".safetensors":
        raise LabError(f"--weights {encoder.weights}: must be a .safetensors file; convert it with safetensors.torch")
    if config.data.splits is not None and not config.data.splits.is_dir():
        raise LabError(f"--splits {config.data.splits}: no such directory")
