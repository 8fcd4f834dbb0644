"""Names pictures by the sentence that fits best: `python -m clip_lab.zero_shot --checkpoint RN50:openai`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.zero_shot()

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip import OPENAI_IMAGENET_TEMPLATES

from clip_lab.config import ProbeConfig, ZeroShotConfig
from clip_lab.data import lines_of
from clip_lab.encoder import Encoder, load_encoder
from clip_lab.probe import features_of, fitted_layer, read_splits
from clip_lab.report import published_section
from labs_common.cli import to_plain
from labs_common.data.classes import LabelledPictures
from labs_common.data.splits import record_splits
from labs_common.errors import LabError
from labs_common.fitting import leave
from labs_common.frozen.audit import FrozenAudit
from labs_common.options import RunOptions
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    bar_figure,
    rerun_section,
    save_figure,
    trained_section,
)
from labs_common.report.pictures import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.run import Run, check_run_options

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
    if config.batch_size < 1:
        raise LabError("--batch-size: must be at least 1")
    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    templates = templates_of(config.templates)
    encoder = load_encoder(config.checkpoint)
    if encoder.text is None:
        encoder.read([""])  # says what is missing
    splits = read_splits(config.data, config.seed)
    names = list(splits["test"].classes) if config.names is None else lines_of(config.names, "--names")
    if len(names) != len(splits["test"].classes):
        raise LabError(f"--names {config.names}: has {len(names)} names for {len(splits['test'].classes)} classes")
    audit = FrozenAudit(encoder.module)
    wanted = splits if config.probe else {"test": splits["test"]}
    features = features_of(encoder, wanted, "embedding", config.batch_size, config.cache)
    audit.check()
    run = Run.start(config, options, "zero-shot", Accelerator())
    record_splits(run, splits)
    test = features["test"]
    labels = test.labels.numpy()
    found: dict[str, Predictions] = {}
    for said, sentences in (("all templates together", templates), ("the first template alone", templates[:1])):
        logits = encoder.scale * test.values @ class_embeddings(encoder, names, sentences).T
        found[said] = Predictions(logits.double().softmax(1).numpy(), labels)
    if config.probe:
        options_of_probe = ProbeConfig(features="embedding", seed=config.seed)
        layer, _, _ = fitted_layer(options_of_probe, features, len(names), encoder.device)
        found["a linear probe on the embeddings"] = Predictions(layer.probabilities(test.values), labels)
    by_template = {}
    for template in templates:
        named = (test.values @ class_embeddings(encoder, names, [template]).T).argmax(1).numpy()
        by_template[template] = float(np.mean(named == labels))
    finish_zero_shot(run, config, encoder, splits, audit, found, by_template, names)


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
    run: Run,
    config: ZeroShotConfig,
    encoder: Encoder,
    splits: Mapping[str, LabelledPictures],
    audit: FrozenAudit,
    found: Mapping[str, Predictions],
    by_template: Mapping[str, float],
    names: Sequence[str],
) -> None:
    """Writes results.json and the report, and prints the main numbers."""
    test, chance = splits["test"], 1 / len(names)
    rows = []
    for said, predictions in found.items():
        low, high = wilson_interval(predictions.accuracy, len(predictions.labels))
        rows.append((said, predictions.accuracy, f"{low:.3f} to {high:.3f}", predictions.loss))
        console.print(f"{said}: test accuracy {predictions.accuracy:.4f} ({low:.4f} to {high:.4f})")
    console.print(f"by chance: {chance:.4f}")
    results = {
        "config": to_plain(config), "checkpoint": encoder.name, "chance": chance, "pictures": len(test),
        "accuracy": {said: predictions.accuracy for said, predictions in found.items()}, "by template": by_template,
    }  # fmt: skip
    main = next(iter(found.values()))

    def page() -> tuple[str, list[Section]]:
        trained = trained_section(audit)
        trained.blocks.insert(0, Text("Nothing trains: the model is frozen."))
        columns = ("", "test accuracy", "95 % interval", "test loss")
        bars = {said: {"test accuracy": predictions.accuracy} for said, predictions in found.items()}
        bars["by chance"] = {"test accuracy": chance}
        figure = save_figure(run, "accuracy", bar_figure(bars, "test accuracy", 1.0))
        numbers = Section("Numbers", [
            Table(columns, [*rows, ("by chance", chance, None, None)]),
            Figure(figure, "The probe has seen the training pictures' classes; zero-shot has seen none of them."),
        ])  # fmt: skip
        ranked = sorted(by_template.items(), key=lambda item: -item[1])
        sentences = Section("Sentences", [
            Text(f"For instance: “{filled(ranked[0][0], names[0])}”."),
            Table(("template", "test accuracy by itself"), ranked, "", folded=len(ranked) > 12),
        ])  # fmt: skip
        summary = (
            f"{main.accuracy:.1%} of {len(test):,} test pictures are named right, of whose names no picture was seen "
            f"(by chance {chance:.1%})."
        )
        return summary, [
            asked_section(config),
            class_data_section(splits),
            trained,
            numbers,
            sentences,
            *class_sections(run, test, main),
            published_section({"zero-shot": main.accuracy}, encoder.name, config.data.data),
            rerun_section(run),
        ]

    leave(run, results, True, f"Zero-shot classes of {encoder.name}", page)
