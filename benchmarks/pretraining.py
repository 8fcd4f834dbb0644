"""Self-supervised pre-training, side by side with lightly: pictures per second in training, memory of greedy training.

    uv run python benchmarks/pretraining.py                                        # both, on this machine
    uv run python benchmarks/pretraining.py --parts rate --method byol --batch 512 --steps 50 --workers 8

`rate` trains the same method, network (ResNet-18 with a 3 × 3 stem), batch and pictures by `zsi_contrastive.pretrain`
and by a loop of lightly's parts as its examples have it (a DataLoader that decodes and transforms, its heads, losses
and momentum). `greedy` measures the memory of one training step of Greedy InfoMax, module by module, with all
modules' graphs kept, and end to end. On a GPU, bf16 and channels-last are what our command takes; lightly's loop is
measured as its examples are, and with `--their-bf16` with autocast too.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    MoCoV2Transform,
    SimCLRTransform,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from labs_common.data.classes import LabelledPictures, read_pictures
from labs_common.data.images import checked
from labs_common.run import Run, write_atomically
from labs_common.training import make_accelerator
from zsi_contrastive.networks import GreedySizes, PatchModules
from zsi_contrastive.ssl.config import EncoderOptions, PretrainConfig
from zsi_contrastive.ssl.data import Pixels
from zsi_contrastive.ssl.methods import complete
from zsi_contrastive.ssl.model import make_encoder
from zsi_contrastive.ssl.train import fit, make_network

sys.path.append(str(Path(__file__).parents[1]))  # as a script it finds only what is beside it
from benchmarks.memory import held_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIDE, WIDTH = 32, 512
WARM = 3  # steps before those that are timed: libraries choose their ways, workers start


@dataclass
class Options:
    """Compares zsi_contrastive.pretrain with a loop of lightly's parts."""

    parts: tuple[str, ...] = ("rate", "greedy")
    """What to measure."""
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


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "simclr": lambda: SimCLRTransform(SIDE, cj_strength=0.5, gaussian_blur=0.0),
    "moco": lambda: MoCoV2Transform(SIDE, cj_strength=0.5, gaussian_blur=0.0),
    "byol": lambda: BYOLTransform(
        BYOLView1Transform(SIDE, gaussian_blur=0.0), BYOLView2Transform(SIDE, gaussian_blur=0.0)
    ),
    "dino": lambda: DINOTransform(SIDE, (0.14, 1.0), n_local_views=0, gaussian_blur=(0, 0, 0), solarization_prob=0.0),
}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "simclr": lambda: heads.SimCLRProjectionHead(WIDTH, 512, 128),
    "moco": lambda: heads.MoCoProjectionHead(WIDTH, 512, 128),
    "byol": lambda: heads.BYOLProjectionHead(WIDTH, 1024, 256),
    "dino": lambda: heads.DINOProjectionHead(WIDTH, 2048, 256, 2048, batch_norm=True),
}


def theirs(options: Options, pictures: LabelledPictures) -> float:
    """Pictures per second of lightly's parts in the steps that are timed."""
    torch.manual_seed(0)
    method = options.method
    network = EncoderOptions("resnet18", "small", SIDE)
    student, teacher = (nn.Sequential(make_encoder(network), HEADS[method]()).to(DEVICE) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    prediction = heads.BYOLPredictionHead(256, 1024, 256).to(DEVICE) if method == "byol" else nn.Identity()
    deactivate_requires_grad(teacher)
    losses = {"simclr": lambda: NTXentLoss(0.5), "moco": lambda: NTXentLoss(0.1, memory_bank_size=(4096, 128)),
              "byol": NegativeCosineSimilarity, "dino": lambda: DINOLoss(2048)}  # fmt: skip
    criterion = losses[method]().to(DEVICE)
    learnt = [*student.parameters(), *prediction.parameters()]
    optimizer = torch.optim.SGD(learnt, 0.06, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Transformed(pictures, TRANSFORMS[method]()), options.batch, shuffle=True, drop_last=True,
        num_workers=options.workers, pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    if options.their_bf16:
        student.to(memory_format=torch.channels_last)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if options.their_bf16 else contextlib.nullcontext()
    start = 0.0
    for step, (first, second) in enumerate(loader, 1):
        one, two = first.to(DEVICE, non_blocking=True), second.to(DEVICE, non_blocking=True)
        with autocast:
            if method == "simclr":
                loss = criterion(student(one), student(two))
            else:
                update_momentum(student, teacher, 0.99)
                with torch.no_grad():
                    three, four = teacher(one), teacher(two)
                five, six = prediction(student(one)), prediction(student(two))
                if method == "dino":
                    loss = criterion([three, four], [five, six], teacher_temp=0.04)
                else:
                    loss = (criterion(five, four) + criterion(six, three)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == WARM:
            wait()
            start = time.perf_counter()
    wait()
    return options.batch * options.steps / (time.perf_counter() - start)


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
    if "greedy" in options.parts:
        figures |= {f"MiB, {name}": value for name, value in greedy_memory().items()}
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
