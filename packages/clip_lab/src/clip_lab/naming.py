"""What zero-shot naming leaves behind: results and report."""

from collections.abc import Mapping, Sequence

from clip_lab.command_config import ZeroShotConfig
from clip_lab.encoder import Encoder
from clip_lab.probing import published_section
from clip_lab.templates import filled
from labs_common.cli import to_plain
from labs_common.data import LabelledPictures
from labs_common.freezing import FrozenAudit
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
    write_report,
)
from labs_common.report.classes import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.run import Run


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
    test = splits["test"]
    chance = 1 / len(names)
    rows = []
    for said, predictions in found.items():
        low, high = wilson_interval(predictions.accuracy, len(predictions.labels))
        rows.append((said, predictions.accuracy, f"{low:.3f} to {high:.3f}", predictions.loss))
        console.print(f"{said}: test accuracy {predictions.accuracy:.4f} ({low:.4f} to {high:.4f})")
    console.print(f"by chance: {chance:.4f}")
    run.save_json("results.json", {
        "config": to_plain(config), "checkpoint": encoder.name, "chance": chance, "pictures": len(test),
        "accuracy": {said: predictions.accuracy for said, predictions in found.items()}, "by template": by_template,
    })  # fmt: skip
    main = next(iter(found.values()))
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
    sections = [
        asked_section(config),
        class_data_section(splits),
        trained_section(audit),
        numbers,
        sentences,
        *class_sections(run, test, main),
        published_section({"zero-shot": main.accuracy}, encoder.name, config.data.data),
        rerun_section(run),
    ]
    sections[2].blocks.insert(0, Text("Nothing trains: the model is frozen."))
    summary = (
        f"{main.accuracy:.1%} of {len(test):,} test pictures are named right, of whose names no picture was seen "
        f"(by chance {chance:.1%})."
    )
    path = write_report(run, f"Zero-shot classes of {encoder.name}", summary, sections)
    print(f"report: {path}")
