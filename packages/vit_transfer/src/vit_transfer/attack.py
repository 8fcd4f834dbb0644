"""Universal adversarial perturbations: `python -m vit_transfer.attack --models runs/NAME,runs/OTHER`.

One small change that, added to any picture, changes a network's predictions of most (Moosavi-Dezfooli et al. 2017).
"""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.attack()

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from labs_common.cache import path_name
from labs_common.cli import to_plain
from labs_common.compare.plan import entries_of
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import record_splits
from labs_common.errors import Interrupted, LabError
from labs_common.fitting import begin, write_results
from labs_common.progress import ProgressLine, console
from labs_common.report.figures import curve_figure
from labs_common.report.page import Figure, Gallery, Section, Table, Text, save_figure
from labs_common.report.sections import asked_section, rerun_section
from labs_common.run import Run, keep, seconds_between
from labs_common.saved import read_weights
from vit_transfer.config import AttackConfig
from vit_transfer.data import Splits, Tensors, read_splits, saved_transform
from vit_transfer.perturbations import (
    EVALUATION_BATCH,
    NORMS,
    OnLevels,
    fast_gradient,
    fooling_rate,
    predicted_classes,
    projected,
    universal_fast_gradient,
    universal_perturbation,
)
from vit_transfer.saved import load_model, saved_model, weights_sums
from vit_transfer.train import check_network, fit_beside, named_config

UNIVERSAL = "universal, DeepFool inside"
SHOWN, ENLARGED = 6, 160  # fooled pictures of each network in the report, and their side there


def attack(config: AttackConfig) -> None:
    """Walks the road: pictures, networks, a perturbation for each and each number of pictures, report."""
    clock = {"start": time.perf_counter()}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError("attack works in one process, picture after picture: run it with python -m")
    counts = counts_of(config.used)
    names = entries_of("--models", config.models)
    if len({path_name(name) for name in names}) < len(names):  # of the files of perturbations
        raise LabError("--models: two would be called the same in the run's files; name one by another path")
    accelerator = begin(config.run, config.training)
    splits = read_splits(config.data, config.run.seed, shown=True)
    classes = splits["train"].classes
    if max(counts) > len(splits["train"]):
        raise LabError(f"--used {max(counts)}: there are only {len(splits['train'])} training pictures")
    folders = {name: saved_model("--models", name, classes) for name in names}
    missing = {name: named_config(name, config) for name, folder in folders.items() if folder is None}
    for training in missing.values():
        check_network(training.model, len(classes), config.cache.cache)
    run = Run.start(config, config.run, "attack", accelerator)
    record_splits(run, splits)
    there = {name: folder for name, folder in folders.items() if folder is not None}
    networks = {f"--models {name}": weights_sums(folder) for name, folder in there.items()}
    keep(run, "attack.json", run.options | networks, "an option or a network")
    there |= fit_beside(missing, run, accelerator, splits)
    clock["trained"] = time.perf_counter()
    try:
        victims = {name: Victim.of(there[name], splits, config, accelerator.device) for name in names}
        for name, victim in victims.items():
            for count in counts:
                victim.perturbations[count] = perturbation(run, config, name, victim, count)
        clock["perturbed"] = time.perf_counter()
        finish(run, config, splits, victims, clock)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was found is saved: go on with --resume {run.path}") from None
    accelerator.end_training()


def counts_of(used: str) -> list[int]:
    """Reads the numbers of pictures in --used, each once, growing.

    Raises:
        LabError: one is no number above 0.
    """
    parts = [part.strip() for part in used.split(",") if part.strip()]
    # No data set has a billion pictures, and Python reads no number of 5,000 digits.
    if not parts or not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise LabError(f"--used {used!r}: must be numbers above 0 with commas between, such as 50,100,200")
    return sorted({int(part) for part in parts})


@dataclass
class Victim:
    """A network under attack.

    Attributes:
        model: takes levels.
        used: the training pictures that perturbations are made from, as bytes (pictures, 3, size, size).
        test: the test pictures, as bytes.
        labels: their true classes.
        predicted: the classes that the network predicts for them.
        radius: of the ball that its perturbation lies in.
        perturbations: (3, size, size) by number of pictures used.
    """

    model: OnLevels
    used: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor
    radius: float
    perturbations: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, splits: Splits, config: AttackConfig, device: torch.device) -> "Victim":
        """Reads a saved network, and at its size as many training pictures as are used and all test pictures.

        Raises:
            LabError: it cannot be read.
        """
        network, count = load_model(folder).to(device), max(counts_of(config.used))
        transform = saved_transform(network)
        model = OnLevels(network, transform.normalised, transform.size)
        train, test = splits["train"], splits["test"]
        order = np.random.default_rng(config.run.seed).permutation(len(train))[:count]
        used = Tensors(train, transform).levels(0, order.tolist()).to(device)
        shown = Tensors(test, transform).levels(0, range(len(test))).to(device)
        labels = torch.from_numpy(test.labels).to(device)
        radius = config.radius or NORMS[config.norm].radius(transform.size)
        return cls(model, used, shown, labels, predicted_classes(model, shown), radius)

    @property
    def strongest(self) -> torch.Tensor:
        """The perturbation made from the most pictures."""
        return self.perturbations[max(self.perturbations)]

    def fooled(self, change: torch.Tensor) -> float:
        """Measures the fooling rate of a change on the test pictures."""
        return fooling_rate(self.predicted, predicted_classes(self.model, self.test, change))


def perturbation(run: Run, config: AttackConfig, name: str, victim: Victim, count: int) -> torch.Tensor:
    """Finds the perturbation (3, size, size) made from the first `count` pictures, or reads it from the run."""
    file = run.path / "perturbations" / f"{path_name(name)}-{count}.safetensors"
    if file.exists():
        known = read_weights(file, "--resume").get("perturbation")
        if known is None or known.shape != victim.used.shape[1:] or not known.isfinite().all():
            raise LabError(f"--resume {file}: is no perturbation of {name}; delete it, and it is made again")
        return known.float().to(victim.used.device)

    with ProgressLine(f"{name}, {count} pictures", config.passes * count) as line:

        def each(order: Sequence[int]) -> Iterator[int]:
            for place in order:
                yield place
                line.advance()

        found = universal_perturbation(
            victim.model,
            victim.used[:count],
            config.norm,
            victim.radius,
            config.wanted,
            config.passes,
            config.run.seed,
            each,
        )
    file.parent.mkdir(exist_ok=True)
    part = Path(f"{file}.part")
    save_file({"perturbation": found.cpu().contiguous()}, part)
    part.replace(file)  # whole or not at all: a resumed run trusts it
    return found


def finish(
    run: Run,
    config: AttackConfig,
    splits: Splits,
    victims: Mapping[str, Victim],
    clock: Mapping[str, float],
) -> None:
    """Measures everything on the test pictures, writes results.json and the report, prints the main numbers."""
    methods = {name: fooling_by_method(victim, config.norm, config.run.seed) for name, victim in victims.items()}
    by_count = {name: fooling_by_count(victim) for name, victim in victims.items()}
    transfer = {
        one: {two: v.fooled(moved(victims[one], v, config.norm)) for two, v in victims.items()} for one in victims
    }
    for name, found in methods.items():
        console.print(f"{name}: " + "  ".join(f"{method} {rate:.3f}" for method, rate in found.items()))
    print(f"perturbations: {run.path / 'perturbations'}")

    def page() -> tuple[str, list[Section]]:
        rates = ", ".join(f"{name} {found[UNIVERSAL]:.0%}" for name, found in methods.items())
        summary = f"One perturbation changes the prediction of this share of unseen test pictures: {rates}."
        return summary, [
            numbers_section(victims, methods, NORMS[config.norm].symbol),
            count_section(run, by_count),
            transfer_section(transfer),
            *[pictures_section(name, victim, splits["test"]) for name, victim in victims.items()],
            asked_section(config),
            Section("Cost", [Table(("until", "seconds"), [*seconds_between(clock).items()])]),
            rerun_section(run),
        ]

    results = {"fooling rate": methods, "by pictures used": by_count, "transfer": transfer}
    write_results(
        run, {"config": to_plain(config), **results}, config.run.report, "Universal adversarial perturbations", page
    )


def fooling_by_method(victim: Victim, norm: str, seed: int) -> dict[str, float]:
    """Measures fooling rates on the test pictures at one radius: of the perturbation and of its rivals."""
    known = predicted_classes(victim.model, victim.used)
    one_step = universal_fast_gradient(victim.model, victim.used, known, norm, victim.radius)
    noise = torch.randn(victim.used.shape[1:], generator=torch.Generator().manual_seed(seed))
    noise = victim.radius * NORMS[norm].steepest(noise.to(victim.used.device)[None])[0]
    own = []
    for some, classes in zip(
        victim.test.split(EVALUATION_BATCH), victim.predicted.split(EVALUATION_BATCH), strict=True
    ):
        changes = fast_gradient(victim.model, some, classes, norm, victim.radius)
        own.append(predicted_classes(victim.model, some, changes))
    return {
        UNIVERSAL: victim.fooled(victim.strongest),
        "universal, one FGSM step": victim.fooled(one_step),
        "random noise": victim.fooled(noise),
        "FGSM, each picture its own": fooling_rate(victim.predicted, torch.cat(own)),
    }


def fooling_by_count(victim: Victim) -> list[dict[str, float]]:
    """Measures fooling rates on the pictures used and on the test pictures, for each number of pictures used."""
    before = predicted_classes(victim.model, victim.used)
    return [
        {
            "pictures": count,
            "on those used": fooling_rate(before[:count], predicted_classes(victim.model, victim.used[:count], change)),
            "on the test pictures": victim.fooled(change),
        }
        for count, change in victim.perturbations.items()
    ]


def moved(source: Victim, target: Victim, norm: str) -> torch.Tensor:
    """Brings the perturbation of one network to the picture size of another, within the other's ball."""
    change, size = source.strongest, target.model.size
    if source.model.size != size:
        change = F.interpolate(change[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    return projected(change, norm, target.radius)


def numbers_section(victims: Mapping[str, Victim], methods: Mapping[str, Mapping[str, float]], symbol: str) -> Section:
    """Shows the fooling rates by method, and what is left of the accuracy."""
    accuracies = []
    for name, victim in victims.items():
        after = predicted_classes(victim.model, victim.test, victim.strongest)
        both = [float((classes == victim.labels).float().mean()) for classes in (victim.predicted, after)]
        accuracies.append((name, *both, f"{victim.radius:g}"))
    rates = [(method, *(found[method] for found in methods.values())) for method in next(iter(methods.values()))]
    text = (
        f"Fooling rate: the share of test pictures whose prediction changes, right or wrong. All changes lie in the "
        f"{symbol} ball of the radius, on levels of 0 to 255. The last row is no universal change: each picture gets "
        "its own."
    )
    columns = ("network", "test accuracy", "with the perturbation", "radius")
    return Section("Numbers", [Table(columns, accuracies), Table(("fooling rate", *victims), rates), Text(text)])


def count_section(run: Run, by_count: Mapping[str, Sequence[Mapping[str, float]]]) -> Section:
    """Shows the fooling rate by number of pictures used."""
    curves = {
        name: ([row["pictures"] for row in rows], [row["on the test pictures"] for row in rows])
        for name, rows in by_count.items()
    }
    figure = save_figure(run, "by-count", curve_figure(curves, "training pictures used", "fooling rate, test pictures"))
    table = [(name, *row.values()) for name, rows in by_count.items() for row in rows]
    columns = ("network", "pictures used", "on those used", "on the test pictures")
    return Section(
        "How many pictures it takes",
        [Figure(figure, "Fooling rate on pictures that the perturbation was not made from."), Table(columns, table)],
    )


def transfer_section(transfer: Mapping[str, Mapping[str, float]]) -> Section:
    """Shows how well each network's perturbation fools the others."""
    rows = [(name, *found.values()) for name, found in transfer.items()]
    caption = "Fooling rate on the test pictures: made for the network on the left, tried on the one above."
    return Section("Transfer", [Table(("made for", *transfer), rows, caption)])


def pictures_section(name: str, victim: Victim, test: LabelledPictures) -> Section:
    """Shows the perturbation, pictures that it fools, and the classes that a fooled network tends to predict."""
    change = victim.strongest
    after = predicted_classes(victim.model, victim.test, change)
    places = torch.nonzero(after != victim.predicted)[:, 0].tolist()
    visible = 127.5 + change * (127.5 / change.abs().max().clamp(min=1e-6))  # its largest change to black or white
    shown: list[tuple[Image.Image, str]] = [(_image(visible), f"the perturbation, ±{change.abs().max():.1f} levels")]
    for place in places[:SHOWN]:
        line = f"{test.classes[victim.predicted[place]]} → {test.classes[after[place]]}"
        shown.append((_pair(victim.test[place], victim.test[place] + change), line))
    blocks: list[Any] = [
        Gallery(shown, "The perturbation, its contrast stretched; then test pictures before and after, not stretched."),
    ]
    if places:
        counts = torch.bincount(after[places], minlength=len(test.classes))
        most = counts.argsort(descending=True)[:3].tolist()
        listed = ", ".join(f"{test.classes[place]} {int(counts[place])}" for place in most if counts[place])
        said = f"{len(places)} of {len(test)} test pictures are fooled; the most frequent predictions then: {listed}."
        blocks.append(Text(said))
    return Section(f"What fools {name}", blocks)


def _image(levels: torch.Tensor) -> Image.Image:
    array = levels.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()  # (height, width, 3)
    return Image.fromarray(array).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)


def _pair(before: torch.Tensor, after: torch.Tensor) -> Image.Image:
    both = Image.new("RGB", (2 * ENLARGED + 4, ENLARGED), "white")
    both.paste(_image(before), (0, 0))
    both.paste(_image(after), (ENLARGED + 4, 0))
    return both
