"""Vectors of words: from the paper's matrices, GloVe or fastText files, a CLIP's texts, or a scene's attributes.

Those of unseen classes can be refined by message passing over a graph of similar classes. With weights that all
neighbours share, sums, means and maxima do not depend on the neighbours' order, and a layer H' = σ(H W + A H W') is
equivariant: P H' = σ((P H) W + (P A Pᵀ)(P H) W') for any permutation P of the classes (Zaheer et al., "Deep Sets",
NeurIPS 2017; Xu et al., ICLR 2019). With a weight for each neighbour's place it is not.
"""

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labs_common.errors import LabError, bytes_of, reason_of
from labs_common.saved import load_auto, load_network
from labs_common.scenes.world import SHAPES, TEXTURES
from zsi_contrastive.detector.annotations import Split
from zsi_contrastive.detector.columns import check_lengths

ATTRIBUTES, NOISY = "attributes", "noisy"  # of drawn things
NOISY_LENGTH, NOISE = 300, 1.0  # values as in GloVe; length of what is a name's own, where each of its words has 1
CLIP, TEXT_FILES = "clip:", ("glove:", "fasttext:")
# The plain prompt, and the seven that CLIP's authors chose one by one for ImageNet (Prompt_Engineering_for_ImageNet).
PROMPTS = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
SAME = 0.999  # the cosine from which two vectors are of the same word in the same space: files round their values


@dataclass(frozen=True)
class ClassVectors:
    """Vectors of a split's classes.

    Attributes:
        source: a file, also as `glove:FILE`, or `fasttext:FILE`, `clip:NAME`, `attributes` or `noisy`.
        background: (d,).
        seen: (seen, d).
        unseen: (unseen, d).
        by_column: whether the source has no words, so that only the order says what a vector is of.
        notes: what a reader should know, such as words that were not found.
        mean: what was taken from CLIP's vectors (d,), and has to be from those of any other word; None of others.
        prompts: the texts in which CLIP read a word.
    """

    source: str
    background: torch.Tensor
    seen: torch.Tensor
    unseen: torch.Tensor
    by_column: bool = False
    notes: tuple[str, ...] = ()
    mean: torch.Tensor | None = None
    prompts: tuple[str, ...] = PROMPTS

    @property
    def classes(self) -> torch.Tensor:
        """Seen, then unseen: (classes, d)."""
        return torch.cat([self.seen, self.unseen])


def read_class_vectors(source: str, split: Split, like: ClassVectors | None = None) -> ClassVectors:
    """Reads the vectors of all classes of a split.

    A matrix has a row for each dimension and a column for the background and each class, seen then unseen. From
    other sources each class vector has length 1, and the background is the mean of all, as it is in the
    matrices published with Zheng et al. 2021. All texts of a CLIP lie in one narrow cone: the mean of seen classes is
    taken from its vectors, or that of vectors that they are to be `like`, and its direction is background.

    Raises:
        LabError: the source cannot be read, or does not fit the split.
    """
    path, seen = Path(source), len(split.seen)
    if path.is_file() and is_matrix(path):
        matrix = read_matrix(path, split)
        check_lengths(matrix[1:], source, split.classes)
        return ClassVectors(source, matrix[0], matrix[1 : 1 + seen], matrix[1 + seen :], by_column=True)
    prompts = PROMPTS if like is None else like.prompts
    found, notes = word_vectors(source, split.classes, None, prompts)
    check_lengths(found, source, split.classes)
    mean, background = None, found.mean(0)
    if source.startswith(CLIP):
        if seen < 2:
            raise LabError(f"--split {split.name}: has one seen class; {CLIP} needs two, from whose mean they differ")
        mean = None if like is None else like.mean
        if mean is None or mean.shape != background.shape:
            mean = found[:seen].mean(0)
        found, background = _unit(found - mean), mean / mean.norm()
    return ClassVectors(source, background, found[:seen], found[seen:], False, notes, mean, prompts)


def read_matrix(path: Path, split: Split) -> torch.Tensor:
    """Reads the columns of a comma-separated matrix as rows (1 + classes, d), background first.

    Raises:
        LabError: it has another number of columns than the split needs, or something that is no number.
    """
    rows = []
    text = bytes_of(path, f"--word-vectors {path}").decode("utf-8", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError as error:
                raise LabError(f"--word-vectors {path}: line {number}: {error}") from error
    wanted = 1 + len(split.classes)
    for number, row in enumerate(rows, 1):
        if len(row) != wanted:
            raise LabError(
                f"--word-vectors {path}: row {number} has {len(row)} columns; the split {split.name} needs {wanted}: "
                f"background, {len(split.seen)} seen and {len(split.unseen)} unseen classes"
            )
    matrix = torch.tensor(rows, dtype=torch.float32)
    if not matrix.isfinite().all():
        raise LabError(f"--word-vectors {path}: holds a value that is not a number, or too large for one")
    return matrix.T.contiguous()


def read_vocabulary(path: Path, length: int) -> torch.Tensor:
    """Reads a second vocabulary (words, d): the columns of a matrix, or the lines of a file of word vectors.

    Raises:
        LabError: the file cannot be read, or its vectors have another length than the classes'.
    """
    if not path.is_file():
        raise LabError(f"--vocabulary {path}: no such file")
    try:
        if is_matrix(path):
            words = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2).T.copy())
        else:
            words = torch.tensor([values for _, values in _lines(path)], dtype=torch.float32)
    except (ValueError, EOFError) as error:
        raise LabError(f"--vocabulary {path}: {error}") from error
    if words.ndim != 2 or words.shape[1] != length or not words.isfinite().all():
        raise LabError(
            f"--vocabulary {path}: its vectors have the shape {tuple(words.shape)}; each must have {length} finite "
            "values, as the classes' have"
        )
    return words


def is_matrix(path: Path) -> bool:
    """Tells whether a file holds nothing but numbers with commas between, and no words."""
    first = next(_text_lines(path), "")
    return "," in first and re.fullmatch(r"[\s,.eE+\-\d]*", first) is not None and len(first.split(",")) > 2


def word_vectors(
    source: str, names: Sequence[str], mean: torch.Tensor | None = None, prompts: Sequence[str] = PROMPTS
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Looks up vectors (names, d) of length 1 of any words, and notes on those that were put together from parts.

    `source` is a file of GloVe or fastText, `clip:NAME` for a CLIP of Hugging Face, `attributes` or `noisy`. `mean`
    (d,) is taken from CLIP's vectors, which read each name in all `prompts`.

    Raises:
        LabError: the source cannot be read, or has no vector for a name.
    """
    if source == ATTRIBUTES:
        return attribute_vectors(names), ()
    if source == NOISY:
        return noisy_vectors(names), ()
    if source.startswith(CLIP):
        found = clip_vectors(source.removeprefix(CLIP), names, prompts)
        return found if mean is None or mean.shape != found.shape[1:] else _unit(found - mean), ()
    if source.startswith("encoder:"):
        raise LabError(
            f"--word-vectors {source}: the mean of hidden states is no longer taken, as it hardly tells words apart; "
            f"take the texts of a CLIP, as in {CLIP}openai/clip-vit-base-patch32"
        )
    path = Path(file_of(source))
    if not path.is_file():
        raise LabError(
            f"--word-vectors {source}: no such file; name a matrix, a text file of GloVe or fastText, or {CLIP}NAME "
            "for the texts of a CLIP"
        )
    if is_matrix(path):
        raise LabError(
            f"--word-vectors {source}: is a matrix, which has no words; to look for other words, name the text file "
            "that its vectors are from"
        )
    return _looked_up(path, names)


def file_of(source: str) -> str:
    """Takes off what may stand before the name of a text file."""
    for kind in TEXT_FILES:
        source = source.removeprefix(kind)
    return source


def attribute_vectors(names: Sequence[str]) -> torch.Tensor:
    """Says of drawn things what they have: a one for its shape and one for its texture, at length 1 (names, 12).

    Raises:
        LabError: a name has a word that is neither.
    """
    words = [*SHAPES, *TEXTURES]
    rows = torch.zeros(len(names), len(words))
    for row, name in zip(rows, names, strict=True):
        for word in name.lower().split():
            singular = word if word in words else word.removesuffix("s")
            if singular not in words:
                raise LabError(f"{name}: drawn things are known by the words {', '.join(words)}")
            row[words.index(singular)] = 1
        if not name.split():
            raise LabError("--words: a name is empty")
    return _unit(rows)


def noisy_vectors(names: Sequence[str]) -> torch.Tensor:
    """Draws things' words as random vectors and adds noise of each name's own: (names, 300) of length 1.

    The cosine with the mere sum of two words is about 0.8: a name says less exactly what a thing has than attributes.

    Raises:
        LabError: a name has a word that is neither shape nor texture.
    """
    has = (attribute_vectors(names) > 0).float()  # (names, 12)
    words = torch.stack([_drawn(word) for word in (*SHAPES, *TEXTURES)])
    return _unit(has @ words + NOISE * torch.stack([_drawn(str(row)) for row in has.tolist()]))


def _drawn(text: str) -> torch.Tensor:
    row = torch.randn(NOISY_LENGTH, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))
    return row / row.norm()


def check_same_space(known: Mapping[str, torch.Tensor], names: Sequence[str], vectors: torch.Tensor) -> None:
    """Makes sure that words which a model knows have the vectors that it was trained with.

    Raises:
        LabError: one has another, so that vectors from there mean nothing to the model.
    """
    for name, vector in zip(names, vectors, strict=True):
        if name in known:
            own = known[name]
            if len(own) != len(vector) or float(torch.cosine_similarity(own, vector, 0)) < SAME:
                raise LabError(
                    f"--word-vectors: {name} has another vector there than the model was trained with; name the source "
                    "that training had"
                )


def of_length(vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Brings vectors (n, d) to the mean length of others (m, d): a model's scores grow with it."""
    return _unit(vectors) * like.norm(dim=1).mean()


def scaled_like(vectors: ClassVectors, trained: ClassVectors) -> ClassVectors:
    """Brings class vectors to the length of those that a model was trained with."""
    return replace(vectors, seen=of_length(vectors.seen, trained.seen), unseen=of_length(vectors.unseen, trained.seen))


def neighbour_graph(vectors: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Finds the `count` rows of `among` (n, d) that are nearest by cosine to each row of `vectors` (m, d).

    Returns a graph (m, n) of 0 and 1. A row that is equal to one of `among` is not its own neighbour.
    """
    one, other = (rows / rows.norm(dim=1, keepdim=True) for rows in (vectors, among))
    cosines = one @ other.T
    same = (vectors[:, None] == among[None]).all(-1)
    cosines = cosines.masked_fill(same, -2)  # less than any cosine
    places = cosines.topk(min(count, len(among)), dim=1).indices
    return torch.zeros_like(cosines).scatter_(1, places, 1.0)


def _largest(graph: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    reached = torch.where(graph[..., None] > 0, states[None], -torch.inf).amax(1)  # (m, n, d) to (m, d)
    return torch.where(reached.isinf(), torch.zeros_like(reached), reached)


# By the choice of --refine, functions of a graph (m, n) of 0 and 1 and states (n, d): they give what each node gets
# from its neighbours (m, d), which is zeros where it has none.
AGGREGATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "none": lambda graph, states: states.new_zeros(len(graph), states.shape[1]),
    "sum": lambda graph, states: graph @ states,
    "mean": lambda graph, states: graph @ states / graph.sum(1, keepdim=True).clamp(min=1),
    "max": _largest,
}


def refined(unseen: torch.Tensor, seen: torch.Tensor, how: str, neighbours: int, share: float) -> torch.Tensor:
    """Mixes each unseen vector (unseen, d) with those of its nearest classes: a step without weights to learn.

    It takes (1 - share) of the own vector and `share` of the aggregate over the `neighbours` nearest among seen
    (seen, d) and unseen classes, and brings the mixture back to the own vector's length.
    """
    everything = torch.cat([seen, unseen])
    found = AGGREGATES[how](neighbour_graph(unseen, everything, neighbours), everything)
    mixed = (1 - share) * unseen + share * found
    return mixed / mixed.norm(dim=1, keepdim=True).clamp(min=1e-12) * unseen.norm(dim=1, keepdim=True)


def _looked_up(path: Path, names: Sequence[str]) -> tuple[torch.Tensor, tuple[str, ...]]:
    forms = {name: _forms(name) for name in names}
    wanted = {form for of_name in forms.values() for form in of_name}
    wanted |= {word for name in names for word in _words(name)}
    found: dict[str, list[float]] = {}
    try:
        for word, values in _lines(path):
            if word in wanted and word not in found and any(values):  # zeros point nowhere
                found[word] = values
    except ValueError as error:
        raise LabError(f"--word-vectors {path}: cannot be read as word vectors ({error})") from error
    rows, notes, missing = [], [], []
    for name in names:
        whole = next((form for form in forms[name] if form in found), None)
        parts = [word for word in _words(name) if word in found]
        if whole is not None:
            rows.append(found[whole])
        elif parts:
            rows.append(np.mean([found[word] for word in parts], 0).tolist())
            notes.append(f"{name}: not there as a whole, the mean of {' and '.join(parts)}")
        else:
            missing.append(name)
    if missing:
        raise LabError(
            f"--word-vectors {path}: has no vector for {', '.join(missing)}; take a larger file, or name the classes "
            "otherwise"
        )
    return _unit(torch.tensor(rows, dtype=torch.float32)), tuple(notes)


def _lines(path: Path) -> Iterator[tuple[str, list[float]]]:
    """Yields words with their values; a first line of two numbers is fastText's heading."""
    length = 0
    for number, line in enumerate(_text_lines(path), 1):
        parts = line.rstrip().split(" ")
        if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
            continue
        if "\0" in line:
            raise ValueError("it is binary; write it as text first")
        length = length or len(parts) - 1
        word = " ".join(parts[: len(parts) - length])  # a few words of GloVe have spaces in them
        values = [float(value) for value in parts[len(parts) - length :]]
        if length < 2 or not word or not all(map(math.isfinite, values)):
            raise ValueError(f"line {number} is not a word with its values")
        yield word, values


def _text_lines(path: Path) -> Iterator[str]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as stream:
            yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"{path}: cannot be read ({reason_of(error)}); download it again") from error


def _forms(name: str) -> list[str]:
    """Lists how a name of several words may be written as one: word2vec has sports_ball, GloVe at best sports-ball."""
    joined = [name, *(re.sub(r"[\s_-]+", sign, name) for sign in ("_", "-", ""))]
    return list(dict.fromkeys([*joined, *(form.lower() for form in joined)]))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name.lower()) if word]


def clip_vectors(name: str, names: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
    """Projects names into a CLIP's space of pictures: the mean over prompts, each of length 1 (names, d), as it too.

    Radford et al. 2021, section 3.1.4.

    Raises:
        LabError: the model cannot be loaded, or has no such texts.
    """
    from transformers import AutoModel, AutoTokenizer  # a giant that few need: a second of every start otherwise

    said, remedy = f"--word-vectors {CLIP}{name}", "name a CLIP of the hub or its directory"
    tokenizer = load_auto(AutoTokenizer.from_pretrained, name, said=said, remedy=remedy)
    model = load_network(AutoModel, name, said, remedy, dtype=torch.float32).eval()
    if not hasattr(model, "get_text_features"):
        raise LabError(f"{said}: projects no texts into a space of pictures; {remedy}")
    siglip = model.config.model_type.startswith("siglip")  # it learnt from texts that were filled up, without a mask
    how = {"padding": "max_length" if siglip else True, "truncation": True, "return_tensors": "pt"}
    most, total = model.config.text_config.max_position_embeddings, torch.zeros(())
    with torch.no_grad():
        for prompt in prompts:
            batch = tokenizer([prompt.replace("{}", one) for one in names], max_length=most, **how)
            mask = None if siglip else batch["attention_mask"]
            total = total + _unit(model.get_text_features(batch["input_ids"], attention_mask=mask).pooler_output)
    return _unit(total)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)
