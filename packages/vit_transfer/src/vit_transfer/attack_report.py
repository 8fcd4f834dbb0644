"""What the perturbations do: fooling rates, their transfer between networks, and the pictures themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from labs_common.cli import to_plain
from labs_common.data import LabelledPictures
from labs_common.progress import console
from labs_common.report import (
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    asked_section,
    curve_figure,
    rerun_section,
    save_figure,
    write_report,
)
from labs_common.run import Run, seconds_between
from vit_transfer.attacks import (
    EVALUATION_BATCH,
    OnLevels,
    fast_gradient,
    fooling_rate,
    projected,
    said_of,
    universal_fast_gradient,
)
from vit_transfer.config import AttackConfig, ModelOptions
from vit_transfer.data import Tensors, transform_of
from vit_transfer.export import load_exported
from vit_transfer.model import input_size

PAPER_RADIUS = {"linf": 10.0, "l2": 2000.0}
PAPER_SIDE = 224
SHOWN, ENLARGED = 6, 160


@dataclass
class Victim:
    """A network under attack.

    Attributes:
        model: takes levels.
        used: the training pictures that perturbations are made from, as bytes (pictures, 3, size, size).
        test: the test pictures, as bytes.
        labels: their true classes.
        said: what the network says of them.
        radius: of the ball that its perturbation lies in.
        perturbations: (3, size, size) by number of pictures used.
    """

    model: OnLevels
    used: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    said: torch.Tensor
    radius: float
    perturbations: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        splits: Mapping[str, LabelledPictures],
        config: AttackConfig,
        count: int,
        device: torch.device,
    ) -> "Victim":
        """Reads an exported network, and at its size `count` training pictures and all test pictures.

        Raises:
            LabError: it cannot be read.
        """
        network = load_exported(folder).to(device)
        size = input_size(network, ModelOptions())
        transform = transform_of(network, size, config.data, config.run.seed)
        model = OnLevels(network, transform.normalised, size)
        train, test = splits["train"], splits["test"]
        order = np.random.default_rng(config.run.seed).permutation(len(train))[:count]
        used = Tensors(train, transform).levels(0, order.tolist()).to(device)
        shown = Tensors(test, transform).levels(0, range(len(test))).to(device)
        scale = size / PAPER_SIDE if config.norm == "l2" else 1.0
        radius = config.radius or PAPER_RADIUS[config.norm] * scale
        return cls(model, used, shown, torch.from_numpy(test.labels).to(device), said_of(model, shown), radius)

    @property
    def strongest(self) -> torch.Tensor:
        """The perturbation made from the most pictures."""
        return self.perturbations[max(self.perturbations)]

    def fooled(self, change: torch.Tensor) -> float:
        """The fooling rate of a change on the test pictures."""
        return fooling_rate(self.said, said_of(self.model, self.test, change))


def finish_attack_report(
    run: Run,
    config: AttackConfig,
    splits: Mapping[str, LabelledPictures],
    victims: Mapping[str, Victim],
    clock: Mapping[str, float],
) -> None:
    """Measures everything on the test pictures, writes results.json and the report, prints the main numbers."""
    methods = {name: fooling_by_method(victim, config) for name, victim in victims.items()}
    by_count = {name: fooling_by_count(victim) for name, victim in victims.items()}
    transfer = {one: {two: v.fooled(moved(victims[one], v, config)) for two, v in victims.items()} for one in victims}
    run.save_json(
        "results.json",
        {"config": to_plain(config), "fooling rate": methods, "by pictures used": by_count, "transfer": transfer},
    )
    for name, found in methods.items():
        console.print(f"{name}: " + "  ".join(f"{method} {rate:.3f}" for method, rate in found.items()))
    print(f"perturbations: {run.path / 'perturbations'}")
    if not config.run.report:
        return
    rates = ", ".join(f"{name} {found[UNIVERSAL]:.0%}" for name, found in methods.items())
    summary = f"One perturbation changes what is said of this share of unseen test pictures: {rates}."
    seconds = list(seconds_between(clock).items())
    sections = [
        numbers_section(victims, methods, config),
        count_section(run, by_count),
        transfer_section(transfer),
        *[pictures_section(name, victim, splits["test"]) for name, victim in victims.items()],
        asked_section(config),
        Section("Cost", [Table(("until", "seconds"), seconds)]),
        rerun_section(run),
    ]
    path = write_report(run, "Universal adversarial perturbations", summary, sections)
    print(f"report: {path}")


UNIVERSAL = "universal, DeepFool inside"


def fooling_by_method(victim: Victim, config: AttackConfig) -> dict[str, float]:
    """Fooling rates on the test pictures at the same radius: of the perturbation and of what it is compared with."""
    said = said_of(victim.model, victim.used)
    one_step = universal_fast_gradient(victim.model, victim.used, said, config.norm, victim.radius)
    generator = torch.Generator().manual_seed(config.run.seed)
    noise = torch.randn(victim.used.shape[1:], generator=generator).to(victim.used.device)
    signs = noise.sign() * victim.radius if config.norm == "linf" else noise * victim.radius / noise.norm()
    own = []
    for some, known in zip(victim.test.split(EVALUATION_BATCH), victim.said.split(EVALUATION_BATCH), strict=True):
        changes = fast_gradient(victim.model, some, known, config.norm, victim.radius)
        own.append(said_of(victim.model, some, changes))
    return {
        UNIVERSAL: victim.fooled(victim.strongest),
        "universal, one FGSM step": victim.fooled(one_step),
        "random noise": victim.fooled(signs),
        "FGSM, each picture its own": fooling_rate(victim.said, torch.cat(own)),
    }


def fooling_by_count(victim: Victim) -> list[dict[str, float]]:
    """Fooling rates on the pictures used and on the test pictures, for each number of pictures used."""
    before = said_of(victim.model, victim.used)
    return [
        {
            "pictures": count,
            "on those used": fooling_rate(before[:count], said_of(victim.model, victim.used[:count], change)),
            "on the test pictures": victim.fooled(change),
        }
        for count, change in victim.perturbations.items()
    ]


def moved(source: Victim, target: Victim, config: AttackConfig) -> torch.Tensor:
    """The perturbation of one network at the picture size of another, within the other's ball."""
    change, size = source.strongest, target.model.size
    if source.model.size != size:
        change = F.interpolate(change[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    return projected(change, config.norm, target.radius)


def numbers_section(
    victims: Mapping[str, Victim], methods: Mapping[str, Mapping[str, float]], config: AttackConfig
) -> Section:
    """Fooling rates by method, and what is left of the accuracy."""
    accuracies = []
    for name, victim in victims.items():
        after = said_of(victim.model, victim.test, victim.strongest)
        both = [float((said == victim.labels).float().mean()) for said in (victim.said, after)]
        accuracies.append((name, *both, f"{victim.radius:g}"))
    rates = [(method, *(found[method] for found in methods.values())) for method in next(iter(methods.values()))]
    text = (
        f"Fooling rate: the share of test pictures of which something else is said, right or wrong. All changes lie in "
        f"the {'ℓ∞' if config.norm == 'linf' else 'ℓ2'} ball of the radius, on levels of 0 to 255. The last row is "
        "no universal change: each picture gets its own."
    )
    columns = ("network", "test accuracy", "with the perturbation", "radius")
    return Section("Numbers", [Table(columns, accuracies), Table(("fooling rate", *victims), rates), Text(text)])


def count_section(run: Run, by_count: Mapping[str, Sequence[Mapping[str, float]]]) -> Section:
    """Fooling rate by number of pictures used."""
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
    """Which network's perturbation fools which."""
    rows = [(name, *found.values()) for name, found in transfer.items()]
    caption = "Fooling rate on the test pictures: made for the network on the left, tried on the one above."
    return Section("Transfer", [Table(("made for", *transfer), rows, caption)])


def pictures_section(name: str, victim: Victim, test: LabelledPictures) -> Section:
    """The perturbation, enlarged in contrast; pictures that it fools; and what a fooled network tends to say."""
    change = victim.strongest
    after = said_of(victim.model, victim.test, change)
    places = torch.nonzero(after != victim.said)[:, 0].tolist()
    visible = 127.5 + change * (127.5 / change.abs().max().clamp(min=1e-6))
    shown: list[tuple[Image.Image, str]] = [(_image(visible), f"the perturbation, ±{change.abs().max():.1f} levels")]
    for place in places[:SHOWN]:
        line = f"{test.classes[victim.said[place]]} → {test.classes[after[place]]}"
        shown.append((_pair(victim.test[place], victim.test[place] + change), line))
    counts = torch.bincount(after[places], minlength=len(test.classes)) if places else torch.zeros(1)
    blocks: list[Any] = [
        Gallery(shown, "The perturbation, its contrast stretched; then test pictures before and after, not stretched."),
    ]
    if places:
        most = counts.argsort(descending=True)[:3].tolist()
        said = ", ".join(f"{test.classes[place]} {int(counts[place])}" for place in most if counts[place])
        blocks.append(Text(f"{len(places)} of {len(test)} test pictures are fooled; most are then called: {said}."))
    return Section(f"What fools {name}", blocks)


def _image(levels: torch.Tensor) -> Image.Image:
    array = levels.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array).resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST)


def _pair(before: torch.Tensor, after: torch.Tensor) -> Image.Image:
    both = Image.new("RGB", (2 * ENLARGED + 4, ENLARGED), "white")
    both.paste(_image(before), (0, 0))
    both.paste(_image(after), (ENLARGED + 4, 0))
    return both
