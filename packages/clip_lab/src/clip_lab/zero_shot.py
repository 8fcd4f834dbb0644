"""Names pictures by the sentence that fits best: `python -m clip_lab.zero_shot --checkpoint RN50:openai`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.zero_shot()

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES

from clip_lab.config import ProbeConfig, ZeroShotConfig
from clip_lab.data import lines_of
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.probe import Study, fitted_layer, read_splits
from labs_common.errors import LabError
from labs_common.options import RunOptions
from labs_common.progress import console
from labs_common.report.classes import Predictions, wilson_interval
from labs_common.report.figures import bar_figure
from labs_common.report.page import Figure, Section, Table, Text, save_figure
from labs_common.run import check_run_options

# What --templates names; a name of a file gives the lines of that file.
TEMPLATES = {
    "plain": ("a photo of a {}.",),
    "short": (
        "a photo of a {}.",
        "a close photo of a {}.",
        "a small photo of the {}.",
        "a blurry picture of a {}.",
        "a picture of one {}.",
        "there is a {} in the picture.",
        "a {}",
    ),
    "openai": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}


def zero_shot(config: ZeroShotConfig) -> None:
    """Walks the road: pictures, embeddings, one embedding per class, test, comparison with a probe, report.

    Raises:
        LabError: the model or the pictures cannot be had, or the model reads no text.
        RunStopped: the frozen model has moved.
    """
    check_run_options(RunOptions(output=config.output))
    templates = templates_of(config.templates)
    encoder = load_encoder(config.checkpoint)
    if encoder.text is None:
        encoder.read([""])  # says what is missing
    splits = read_splits(config.data, config.seed)
    names = list(splits["test"].classes) if config.names is None else lines_of(config.names, "--names")
    if len(names) != len(splits["test"].classes):
        raise LabError(f"--names {config.names}: has {len(names)} names for {len(splits['test'].classes)} classes")
    wanted = list(splits) if config.probe else ["test"]
    study = Study.start("zero-shot", config, encoder, splits, "embedding", wanted)
    image = study.features["test"].values
    by_name = {template: image @ class_embeddings(encoder, names, [template]).T for template in templates}
    together = image @ class_embeddings(encoder, names, templates).T
    found = {
        said: study.predictions((encoder.scale * cosines).double().softmax(1).numpy())
        for said, cosines in (("all templates together", together), ("the first template alone", by_name[templates[0]]))
    }
    if config.probe:
        layer, _, _ = fitted_layer(ProbeConfig(seed=config.seed), study)
        found["a linear probe on the embeddings"] = study.predictions(layer.probabilities(image))
    labels = study.features["test"].labels
    alone = {template: float((cosines.argmax(1) == labels).double().mean()) for template, cosines in by_name.items()}
    finish_zero_shot(study, found, alone, names)


def templates_of(kind: str) -> list[str]:
    """Returns the templates that --templates names: plain, short, openai, or those of a file.

    Raises:
        LabError: the file cannot be read, or a line of it has no place for the name.
    """
    if kind in TEMPLATES:
        return list(TEMPLATES[kind])
    found = lines_of(Path(kind), "--templates")
    for line in found:
        if line.count("{}") != 1:
            raise LabError(f"--templates {kind}: “{line}” must have one {{}} for the name of the class")
    return found


def filled(template: str, name: str) -> str:
    """Puts a class's name into a template; `a` becomes `an` where the name asks for it."""
    said = name.replace("_", " ")
    if said[:1].lower() in tuple("aeiou"):
        template = template.replace("a {}", "an {}")
    return template.replace("{}", said)


def class_embeddings(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Averages each class's sentences to one embedding of length 1 (classes, width); Radford et al. 2021, 3.1.4."""
    sentences = [filled(template, name) for name in names for template in templates]
    every = encoder.read(sentences).unflatten(0, (len(names), len(templates)))  # (classes, templates, width)
    return F.normalize(every.mean(1), dim=1)


def finish_zero_shot(
    study: Study, found: Mapping[str, Predictions], by_template: Mapping[str, float], names: Sequence[str]
) -> None:
    """Writes results.json and the report, and prints the main numbers."""
    chance = 1 / len(names)
    rows: list[tuple[Any, ...]] = []
    for said, predictions in found.items():
        low, high = wilson_interval(predictions.accuracy, len(predictions.labels))
        rows.append((said, predictions.accuracy, f"{low:.3f} to {high:.3f}", predictions.loss))
        console.print(f"{said}: test accuracy {predictions.accuracy:.4f} ({low:.4f} to {high:.4f})")
    rows.append(("by chance", chance, None, None))
    console.print(f"by chance: {chance:.4f}")
    accuracies = {said: accuracy for said, accuracy, *_ in rows}
    results = {
        "chance": chance,
        "accuracy": {said: predictions.accuracy for said, predictions in found.items()},
        "by template": by_template,
    }

    def sections() -> list[Section]:
        bars = {said: {"test accuracy": accuracy} for said, accuracy in accuracies.items()}
        figure = save_figure(study.run, "accuracy", bar_figure(bars, "test accuracy", 1.0))
        note = "The probe has seen the training pictures' classes; zero-shot has seen none of them."
        table = Table(("", "test accuracy", "95 % interval", "test loss"), rows)
        ranked = sorted(by_template.items(), key=lambda item: -item[1])
        example = Text(f"For instance: “{filled(ranked[0][0], names[0])}”.")
        alone = Table(("template", "test accuracy by itself"), ranked, "", folded=len(ranked) > 12)
        return [Section("Numbers", [table, Figure(figure, note)]), Section("Sentences", [example, alone])]

    main = next(iter(found.values()))
    summary = (
        f"{main.accuracy:.1%} of {len(main.labels):,} test pictures are named right, of whose names no picture was "
        f"seen (by chance {chance:.1%})."
    )
    title, frozen = f"Zero-shot classes of {study.encoder.name}", "Nothing trains: the model is frozen."
    study.write_results(title, summary, frozen, results, sections, {"zero-shot": main})
