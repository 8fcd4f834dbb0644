"""The options of words and of the rules by which they are looked for: those of every command that looks at pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from labs_common.options import Count, CountOrZero, NotNegative, Share, number, one_of

Aggregate = Annotated[str, one_of("zsi_contrastive.detector.vectors:AGGREGATES")]


@dataclass
class WordOptions:
    """The vectors that stand for classes."""

    word_vectors: str = ""
    """A matrix of the reference (a row for each dimension; columns for background, seen and unseen classes), a text
    file of GloVe or fastText (glove:FILE, fasttext:FILE), or clip:NAME for the texts of a CLIP of Hugging Face. Drawn
    scenes have attributes, the default, or noisy: 300 values that say them less exactly."""
    vocabulary: Path | None = None
    """Vectors of more words, of the same kind and length: what the detector sees is compared with these words first."""
    columns: Literal["check", "trust"] = "check"
    """Make sure that a matrix's columns stand in the order of the classes, or take it as it is."""


@dataclass
class DetectionOptions:
    """The rules by which things are looked for."""

    transfer: Literal["auto", "code", "direct", "things", "paper"] = "auto"
    """Rule for classes never seen. code (of before: paper): known classes' probabilities, background's too, mix their
    vectors; masks go through known classes as well. direct, the paper's text: a class's own product with what was
    seen. things: as code for boxes, but among things alone, and direct for masks. auto is code, things for tiny, and
    direct for others with --similarity cosine."""
    temperature: NotNegative = 0.0
    """By which logits of known classes are divided for that; 0 takes 1, as in the paper, and 4 for tiny."""
    seen_bias: Annotated[float, number(float, "[-1, 1]")] = 0.0
    """Taken from the scores of seen classes where both kinds compete in one list (calibrated stacking). predict ranks
    what it draws so, and without this by the bias that validation chose."""
    refine: Aggregate = "none"
    """Mix each unseen class's vector with those of its neighbours: their sum, mean or largest values."""
    neighbours: Count = 3
    """Nearest classes, seen and unseen, that are mixed in."""
    refine_share: Share = 0.3
    """Share of the refined vector that is the neighbours'."""
    score_threshold: Share = 0.05
    """Detections that score less are dropped."""
    nms_threshold: Annotated[float, number(float, "(0, 1]")] = 0.5
    """Overlap (IoU) from which the weaker of two boxes of a class is dropped."""
    kept: Count = 100
    """Most detections of a picture, of seen and of unseen classes each, and of both in one list; in predict of each of
    --words."""
    controls: CountOrZero = 3
    """Times that random vectors take the place of the unseen classes', to see what chance gives; 0 does not."""

    def __post_init__(self) -> None:
        """Takes the rule's name of before."""
        self.transfer = "code" if self.transfer == "paper" else self.transfer
