"""Describes pictures: `python -m caption_lab.caption photo.jpg holiday/ "more/*.png" --checkpoint runs/NAME`."""

import glob
from collections.abc import Sequence
from pathlib import Path

from caption_lab.config import CaptionConfig, check_decoding
from labs_common.cli import run_command
from labs_common.errors import LabError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
NAMED = 5


def main() -> None:
    """The command."""
    run_command(caption, CaptionConfig, "python -m caption_lab.caption")


def caption(config: CaptionConfig) -> None:
    """Prints a line for each picture: its path, a tab, its caption; draws heat-maps if asked.

    Raises:
        LabError: no picture or no captioner is there, or a picture cannot be read and --on-bad-data says so.
    """
    check_decoding(config.decoding)
    files = picture_files(config.pictures)
    checkpoint = config.checkpoint or newest_run()
    if config.heatmap is not None and config.heatmap.suffix.lower() != ".png":
        raise LabError(f"--heatmap {config.heatmap}: must end in .png")

    import torch
    from PIL import Image

    from caption_lab.decoding import write
    from caption_lab.export import features_of, load_captioner
    from caption_lab.looking import looked_at, save_heatmap
    from labs_common.data import BadPictureError, decoded
    from labs_common.progress import console, tracked

    captioner = load_captioner(checkpoint)
    if config.heatmap is not None and captioner.model.encoder.pool:
        raise LabError(f"--heatmap: {captioner.kind} does not look at places; take show_attend_tell or transformer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captioner.model.to(device)
    images: list[tuple[Path, Image.Image]] = []
    faults: list[str] = []
    for file in files:
        try:
            images.append((file, decoded(file)))
        except BadPictureError as error:
            faults.append(f"{file}: {error}")
    if faults and (config.on_bad_data == "error" or not images):
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise LabError(f"{'; '.join(faults[:NAMED])}{more}; add --on-bad-data skip to leave out what cannot be read")
    for fault in faults:
        console.print(f"left out {fault}")
    generator = torch.Generator(device).manual_seed(config.seed)
    starts = range(0, len(images), config.batch_size)
    for first in tracked(starts, "describing", len(starts), len(starts) > 1):
        part = images[first : first + config.batch_size]
        levels = [captioner.transform.levels(image) for _, image in part]
        features = features_of(captioner, captioner.transform.normalised(levels).to(device))
        written = write(captioner.model.decoder, features, captioner.length, config.decoding, generator)
        for (file, _), words in zip(part, written.words, strict=True):
            print(f"{file}\t{captioner.vocabulary.decode(words)}", flush=True)
    for number, (_, image) in enumerate(images if config.heatmap is not None else (), 1):
        assert config.heatmap is not None
        target = config.heatmap if len(images) == 1 else config.heatmap.with_stem(f"{config.heatmap.stem}-{number}")
        ((said, attention),) = looked_at(captioner, [image], config.decoding)
        save_heatmap(image, said, attention, target)
        console.print(f"heat-map: {target}")


def picture_files(named: Sequence[str]) -> list[Path]:
    """The files that are named: themselves, those of a directory, those that fit a pattern; each once.

    Raises:
        LabError: a name stands for nothing.
    """
    if not named:
        raise LabError("name pictures: files, directories or patterns")
    found: dict[Path, None] = {}
    for name in named:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(name, recursive=True)))
        if not files:
            raise LabError(f"{name}: " + ("no picture in that directory" if path.is_dir() else "no such file"))
        found |= dict.fromkeys(files)
    return list(found)


def newest_run() -> Path:
    """The finished captioner under runs/ that was written last.

    Raises:
        LabError: there is none.
    """
    finished = sorted(Path("runs").glob("*/model/vocabulary.json"), key=lambda file: -file.stat().st_mtime)
    if not finished:
        raise LabError(
            "--checkpoint: no finished run under runs/; train one with python -m caption_lab.train, or name one"
        )
    return finished[0].parent.parent


if __name__ == "__main__":
    main()
