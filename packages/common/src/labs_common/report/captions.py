"""The section about pictures with captions."""

from labs_common.data.captions import Captions
from labs_common.report.page import Gallery, Section, Table, Text, shown


def captioned_data_section(data: Captions) -> Section:
    """Says where the pictures are from and how many are in each split, and shows some with their captions."""
    first = data.splits["train"]
    rows = [
        (name, part.source, len(part), sum(map(len, part.captions)), part.fingerprint())
        for name, part in data.splits.items()
    ]
    section = Section("Data", [Table(("split", "source", "pictures", "captions", "fingerprint"), rows)])
    section.blocks.append(Text(f"Splits: {first.divided}."))
    if data.left_out:
        section.blocks.append(Table(("left out because", "how many"), list(data.left_out.items())))
        section.blocks.append(Text("First: " + "; ".join(first.examples)))
    samples = [(shown(first.image(place)), " · ".join(first.captions[place])) for place in range(min(6, len(first)))]
    section.blocks.append(Gallery(samples, "Training pictures with their captions."))
    return section
