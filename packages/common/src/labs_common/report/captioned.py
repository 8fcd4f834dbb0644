"""What a report says of pictures with captions."""

from PIL import Image

from labs_common.data.described import Captions
from labs_common.report.page import Gallery, Section, Table, Text


def captioned_data_section(data: Captions) -> Section:
    """Where the pictures are from, how many there are in each split, and some with their captions."""
    splits = data.splits
    rows = [
        (name, part.source, len(part), sum(map(len, part.captions)), part.fingerprint())
        for name, part in splits.items()
    ]
    section = Section("Data", [Table(("split", "source", "pictures", "captions", "fingerprint"), rows)])
    if data.left_out:
        section.blocks.append(Table(("left out because", "how many"), list(data.left_out.items())))
        section.blocks.append(Text("First: " + "; ".join(splits["train"].examples)))
    first = splits["train"]
    samples = [(shown(first.image(place)), " · ".join(first.captions[place])) for place in range(min(6, len(first)))]
    section.blocks.append(Gallery(samples, "Training pictures with their captions."))
    return section


def shown(image: Image.Image, side: int = 200) -> Image.Image:
    """A picture as large as a report wants it; very small ones keep their edges."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
