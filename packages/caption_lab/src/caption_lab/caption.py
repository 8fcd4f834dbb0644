"""Describes pictures: `python -m caption_lab.caption photo.jpg holiday/ "more/*.png" --checkpoint runs/NAME`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.caption()

import torch

from caption_lab.config import FINISHED, TRAIN, CaptionConfig
from caption_lab.report import attention_maps, save_heatmap
from caption_lab.saved import load_captioner
from labs_common.data.images import picture_files, readable
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.progress import console, tracked
from labs_common.run import newest_run


def caption(config: CaptionConfig) -> None:
    """Prints a line for each picture: its path, a tab, its caption; draws heat-maps if asked.

    Raises:
        LabError: no picture or no captioner is there, or a picture cannot be read and --on-bad-data says so.
    """
    files = picture_files(config.pictures)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    if config.heatmap is not None and config.heatmap.suffix.lower() != ".png":
        raise LabError(f"--heatmap {config.heatmap}: must end in .png")
    if config.word and config.heatmap is None:
        raise LabError("--word: is drawn into --heatmap FILE.png; name one")
    captioner = load_captioner(checkpoint)
    if config.heatmap is not None and captioner.model.encoder.pool:
        raise LabError(f"--heatmap: {captioner.kind} does not look at places; take show_attend_tell or transformer")
    accelerator = inference_accelerator()
    captioner.model.to(accelerator.device)
    images = readable(files, config.on_bad_data)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed)
    starts = range(0, len(images), config.batch_size)
    for first in tracked(starts, "describing", len(starts), len(starts) > 1):
        part = images[first : first + config.batch_size]
        with accelerator.autocast():
            written = captioner.describe([image for _, image in part], config.decoding, generator)
        for (file, _), words in zip(part, written.words, strict=True):
            print(f"{file}\t{captioner.vocabulary.decode(words)}", flush=True)
    if config.heatmap is None:
        return
    for number, (file, image) in enumerate(images, 1):
        target = config.heatmap if len(images) == 1 else config.heatmap.with_stem(f"{config.heatmap.stem}-{number}")
        with accelerator.autocast():
            ((said, attention),) = attention_maps(captioner, [image], config.decoding)
        if config.word and config.word not in said:
            raise LabError(f"--word {config.word}: not a word of the caption of {file}; it says: {' '.join(said)}")
        save_heatmap(image, said, attention, target, config.word)
        console.print(f"heat-map: {target}")
