"""Self-supervised pre-training, side by side with lightly: pictures per second in training, memory of greedy training.

    uv run python benchmarks/pretraining.py                                        # both, on this machine
    uv run python benchmarks/pretraining.py --parts rate --method byol --batch 512 --steps 50 --workers 8
    uv run python benchmarks/pretraining.py --parts worth --method byol --batch 512 --side 16 --data cifar10

`rate` trains the same method, network (ResNet-18 with a 3 × 3 stem), batch and pictures by `zsi_contrastive.pretrain`
and by a loop of lightly's parts as its examples have it (a DataLoader that decodes and transforms, its heads, losses
and momentum). `worth` trains a small network by both for some epochs of all pictures, by the settings of lightly's
CIFAR-10 benchmark, and measures kNN accuracy on the test pictures, by the same code for both. `greedy`
measures the memory of one training step of Greedy InfoMax, module by module, with all modules' graphs kept, and end to
end. On a GPU, bf16 and channels-last are what our command takes; lightly's loop is measured as its examples are, and
with `--their-bf16` with autocast too.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.batchnorm import SplitBatchNorm
from lightly.models.modules import heads
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    SimCLRTransform,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from labs_common.cli import config_from_yaml
from labs_common.data.classes import LabelledPictures, read_pictures
from labs_common.data.images import checked
from labs_common.run import Run, write_atomically
from labs_common.training import make_accelerator
from zsi_contrastive import TINY
from zsi_contrastive.networks import GreedySizes, PatchModules
from zsi_contrastive.ssl.config import EncoderOptions, PretrainConfig
from zsi_contrastive.ssl.data import Pixels
from zsi_contrastive.ssl.evaluate import features_of_splits, scores
from zsi_contrastive.ssl.methods import complete
from zsi_contrastive.ssl.model import Encoder, make_encoder
from zsi_contrastive.ssl.train import fit, make_network

sys.path.append(str(Path(__file__).parents[1]))  # as a script it finds only what is beside it
from benchmarks.memory import held_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIGS = Path(__file__).parents[1] / "packages" / "zsi_contrastive" / "configs"
SIDE = 32
WARM = 3  # steps before those that are timed: libraries choose their ways, workers start


@dataclass
class Options:
    """Compares zsi_contrastive.pretrain with a loop of lightly's parts."""

    parts: tuple[str, ...] = ("rate", "greedy")
    """What to measure: rate, greedy, worth."""
    method: Literal["simclr", "moco", "byol", "dino"] = "simclr"
    """By which method."""
    batch: int = 64
    """Pictures of a step."""
    rounds: int = 3
    """How often each is measured, in turns."""
    steps: int = 6
    """Steps of each that are timed, after three that are not."""
    workers: int = 2
    """Processes that decode and transform for lightly; ours needs none."""
    data: str | None = None
    """CIFAR-10 or other pictures, instead of random ones of its size."""
    side: int = SIDE
    """For worth: pictures are shrunk to this many pixels first."""
    epochs: int = 20
    """For worth."""
    every: int = 2
    """For worth: epochs between measurements."""
    queue: int = 4096
    """Keys that moco compares with."""
    seeds: int = 1
    """For worth: how many, each of both."""
    their_bf16: bool = False
    """Give lightly's loop autocast in bf16 and channels-last as well."""
    compile: bool = False
    """Compile our network."""
    output: Path = Path("benchmarks/results/pretraining.json")
    """Where the figures go."""


def pictures_of(options: Options) -> LabelledPictures:
    """The training pictures, enough for all steps."""
    count = options.batch * (options.steps + WARM)
    if options.data is not None:
        found = checked(read_pictures(options.data).train, "error", False)
        return found.subset(np.arange(count) % len(found))
    levels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    found = LabelledPictures(
        source="random", classes=tuple("0123456789"), labels=labels, contents=list(levels),
        names=[str(n) for n in range(count)],
    )  # fmt: skip
    return checked(found, "error", False)


def ours(options: Options, pictures: LabelledPictures, folder: Path) -> float:
    """Pictures per second of `pretrain` in the steps that are timed, as the run itself records them."""
    asked = PretrainConfig(method=options.method)
    asked.encoder = dataclasses.replace(asked.encoder, backbone="resnet18", stem="small")
    asked.views = dataclasses.replace(asked.views, local_crops=0)
    asked.training = dataclasses.replace(
        asked.training, batch_size=options.batch, epochs=1, optimizer="sgd", save_every=10**9, evaluate_every=10**9,
        compile=options.compile,
    )  # fmt: skip
    config = complete(asked)
    accelerator = make_accelerator(config.training)
    run = Run.start(config, dataclasses.replace(config.run, output=folder / "run", track="none"), "ssl", accelerator)
    splits = {"train": pictures} | dict.fromkeys(("validation", "test"), pictures.subset(range(options.batch)))
    pixels = {name: Pixels(part, SIDE, accelerator.device, False) for name, part in splits.items()}
    fit(config, make_network(config, accelerator), run, accelerator, pixels)
    timed = list(run.lines("timing.jsonl"))[WARM:]
    return sum(line["pictures"] for line in timed) / sum(line["seconds"] for line in timed)


class Transformed(torch.utils.data.Dataset[list[torch.Tensor]]):
    """Pictures through one of lightly's transforms."""

    def __init__(self, pictures: LabelledPictures, transform: Callable[[Image.Image], list[torch.Tensor]]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> list[torch.Tensor]:
        return self.transform(self.pictures.image(place))


# As in its cifar10_benchmark.py.
TRANSFORMS: dict[str, Callable[[int], Any]] = {
    "simclr": lambda side: SimCLRTransform(side, cj_strength=0.5, gaussian_blur=0.0),
    "moco": lambda side: SimCLRTransform(side, cj_strength=0.5, gaussian_blur=0.0),
    "byol": lambda side: BYOLTransform(
        BYOLView1Transform(side, gaussian_blur=0.0), BYOLView2Transform(side, gaussian_blur=0.0)
    ),
    "dino": lambda side: DINOTransform(side, n_local_views=0, gaussian_blur=(0, 0, 0)),
}
HEADS: dict[str, Callable[[int], nn.Module]] = {
    "simclr": lambda width: heads.SimCLRProjectionHead(width, 512, 128),
    "moco": lambda width: heads.MoCoProjectionHead(width, 512, 128),
    "byol": lambda width: heads.BYOLProjectionHead(width, 1024, 256),
    "dino": lambda width: dino_head(width),
}


def dino_head(width: int) -> nn.Module:
    """DINO's head with two layers."""
    head = heads.DINOProjectionHead(width, 2048, 256, 2048, batch_norm=True)
    layers = [(width, 2048, nn.BatchNorm1d(2048), nn.GELU()), (2048, 256, None, None)]
    head.layers = heads.ProjectionHead(layers).layers
    return head


def theirs(options: Options, pictures: LabelledPictures) -> float:
    """Pictures per second of lightly's parts in the steps that are timed."""
    torch.manual_seed(0)
    encoder = make_encoder(EncoderOptions("resnet18", "small", SIDE))
    start = 0.0
    for step in their_steps(options, encoder, pictures, SIDE, 1):
        if step == WARM:
            wait()
            start = time.perf_counter()
    wait()
    return options.batch * options.steps / (time.perf_counter() - start)


def their_steps(
    options: Options, encoder: Encoder, pictures: LabelledPictures, side: int, epochs: int
) -> Iterator[int]:
    """Trains by lightly's parts as its CIFAR-10 benchmark does; yields the number of each step that is done."""
    method = options.method
    student, teacher = (nn.Sequential(it, HEADS[method](encoder.width)).to(DEVICE)
                        for it in (encoder, copy.deepcopy(encoder)))  # fmt: skip
    if method != "dino":  # there the teacher's head begins with its own weights
        teacher.load_state_dict(student.state_dict())
    prediction = heads.BYOLPredictionHead(256, 1024, 256).to(DEVICE) if method == "byol" else nn.Identity()
    deactivate_requires_grad(teacher)
    losses = {"simclr": lambda: NTXentLoss(0.5), "moco": lambda: NTXentLoss(0.1, memory_bank_size=(options.queue, 128)),
              "byol": NegativeCosineSimilarity, "dino": lambda: DINOLoss(2048)}  # fmt: skip
    criterion = losses[method]().to(DEVICE)
    learnt = [*student.parameters(), *prediction.parameters()]
    optimizer = torch.optim.SGD(learnt, 0.06 * options.batch / 128, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = torch.utils.data.DataLoader(
        Transformed(pictures, TRANSFORMS[method](side)), options.batch, shuffle=True, drop_last=True,
        num_workers=options.workers, pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    if options.their_bf16:
        student.to(memory_format=torch.channels_last)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if options.their_bf16 else contextlib.nullcontext()
    batches = itertools.chain.from_iterable(itertools.repeat(loader, epochs))
    for step, (first, second) in enumerate(batches, 1):
        one, two = first.to(DEVICE, non_blocking=True), second.to(DEVICE, non_blocking=True)
        with autocast:
            if method == "simclr":
                loss = criterion(student(one), student(two))
            else:
                update_momentum(student, teacher, 0.99)
                with torch.no_grad():
                    three, four = (
                        shuffled(teacher, view) if method == "moco" else teacher(view) for view in (one, two)
                    )
                five, six = prediction(student(one)), prediction(student(two))
                if method == "dino":
                    loss = criterion([three, four], [five, six], teacher_temp=0.04)
                else:
                    loss = (criterion(five, four) + criterion(six, three)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % len(loader) == 0:
            schedule.step()
        yield step


def shuffled(teacher: nn.Module, view: torch.Tensor) -> torch.Tensor:
    """Asks the teacher in another order, so that its batch norms' parts are others than the student's."""
    view, order = batch_shuffle(view)
    return batch_unshuffle(teacher(view), order)


def split_norms(module: nn.Module, parts: int) -> None:
    """Gives a network without trained weights lightly's split batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm(child.num_features, parts))
        split_norms(child, parts)


def worth(options: Options) -> dict[str, list[float]]:
    """Measures kNN accuracy on test pictures before the training and every few epochs, of both and of every seed."""
    assert options.data is not None, "--data: name CIFAR-10"
    read = read_pictures(options.data)
    assert read.test is not None, "--data: has no test pictures"
    splits = {name: shrunk(checked(part, "error", False), options.side)
              for name, part in (("train", read.train), ("test", read.test))}  # fmt: skip
    accelerator = make_accelerator(PretrainConfig().training)
    pixels = {name: Pixels(part, options.side, accelerator.device, False) for name, part in splits.items()}
    steps = options.every * (len(splits["train"]) // options.batch)
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        config = config_from_yaml(PretrainConfig, CONFIGS / f"cifar10_{options.method}.yaml")
        config.encoder = EncoderOptions(TINY, side=options.side)
        config.run.seed, config.own.queue = seed, options.queue
        rate = 0.06 * options.batch / 128
        config.training = dataclasses.replace(
            config.training, epochs=options.epochs, batch_size=options.batch, learning_rate=rate, evaluate_every=steps,
            save_every=10**9,
        )  # fmt: skip
        config = complete(config)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            kept = dataclasses.replace(config.run, output=Path(folder) / "run", track="none")
            run = Run.start(config, kept, "ssl", accelerator)
            fit(config, make_network(config, accelerator), run, accelerator, pixels)
            found[f"ours, {seed}"] = [line["test/knn"] for line in run.lines("metrics.jsonl") if "test/knn" in line]
        found[f"ours, {seed}, seconds"] = [time.perf_counter() - begun]
        begun = time.perf_counter()
        torch.manual_seed(seed)
        encoder = make_encoder(config.encoder)
        if options.method == "moco":
            split_norms(encoder, config.own.norm_splits)
        encoder.to(DEVICE)

        def accuracy(encoder: Encoder = encoder, config: PretrainConfig = config) -> float:
            features = features_of_splits(encoder, pixels, options.side, config.measure.bank, accelerator)
            return scores(features, config.measure)["test/knn"]

        curve = found[f"lightly, {seed}"] = [accuracy()]
        for step in their_steps(options, encoder, splits["train"], options.side, options.epochs):
            if step % steps == 0:
                curve.append(accuracy())
                print(f"lightly, step {step}: {curve[-1]:.4f}", flush=True)
        found[f"lightly, {seed}, seconds"] = [time.perf_counter() - begun]
    return found


def shrunk(pictures: LabelledPictures, side: int) -> LabelledPictures:
    """The same pictures at `side` pixels, so that both crop from the same."""
    levels = [np.asarray(pictures.image(place).resize((side, side), Image.Resampling.BICUBIC))
              for place in range(len(pictures))]  # fmt: skip
    return dataclasses.replace(pictures, contents=levels)


def rates(options: Options) -> dict[str, float]:
    """Pictures per second of both (medians over the rounds), and their ratio."""
    pictures = pictures_of(options)
    found: dict[str, list[float]] = {"ours": [], "lightly": []}
    for _ in range(options.rounds):
        # Not step by step in turns: lightly's workers would go on during our steps.
        with tempfile.TemporaryDirectory() as folder:
            found["ours"].append(ours(options, pictures, Path(folder)))
        found["lightly"].append(theirs(options, pictures))
    rate = {name: statistics.median(seen) for name, seen in found.items()}
    return {f"{name}, pictures/s": value for name, value in rate.items()} | {"ratio": rate["ours"] / rate["lightly"]}


def wait() -> None:
    """Until the device has done everything."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def greedy_memory(batch: int = 8) -> dict[str, float]:
    """MiB of activations that autograd holds in a step of the paper's network on 64 × 64 pictures."""
    pictures = torch.randn(batch, 3, 64, 64, device=DEVICE)
    found = {}
    ways = {"module by module": {}, "all modules' graphs kept": {"early": False}, "end to end": {"isolated": False}}
    for name, way in ways.items():
        torch.manual_seed(0)
        network = PatchModules(GreedySizes(), **way).to(DEVICE)
        found[name] = held_bytes(partial(summed_loss, network, pictures)) / 2**20
    return found


def summed_loss(network: PatchModules, pictures: torch.Tensor) -> torch.Tensor:
    """The loss of one step."""
    return network(pictures)[0].sum()


def main() -> None:
    """Measures, prints a table and writes the figures."""
    options = tyro.cli(Options)
    table = Table("what", "figure")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
                               "method": options.method, "batch": options.batch}  # fmt: skip
    if "rate" in options.parts:
        figures |= rates(options)
    if "worth" in options.parts:
        figures |= worth(options)
    if "greedy" in options.parts:
        figures |= {f"MiB, {name}": value for name, value in greedy_memory().items()}
    for name, value in figures.items():
        said = [f"{number:.4g}" for number in (value if isinstance(value, list) else [value])
                if isinstance(number, float)]  # fmt: skip
        table.add_row(name, " ".join(said) or str(value))
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
