"""The probe, results.json and the report of a pre-training."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from labs_common.cli import to_plain
from labs_common.data import LabelledPictures
from labs_common.logistic import fitted_layers
from labs_common.progress import console
from labs_common.report import (
    Code,
    Figure,
    Section,
    Table,
    Text,
    asked_section,
    cost_section,
    curve_figure,
    curves_section,
    rerun_section,
    save_figure,
    trained_section,
    write_report,
)
from labs_common.report.classes import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.run import Run, cost_of, machine_of, seconds_between
from zsi_contrastive.detector.config import TINY
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.train import Fitted
from zsi_contrastive.ssl.galleries import attention_section, map_section, neighbours_gallery, views_gallery
from zsi_contrastive.ssl.evaluate import COLLAPSED, Features, effective_rank, spread
from zsi_contrastive.ssl.saved import FOLDER, WEIGHTS, load_encoder

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean loss, on features of deviation 1


def finish_report(
    run: Run,
    config: PretrainConfig,
    splits: Mapping[str, LabelledPictures],
    fitted: Fitted,
    clock: dict[str, float],
) -> None:
    """Probes the features, writes results.json and the report, and prints the main numbers."""
    test, several = fitted.features["test"], len(splits["test"].classes) > 1
    found: Predictions | None = None
    if several and config.measure.probe:
        found = probed(fitted.features)
        clock["probed"] = time.perf_counter()
    lines = [line for line in run.lines("metrics.jsonl") if "test/spread" in line]
    first, last = lines[0], lines[-1]
    scores: dict[str, Any] = {
        "spread": spread(test.values), "effective rank": effective_rank(test.values),
        "spread before": first["test/spread"],
    }  # fmt: skip
    if several:
        scores |= {"knn": last["test/knn"], "knn before": first["test/knn"], "knn validation": last["validation/knn"],
                   "chance": 1 / test.classes}  # fmt: skip
    if found is not None:
        scores["probe"] = found.accuracy
    write_results(run, config, fitted, scores)
    console.print(summary_of(config, scores))
    print(f"encoder: {run.path / FOLDER / WEIGHTS}")
    if config.run.report:
        path = write_pages(run, config, splits, fitted, scores, found, clock)
        print(f"report: {path}")


def probed(features: Mapping[str, Features]) -> Predictions:
    """What a linear layer on standardised features says of the test pictures.

    Of four penalties the best on the validation pictures is taken, of equal ones the largest; with that it is fitted
    on training and validation pictures.
    """
    mean, deviation = features["train"].values.mean(0), features["train"].values.std(0).clamp(min=1e-6)
    known = {name: ((part.values - mean) / deviation, part.labels) for name, part in features.items()}
    classes = features["train"].classes
    tried = fitted_layers(*known["train"], classes, PENALTIES)
    values, labels = known["validation"]
    right = [int((layer.logits(values).argmax(1) == labels).sum()) for layer in tried]
    penalty = max(zip(right, PENALTIES, strict=True))[1]
    both = [torch.cat(pair) for pair in zip(known["train"], known["validation"], strict=True)]
    layer = fitted_layers(both[0], both[1], classes, [penalty])[0]
    return Predictions(layer.probabilities(known["test"][0]), known["test"][1].cpu().numpy())


def write_results(run: Run, config: PretrainConfig, fitted: Fitted, scores: Mapping[str, Any]) -> None:
    """results.json: what was measured and what it cost."""
    cost = {
        **cost_of(run, "pictures"),
        "parameters": fitted.parameters,
        "optimizer bytes": fitted.optimizer_bytes,
    }
    machine = machine_of(run, ("torch", "timm", "accelerate"))
    run.save_json("results.json", {"config": to_plain(config), "test": scores, "cost": cost, "environment": machine})


def summary_of(config: PretrainConfig, scores: Mapping[str, Any]) -> str:
    """The main numbers in a sentence."""
    said = f"{config.method}: spread {scores['spread']:.2f}, effective rank {scores['effective rank']:.1f}"
    if "knn" in scores:
        said = (f"{config.method}: neighbours name {scores['knn']:.1%} of the test pictures right (random weights "
                f"{scores['knn before']:.1%}, chance {scores['chance']:.1%})")  # fmt: skip
    if "probe" in scores:
        said += f", a linear layer {scores['probe']:.1%}"
    if scores["spread"] < COLLAPSED:
        said += "; the features have collapsed"
    return said + "."


def write_pages(
    run: Run,
    config: PretrainConfig,
    splits: Mapping[str, LabelledPictures],
    fitted: Fitted,
    scores: Mapping[str, Any],
    found: Predictions | None,
    clock: Mapping[str, float],
) -> str:
    """The report; returns its path."""
    seconds = seconds_between(clock)
    levels, test = fitted.levels, splits["test"]
    data = class_data_section(splits)
    data.blocks.append(views_gallery(config, levels["train"]))
    trained = trained_section(fitted.audit)
    if fitted.teacher_tensors:
        trained.blocks.append(Text(f"The teacher's {fitted.teacher_tensors} tensors follow the learner's as a moving "
                                   "average: none was given a gradient or is the optimizer's."))  # fmt: skip
    sections = [
        asked_section(config),
        data,
        trained,
        curves_section(run, ()),
        worth_section(run, config, scores, found, len(test)),
        Section("Nearest neighbours", [
            neighbours_gallery(test, splits["train"], fitted.features["test"], fitted.features["train"])
        ]),
    ]  # fmt: skip
    if config.measure.map != "none":
        sections.append(map_section(run, config.measure.map, fitted.features["test"], test.classes, config.run.seed))
    attention = attention_section(load_encoder(run.path), levels["test"], config.encoder.side)
    sections += [attention] if attention else []
    sections += class_sections(run, test, found) if found is not None else []
    sections += [use_section(run, config), cost_section(run, "pictures", seconds), rerun_section(run)]
    return write_report(run, f"Pre-training with {config.method}", summary_of(config, scores), sections)


def worth_section(
    run: Run, config: PretrainConfig, scores: Mapping[str, Any], found: Predictions | None, pictures: int
) -> Section:
    """KNN accuracy on test `pictures` beside the random encoder's, the probe, and the watch for collapse."""
    lines = [line for line in run.lines("metrics.jsonl") if "test/spread" in line]
    steps = [line["step"] for line in lines]
    rows: list[tuple[str, Any]] = []
    blocks: list[Any] = []
    if "knn" in scores:
        low, high = wilson_interval(scores["knn"], pictures)
        rows += [("kNN, test", scores["knn"]), ("95 % interval", f"{low:.3f} to {high:.3f}"),
                 ("kNN, test, random weights", scores["knn before"]), ("chance", scores["chance"])]  # fmt: skip
        curves = {name: (steps, [line[f"{name}/knn"] for line in lines]) for name in ("test", "validation")}
        curves["random weights, test"] = ([steps[0], steps[-1]], [scores["knn before"]] * 2)
        blocks.append(Figure(save_figure(run, "knn", curve_figure(curves, "optimizer step", "kNN accuracy")),
                             "Share of pictures whose nearest training pictures name their class. Nothing is chosen "
                             "by the test pictures."))  # fmt: skip
    if found is not None:
        rows.append(("linear probe, test", found.accuracy))
    rows += [("spread", scores["spread"]), ("effective rank", scores["effective rank"])]
    for name, key, up in (("spread", "test/spread", "spread"), ("rank", "test/effective_rank", "effective rank")):
        figure = curve_figure({name: (steps, [line[key] for line in lines])}, "optimizer step", up)
        said = ("Deviation of the features' directions; 0 is collapse, all pictures look alike." if name == "spread"
                else "How many dimensions the features use.")  # fmt: skip
        blocks.append(Figure(save_figure(run, name, figure), said))
    note = (
        "Features are those before the heads"
        + (", of the teacher" if config.method == "dino" else "")
        + ". Spread is 1 where directions fill all of the space (SimSiam's measure times the root of the width)."
    )
    return Section("What the features are worth", [Text(note), Table(("", ""), rows), *blocks])


def use_section(run: Run, config: PretrainConfig) -> Section:
    """How to go on with the encoder."""
    file, name = run.path / FOLDER / WEIGHTS, config.encoder.backbone
    if config.method == "cpc":
        return Section("How to use it", [Text("zsi_contrastive.ssl.saved.load_encoder reads the encoder.")])
    if config.method == "gim":
        backbone = "" if name == TINY else "--backbone resnet101 "
        command = f"python -m zsi_contrastive.train {backbone}--greedy-infomax --greedy-weights {file}"
        return Section("How to use it", [Text("Its modules start the detector's Greedy InfoMax head."), Code(command)])
    if config.encoder.stem == "small":
        said = "A network with a small stem is another network than the detector's: train with --stem usual for that."
        return Section("How to use it", [Text(said)])
    said = "The weights start a detector, if the network has feature maps at strides of 4 to 32"
    commands = [f"python -m zsi_contrastive.train --backbone {name} --backbone-weights {file}"]
    if name != TINY:
        said += ", and the networks of other labs"
        commands += [f"python -m vit_transfer.train --model {name} --weights {file}",
                     f"python -m clip_lab.train --image {name} --image-weights {file}"]  # fmt: skip
    return Section("How to use it", [Text(said + "."), *map(Code, commands)])
