"""Shows, checks and writes word vectors: `python -m zsi_contrastive.words --split 48_17 --word-vectors FILE`."""

import io

import numpy as np
import torch

from labs_common.errors import LabError
from labs_common.run import write_atomically
from zsi_contrastive.detector.annotations import read_split
from zsi_contrastive.detector.columns import checked_order, neighbours
from zsi_contrastive.detector.config import SCENES, WordsConfig
from zsi_contrastive.detector.vectors import ATTRIBUTES, read_class_vectors, read_vocabulary


def words(config: WordsConfig) -> None:
    """Prints a line for each column: its number, class and most similar classes; then what the check says.

    Raises:
        LabError: the vectors cannot be read, stand in another order, or cannot be written.
    """
    split = read_split(config.split)
    source = config.words.word_vectors or (ATTRIBUTES if config.split == SCENES else "")
    if not source:
        raise LabError("--word-vectors: name a matrix, a text file of GloVe or fastText, or clip:NAME")
    vectors = read_class_vectors(source, split)
    if config.words.vocabulary is not None:
        read_vocabulary(config.words.vocabulary, vectors.seen.shape[1])
    near = neighbours(vectors.classes, split.classes)
    print(f"column  class ({len(split.seen)} seen, {len(split.unseen)} unseen; {vectors.seen.shape[1]} values each)")
    print(f"{0:6}  background, length {float(vectors.background.norm()):.3f}")
    for number, (name, others) in enumerate(zip(split.classes, near, strict=True), 1):
        kind = "" if number <= len(split.seen) else " (unseen)"
        said = ", ".join(f"{other} {cosine:.2f}" for other, cosine in others)
        print(f"{number:6}  {name}{kind}: like {said}")
    for note in vectors.notes:
        print(f"note: {note}")
    if vectors.by_column and config.words.columns == "check":
        print(checked_order(vectors.classes, split, source).verdict)
    if config.write is not None:
        stream = io.StringIO()
        matrix = torch.cat([vectors.background[None], vectors.classes]).T  # (d, 1 + classes)
        np.savetxt(stream, matrix.double().numpy(), fmt="%.9g", delimiter=",")  # nine digits are a float32, exactly
        try:
            write_atomically(config.write, stream.getvalue())
        except OSError as error:
            raise LabError(f"--write {config.write}: cannot be written ({error.strerror})") from error
        print(f"written: {config.write}")


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.words")
