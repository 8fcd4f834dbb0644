"""Describes pictures: `python -m caption_lab.caption photo.jpg holiday/ "more/*.png" --checkpoint runs/NAME`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.caption()

from pathlib import Path

import torch
from PIL import Image

from caption_lab.config import FINISHED, TRAIN, CaptionConfig, check_decoding
from caption_lab.report import attention_maps, save_heatmap
from caption_lab.saved import load_captioner
from labs_common.data.images import BadPictureError, decoded, picture_files
from labs_common.errors import LabError
from labs_common.progress import console, tracked
from labs_common.run import newest_run

NAMED = 5  # unreadable files in an error's one line


def caption(config: CaptionConfig) -> None:
    """Prints a line for each picture: its path, a tab, its caption; draws heat-maps if asked.

    Raises:
        LabError: no picture or no captioner is there, or a picture cannot be read and --on-bad-data says so.
    """
    check_decoding(config.decoding)
    files = picture_files(config.pictures)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    if config.heatmap is not None and config.heatmap.suffix.lower() != ".png":
        raise LabError(f"--heatmap {config.heatmap}: must end in .png")
    captioner = load_captioner(checkpoint)
    if config.heatmap is not None and captioner.model.encoder.pool:
        raise LabError(f"--heatmap: {captioner.kind} does not look at places; take show_attend_tell or transformer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner.model.to(device)
    images = readable(files, config.on_bad_data == "skip")
    generator = torch.Generator(device).manual_seed(config.seed)
    starts = range(0, len(images), config.batch_size)
    for first in tracked(starts, "describing", len(starts), len(starts) > 1):
        part = images[first : first + config.batch_size]
        written = captioner.describe([image for _, image in part], config.decoding, generator)
        for (file, _), words in zip(part, written.words, strict=True):
            print(f"{file}\t{captioner.vocabulary.decode(words)}", flush=True)
    if config.heatmap is None:
        return
    for number, (_, image) in enumerate(images, 1):
        target = config.heatmap if len(images) == 1 else config.heatmap.with_stem(f"{config.heatmap.stem}-{number}")
        ((said, attention),) = attention_maps(captioner, [image], config.decoding)
        save_heatmap(image, said, attention, target)
        console.print(f"heat-map: {target}")


def readable(files: list[Path], skip: bool) -> list[tuple[Path, Image.Image]]:
    """Decodes the pictures; says which ones cannot be read.

    Raises:
        LabError: some cannot, unless they are to be left out and others are there.
    """
    images: list[tuple[Path, Image.Image]] = []
    faults: list[str] = []
    for file in files:
        try:
            images.append((file, decoded(file)))
        except BadPictureError as error:
            faults.append(f"{file}: {error}")
    if faults and not (skip and images):
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise LabError(f"{'; '.join(faults[:NAMED])}{more}; add --on-bad-data skip to leave out what cannot be read")
    for fault in faults:
        console.print(f"left out {fault}")
    return images
