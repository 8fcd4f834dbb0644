"""The sections about pictures with captions, and what models say of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labs_common.data.captions import CaptionedPictures, Captions
from labs_common.report.page import Gallery, Section, Table, Text, shown

DRAWN = 20  # captions in the table of those drawn by chance


def captioned_data_section(data: Captions) -> Section:
    """Says where the pictures are from and how many are in each split, and shows some with their captions."""
    first = data.splits["train"]
    splits = [
        (name, part.source, len(part), sum(map(len, part.captions)), part.fingerprint())
        for name, part in data.splits.items()
    ]
    section = Section("Data", [Table(("split", "source", "pictures", "captions", "fingerprint"), splits)])
    section.blocks.append(Text(f"Splits: {first.divided}."))
    if data.left_out:
        section.blocks.append(Table(("left out because", "how many"), list(data.left_out.items())))
        section.blocks.append(Text("First: " + "; ".join(first.examples)))
    samples = [(shown(first.image(place)), " · ".join(first.captions[place])) for place in range(min(6, len(first)))]
    section.blocks.append(Gallery(samples, "Training pictures with their captions."))
    every = [(name, of, said) for name, part in data.splits.items()
             for of, those in zip(part.names, part.captions, strict=True) for said in those]  # fmt: skip
    drawn = np.random.default_rng(0).choice(len(every), min(DRAWN, len(every)), replace=False)
    said = f"{len(drawn)} of all {len(every):,} captions, drawn by chance."
    rows = [every[place] for place in sorted(drawn)]
    section.blocks.append(Table(("split", "picture", "caption"), rows, said, folded=True))
    return section


def example_places(pictures: CaptionedPictures, most: int = 5) -> list[int]:
    """Returns the places of some pictures, evenly from all."""
    found: list[int] = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int).tolist()
    return found


def examples_section(captions: Mapping[str, Sequence[str]], test: CaptionedPictures) -> Section:
    """Shows five test pictures with what each model says of them, and what people said."""
    blocks: list[Any] = []
    for place in example_places(test):
        rows = [(name, said[place]) for name, said in captions.items()]
        rows += [("true", caption) for caption in test.captions[place]]
        blocks += [Gallery([(shown(test.image(place)), test.names[place])], ""), Table(("", "caption"), rows)]
    return Section("Five test pictures", blocks)


def captions_json(pictures: CaptionedPictures, captions: Sequence[str]) -> list[dict[str, str]]:
    """Returns the caption that was written for each picture, as other programs may read it."""
    return [{"image": name, "caption": caption} for name, caption in zip(pictures.names, captions, strict=True)]
