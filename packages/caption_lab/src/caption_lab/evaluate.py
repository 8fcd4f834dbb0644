"""Measures a finished captioner: `python -m caption_lab.evaluate --checkpoint runs/NAME --data flickr8k`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from caption_lab.config import FINISHED, TRAIN, EvaluateConfig, TrainConfig, check_decoding
from labs_common.cli import config_from_yaml
from labs_common.errors import LabError

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from labs_common.data import CaptionedPictures
    from labs_common.scenes import Scene


def evaluate(config: EvaluateConfig) -> None:
    """Writes captions of the pictures with each beam width, their scores, and a report.

    Raises:
        LabError: no captioner is there, or no such pictures.
    """
    check_decoding(config.decoding)
    beams = _beams(config)

    import torch
    from accelerate import Accelerator

    from caption_lab.evaluation import evaluated
    from caption_lab.export import load_captioner
    from caption_lab.results import METRICS, captions_json, evaluation_sections, print_scores, published_section
    from labs_common.cli import to_plain
    from labs_common.progress import console
    from labs_common.report import Section, Table, asked_section, write_report
    from labs_common.run import Run, check_new, new_folder, newest_run

    check_new(config.output)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    captioner = load_captioner(checkpoint)
    output = new_folder(config.output, checkpoint / f"evaluation-{config.split}")
    pictures, truth, source = chosen_pictures(config, checkpoint)
    accelerator = Accelerator()
    kept: dict[int, torch.Tensor] = {}
    found = {
        beam: evaluated(captioner, pictures, truth, dataclasses.replace(config.decoding, beam=beam), accelerator,
                        config.batch_size, kept=kept)
        for beam in beams
    }  # fmt: skip
    if not accelerator.is_main_process:
        return
    (output / "figures").mkdir(parents=True, exist_ok=True)
    run = Run(output)
    best = max(beams, key=lambda beam: found[beam].metrics["cider"])
    scores = {str(beam): found[beam].metrics for beam in beams}
    run.save_json("evaluation.json", {"config": to_plain(config), "pictures": len(pictures), "by beam": scores})
    run.save_json("captions.json", captions_json(pictures, found[best].captions))
    for beam in beams:
        console.print(f"beam {beam}")
        print_scores(found[beam])
    rows = [(beam, *(found[beam].metrics[key] for key in METRICS)) for beam in beams]
    sections = [
        asked_section(config),
        Section("Beam widths", [Table(("beam", *METRICS.values()), rows, f"What follows is of beam {best}, with the "
                                      "highest CIDEr-D.")]),
        *evaluation_sections(run, found[best], pictures, truth, captioner,
                             dataclasses.replace(config.decoding, beam=best)),
        published_section({captioner.kind: found[best].metrics}, source),
    ]  # fmt: skip
    metrics = found[best].metrics
    said = ", ".join(f"{METRICS[key]} {metrics[key]:.3g}" for key in ("bleu-1", "bleu-4", "cider"))
    summary = f"{len(pictures)} pictures, beam {best}: {said}."
    path = write_report(run, f"Evaluation of {checkpoint.name}", summary, sections)
    print(f"report: {path}")


def chosen_pictures(
    config: EvaluateConfig, checkpoint: Path
) -> "tuple[CaptionedPictures, dict[str, Scene], str | None]":
    """The pictures, what drawn ones show, and where they are from: of --data, or of the run itself.

    Raises:
        LabError: they cannot be read, or the run does not say which pictures it had.
    """
    from caption_lab.data import drawn_scenes, read_data
    from labs_common.data import print_left_out, read_captioned
    from labs_common.data.described import at_most, truth_of

    options, seed = config.data, 0
    if options.data is None:
        file = checkpoint / "config.yaml"
        if not file.is_file():
            raise LabError(f"--checkpoint {checkpoint}: holds no config.yaml that names its pictures; name --data")
        trained = config_from_yaml(TrainConfig, file)
        options = dataclasses.replace(
            trained.data, on_bad_data=config.data.on_bad_data, limit=options.limit or trained.data.limit,
            splits=options.splits or trained.data.splits,
        )  # fmt: skip
        seed = trained.run.seed
    if config.split == "all":
        folder = Path(options.data) if options.data else drawn_scenes()
        pictures = read_captioned(folder, options.on_bad_data)
        print_left_out({"all": pictures})
        pictures = at_most(pictures, options.limit, seed) if options.limit else pictures
        return pictures, truth_of(folder, [pictures]), options.data
    data = read_data(options, seed, shown=True)
    return data.splits[config.split], data.truth, options.data


def _beams(config: EvaluateConfig) -> list[int]:
    try:
        beams = [int(beam) for beam in config.beams.split(",")]
    except ValueError:
        beams = []
    if not beams or min(beams) < 1:
        raise LabError(f"--beams {config.beams}: must be numbers from 1 with commas between, as in 1,3,5")
    if config.decoding.top_p:
        return beams[:1]
    return list(dict.fromkeys(beams))
