"""Time of an epoch when one block trains: ours (frozen front cached) against a plain loop and Hugging Face's Trainer.

    uv run python benchmarks/vit_transfer.py                          # ViT-S/16 and ResNet-50 at 224 pixels
    uv run python benchmarks/vit_transfer.py --models resnet50 --pictures 512 --epochs 3

Each trains the same random network's last block and head on the same drawn pictures in the same order, in a process of
its own with an empty cache; the others send every picture through the frozen layers in every epoch. Losses are
compared step by step. An epoch's time is that of its training steps; the whole run's also has making the network,
filling the cache and validating after each epoch.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, Sampler

# This file has the lab's name: the lab is what `import vit_transfer` shall find.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

from labs_common.data.classes import LabelledPictures  # noqa: E402
from labs_common.device import peak_memory  # noqa: E402
from labs_common.options import RunOptions  # noqa: E402
from labs_common.run import Run, write_atomically  # noqa: E402
from labs_common.scenes.files import write_parquet  # noqa: E402
from labs_common.training import make_accelerator  # noqa: E402
from vit_transfer.config import DataOptions, ModelOptions, PictureTrainingOptions, TrainConfig, complete  # noqa: E402
from vit_transfer.data import Tensors, read_splits, transform_of  # noqa: E402
from vit_transfer.model import Transfer, create, input_size, unfreeze  # noqa: E402

BATCH, RATE, DECAY = 32, 1e-3, 0.01


@dataclass
class Options:
    """Compares trainers side by side and prints ratios."""

    models: tuple[str, ...] = ("vit_small_patch16_224", "resnet50")
    """Networks, of timm."""
    pictures: int = 256
    """Training pictures."""
    epochs: int = 5
    """Passes over them."""
    workers: int = 2
    """Processes that decode for the others; ours has threads."""
    output: Path = Path("benchmarks/results/vit_transfer.json")
    """Where the figures go."""
    worker: str | None = None
    """Used by the benchmark itself: run one trainer in this process."""
    data: Path | None = None
    """Used by the benchmark itself: the drawn pictures."""


def main() -> None:
    """Runs every trainer in a process of its own, prints the table and writes the figures."""
    options = tyro.cli(Options)
    if options.worker is not None:
        print(json.dumps(TRAINERS[options.worker](options)))
        return
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        first, second = options.pictures, options.pictures + 64
        write_parquet(data, "texture", {"train": range(first), "validation": range(first, second),
                                        "test": range(second, second + 8)}, side=64)  # fmt: skip
        for model in options.models:
            figures[model] = {}
            for name in TRAINERS:
                command = [sys.executable, __file__, "--worker", name, "--models", model, "--data", str(data),
                           "--pictures", str(options.pictures), "--epochs", str(options.epochs),
                           "--workers", str(options.workers)]  # fmt: skip
                own = os.environ | {"XDG_CACHE_HOME": f"{folder}/{model}"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
                if done.returncode:
                    raise SystemExit(f"{model}, {name}: failed\n{done.stderr[-2000:]}")
                figures[model][name] = json.loads(done.stdout.splitlines()[-1])
                print(f"{model}, {name}: {figures[model][name]['whole']:.1f} s", file=sys.stderr)
            show(model, figures[model])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


def show(model: str, figures: dict[str, Any]) -> None:
    """Prints one network's table: absolute figures, and the others as a ratio to ours."""
    columns = ("trainer", "epoch from 2nd, s", "ours is", "whole run, s", "ours is", "validation accuracy", "peak MiB",
               "losses differ by")  # fmt: skip
    table = Table(*columns, title=model)
    ours = figures["ours"]
    epoch = statistics.median(ours["epochs"][1:])
    for name, row in figures.items():
        its = statistics.median(row["epochs"][1:])
        differ = max(abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True))
        table.add_row(
            name, f"{its:.2f}", f"{its / epoch:.1f} x", f"{row['whole']:.1f}", f"{row['whole'] / ours['whole']:.2f} x",
            f"{row['accuracy']:.3f}", f"{row['peak_memory'] / 2**20:,.0f}", f"{differ:.1e}",
        )  # fmt: skip
    Console(width=140).print(table)
    print(f"cache on disk: {ours['cache_bytes'] / 2**20:,.1f} MiB, {ours['cache_bytes'] / ours['rows']:,.0f} bytes a "
          "picture")  # fmt: skip


def config_of(options: Options) -> TrainConfig:
    """The training that all do."""
    return complete(
        TrainConfig(
            model=ModelOptions(model=options.models[0], pretrained=False),
            data=DataOptions(data=str(options.data)),
            training=PictureTrainingOptions(
                epochs=options.epochs, batch_size=BATCH, learning_rate=RATE, weight_decay=DECAY, schedule="constant",
                warmup=0, clip_norm=0,
            ),
            run=RunOptions(track="none"),
            baselines="no",
        )
    )  # fmt: skip


def ours(options: Options) -> dict[str, Any]:
    """The lab's own loop."""
    from vit_transfer.train import fit

    config = config_of(options)
    accelerator = make_accelerator(config.training)
    splits = read_splits(config.data, 0, shown=False)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", True, resumed=False)
        run.path.mkdir()
        start = time.perf_counter()
        fitted = fit(config, run, accelerator, splits)
        whole = time.perf_counter() - start
        seconds = [line["seconds"] for line in run.lines("timing.jsonl")]
        lines = list(run.lines("metrics.jsonl"))
    steps = len(seconds) // options.epochs
    return {
        "epochs": [sum(seconds[first : first + steps]) for first in range(0, len(seconds), steps)],
        "whole": whole,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "accuracy": [line["validation/accuracy"] for line in lines if "validation/accuracy" in line][-1],
        "peak_memory": peak_memory(),
        "cache_bytes": fitted.cache_bytes,
        "rows": len(splits["train"]) + len(splits["validation"]),
    }


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """A split as a data set of tensors."""

    def __init__(self, pictures: LabelledPictures, tensors: Tensors) -> None:
        self.pictures, self.tensors = pictures, tensors

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return self.tensors.batch(0, [place])[0], int(self.pictures.labels[place])


class SameOrder(Sampler[int]):
    """The order in which the lab's own loop takes the pictures, epoch by epoch."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([0, self.epoch]).permutation(self.count).tolist()
        self.epoch += 1


def made(options: Options) -> tuple[torch.nn.Module, dict[str, Pictures]]:
    """The same network, uncut, with its frozen part in evaluation mode; and the data sets."""
    config = config_of(options)
    splits = read_splits(config.data, 0, shown=False)
    set_seed(0)
    network = create(config.model, len(splits["train"].classes))
    trained = unfreeze(network, config.model.unfreeze, config.model.block)
    model = Transfer(config.model.model, network, input_size(network), trained, cut=None)
    shape = transform_of(network, model.size, config.data.augment, 0)
    return model, {name: Pictures(part, Tensors(part, shape)) for name, part in splits.items()}


def plain_loop(options: Options) -> dict[str, Any]:
    """A loop as timm's: every picture through the whole network in every epoch."""
    start = time.perf_counter()
    model, data = made(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=DECAY)
    loader = DataLoader(data["train"], BATCH, sampler=SameOrder(len(data["train"])), num_workers=options.workers)
    held_out = DataLoader(data["validation"], BATCH, num_workers=options.workers)
    epochs, losses = [], []
    for _ in range(options.epochs):
        begin = time.perf_counter()
        model.train()
        for images, targets in loader:
            loss = F.cross_entropy(model(images.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        epochs.append(time.perf_counter() - begin)
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in held_out)
    return {
        "epochs": epochs, "whole": time.perf_counter() - start, "losses": losses,
        "accuracy": right / len(data["validation"]), "peak_memory": peak_memory(),
    }  # fmt: skip


def hugging_face(options: Options) -> dict[str, Any]:
    """Hugging Face's Trainer on the same network."""
    from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

    start = time.perf_counter()
    model, data = made(options)

    class ForTrainer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.inner(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Ours(Trainer):
        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SameOrder(len(data["train"]))

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.epochs: list[float] = []
            self.losses: list[float] = []

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.epochs.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                self.losses.append(float(given["logs"]["loss"]))

    def collate(rows: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack([image for image, _ in rows]), "labels": torch.tensor([y for _, y in rows])}

    def accuracy(found: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((np.asarray(found.predictions).argmax(1) == found.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=options.epochs, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH, learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="constant",
            max_grad_norm=0.0, logging_steps=1, eval_strategy="epoch", save_strategy="no", report_to="none",
            remove_unused_columns=False, dataloader_num_workers=options.workers, disable_tqdm=True,
            label_names=["labels"], use_cpu=not torch.cuda.is_available(), bf16=False,
        )  # fmt: skip
        clock = Clock()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        trainer = Ours(
            model=ForTrainer(), args=arguments, train_dataset=data["train"], eval_dataset=data["validation"],
            data_collator=collate, compute_metrics=accuracy, callbacks=[clock], optimizers=(optimizer, constant),
        )  # fmt: skip
        trainer.train()
        found = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    return {
        "epochs": clock.epochs, "whole": time.perf_counter() - start, "losses": clock.losses, "accuracy": found[-1],
        "peak_memory": peak_memory(),
    }  # fmt: skip


TRAINERS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "ours": ours,
    "plain loop": plain_loop,
    "Hugging Face Trainer": hugging_face,
}

if __name__ == "__main__":
    main()
