"""Measures a finished captioner: `python -m caption_lab.evaluate --checkpoint runs/NAME --data flickr8k`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.evaluate()

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from caption_lab.config import FINISHED, TRAIN, EvaluateConfig
from caption_lab.data import check_unseen, drawn_scenes, options_of_run, read_data, same_data
from caption_lab.released import (
    NO_PROMPT,
    ClipJudge,
    JudgedPictures,
    ReleasedCaptioner,
    is_released,
    load_released,
)
from caption_lab.report import evaluation_sections, print_scores, published_section, score_columns
from caption_lab.saved import Captioner, load_captioner
from caption_lab.vocabulary import TOKENS
from labs_common.caption_metrics import METRICS, SCORER, CaptionScores, captions_of_others, score_captions
from labs_common.cli import to_plain
from labs_common.data.captions import CaptionedPictures, PictureTensors, read_undivided
from labs_common.decoding import written_captions
from labs_common.device import inference_accelerator
from labs_common.errors import LabError
from labs_common.lock import check_new, new_folder
from labs_common.options import DecodingOptions
from labs_common.progress import console
from labs_common.report.captions import captions_json
from labs_common.report.page import Section, Table, making_report, write_report
from labs_common.report.sections import asked_section
from labs_common.run import Run, newest_run
from labs_common.scenes.world import Scene

# Captions that say more different things than the best one, to be judged as well; 0.9 is Holtzman et al.'s usual value.
SAMPLED = DecodingOptions(beam=1, top_p=0.9)
SAMPLES = 3  # of each picture


def evaluate(config: EvaluateConfig) -> None:
    """Writes captions of the pictures with each beam width, their scores, and a report.

    Raises:
        LabError: no captioner is there, or no such pictures.
    """
    beams = _beams(config)
    check_new(config.output)
    checkpoint = config.checkpoint or newest_run(FINISHED, TRAIN)
    released = is_released(checkpoint)
    captioner: Captioner | ReleasedCaptioner
    if released:
        captioner = load_released(checkpoint, config.prompt)
        config = replace(config, prompt=captioner.prompt or NO_PROMPT)  # what is used, for the report
    elif config.prompt:
        raise LabError("--prompt: works with a released model only; drop it")
    else:
        captioner = load_captioner(checkpoint)
    clip = ClipJudge(config.clip_score) if config.clip_score else None
    name = f"evaluation-{config.split}"
    folder = Path("runs") / f"{checkpoint.name}-{name}" if released else checkpoint / name
    output = new_folder(config.output, folder)
    pictures, truth = chosen_pictures(config, checkpoint)
    accelerator = inference_accelerator()
    judged = clip.look(pictures, accelerator.device) if clip else None
    kept: dict[int, torch.Tensor] | None = {} if len(beams) > 1 else None
    found = {
        beam: evaluate_captioner(captioner, pictures, truth, replace(config.decoding, beam=beam), accelerator,
                                 config.batch_size, kept, judged)
        for beam in beams
    }  # fmt: skip
    if not accelerator.is_main_process:
        return
    (output / "figures").mkdir(parents=True, exist_ok=True)
    run = Run(output)
    shown = _shown(config, beams, checkpoint)
    metrics = found[shown].metrics
    scores = {str(beam): found[beam].metrics for beam in beams}
    run.save_json(
        "evaluation.json", {"config": to_plain(config), "pictures": len(pictures), "scorer": SCORER, "by beam": scores}
    )
    run.save_json("captions.json", captions_json(pictures, found[shown].captions))
    for beam in beams:
        console.print(f"beam {beam}")
        print_scores(found[beam])
    columns = score_columns(metrics)
    rows = [(beam, *(found[beam].metrics[key] for key in columns)) for beam in beams]
    caption = f"What follows is of beam {shown}, chosen beforehand: the best here would be chosen on these pictures."
    with making_report():
        sections = [
            asked_section(config),
            Section("Beam widths", [Table(("beam", *columns.values()), rows, caption)]),
            *evaluation_sections(run, found[shown], pictures, truth, captioner, replace(config.decoding, beam=shown)),
            published_section({captioner.kind: metrics}, pictures, config.split, bool(truth)),
        ]
        said = ", ".join(f"{METRICS[key]} {metrics[key]:.3g}" for key in ("bleu-1", "bleu-4", "cider"))
        summary = f"{len(pictures)} pictures, beam {shown}: {said}."
        print(f"report: {write_report(run, f'Evaluation of {checkpoint.name}', summary, sections)}")


def evaluate_captioner(
    captioner: Captioner | ReleasedCaptioner,
    pictures: CaptionedPictures,
    truth: Mapping[str, Scene],
    options: DecodingOptions,
    accelerator: Accelerator,
    batch_size: int = 64,
    kept: dict[int, torch.Tensor] | None = None,
    judged: JudgedPictures | None = None,
) -> CaptionScores:
    """Runs the whole captioner on the pictures and scores its captions; the processes share them.

    Several calls for the same pictures that get the same `kept` run the encoder once. `judged` adds CLIPScore.
    """
    write: Callable[[DecodingOptions, str], list[str]]
    if isinstance(captioner, ReleasedCaptioner):
        write = partial(captioner.captions, pictures, accelerator, batch_size)
    else:
        kept = {} if kept is None and truth else kept  # drawn pictures are described several times
        write = partial(_captions, captioner, pictures, accelerator, batch_size, kept)

    def written(by: DecodingOptions, task: str, number: int = 0) -> list[str]:
        set_seed(number, device_specific=True)
        return write(by, task)

    captions, times = written(options, "writing captions"), SAMPLES if truth else 0
    sampled = [written(SAMPLED, f"sampling captions, {n + 1} of {times}", n) for n in range(times)]
    found = score_captions(captions, pictures, truth, sampled)
    if judged is None or not accelerator.is_main_process:
        return found
    ours, others = judged.scores(captions), judged.scores(captions_of_others(pictures))
    return replace(found, metrics=found.metrics | ours, chance=found.chance | others)


def _captions(
    captioner: Captioner,
    pictures: CaptionedPictures,
    accelerator: Accelerator,
    batch_size: int,
    kept: dict[int, torch.Tensor] | None,
    options: DecodingOptions,
    task: str,
) -> list[str]:
    tensors = PictureTensors(pictures, captioner.model.encoder.transform)
    model, vocabulary = captioner.model.to(accelerator.device), captioner.vocabulary

    @torch.no_grad()
    def features(places: Sequence[int]) -> torch.Tensor:
        missing = [place for place in places if kept is None or place not in kept]
        if missing:
            found: torch.Tensor = model.encoder(tensors.batch(missing).to(accelerator.device))
            if kept is None:
                return found
            kept.update(zip(missing, found, strict=True))
        assert kept is not None
        return torch.stack([kept[place] for place in places])

    return written_captions(
        model.decoder, features, len(pictures), TOKENS, vocabulary.length + 1, vocabulary.decode, options, accelerator,
        batch_size, task,
    )  # fmt: skip


def chosen_pictures(config: EvaluateConfig, checkpoint: Path) -> tuple[CaptionedPictures, dict[str, Scene]]:
    """Reads the pictures of --data, or of the run itself; returns with them what drawn ones show.

    Raises:
        LabError: they cannot be read, or the run does not say which pictures it had, or learnt from some of them.
    """
    options, trained = config.data, options_of_run(checkpoint)
    if options.data is None:
        if trained is None:
            raise LabError(f"--checkpoint {checkpoint}: holds no config.yaml that names its pictures; name --data")
        options = replace(options, data=trained.data.data, limit=options.limit or trained.data.limit)
    if trained and options.splits is None and same_data(options.data, trained.data.data):
        options = replace(options, splits=trained.data.splits)
    # Data without lists are divided as for the run: its test pictures stay those that it did not learn from.
    seed = config.seed if config.seed is not None else trained.run.seed if trained else 0
    if config.split == "all":
        data = read_undivided(options, seed, drawn_scenes)
    else:
        data = read_data(options, seed, shown=True)
    pictures = data.splits[config.split]
    if config.split in ("validation", "test"):
        check_unseen(pictures, checkpoint, options.data, "--checkpoint")
    return pictures, data.truth


def _shown(config: EvaluateConfig, beams: Sequence[int], checkpoint: Path) -> int:
    """Returns the width whose captions are shown: that of --beam, of the run or the first, whatever their scores."""
    asked, trained = config.decoding.beam, options_of_run(checkpoint)
    if trained and asked == DecodingOptions.beam:
        asked = trained.decoding.beam
    return asked if asked in beams else beams[0]


def _beams(config: EvaluateConfig) -> list[int]:
    """Reads --beams; sampling follows no beams, so one width stands for all.

    Raises:
        LabError: they are no widths.
    """
    try:
        beams = [int(beam) for beam in config.beams.split(",")]
    except ValueError:
        beams = []
    if not beams or min(beams) < 1:
        raise LabError(f"--beams {config.beams}: must be numbers from 1 with commas between, as in 1,3,5")
    return beams[:1] if config.decoding.top_p else list(dict.fromkeys(beams))
