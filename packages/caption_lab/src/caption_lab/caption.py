"""Describes pictures: `python -m caption_lab.caption photo.jpg holiday/ "more/*.png" --checkpoint runs/NAME`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.caption()

from pathlib import Path

from caption_lab.config import FINISHED, TRAIN, CaptionConfig, check_decoding
from labs_common.errors import LabError

NAMED = 5


def caption(config: CaptionConfig) -> None:
    """Prints a line for each picture: its path, a tab, its caption; draws heat-maps if asked.

    Raises:
        LabError: no picture or no captioner is there, or a picture cannot be read and --on-bad-data says so.
    """
    check_decoding(config.decoding)
    from labs_common.data.images import picture_files
    from labs_common.run import newest_run

    files = picture_files(config.pictures)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
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
