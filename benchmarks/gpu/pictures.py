"""Pictures: one block on all of CIFAR-10, steps of CLIP and of a ResNet, SimCLR; the linear probe and CLIP's loss."""

import copy
import importlib.util
import json
import pickle
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from benchmarks import clip as clip_benchmark
from benchmarks import pretraining
from benchmarks.gpu.measuring import Setting, Skipped, Stopped, clock, command, separate
from benchmarks.gpu.rows import Row
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from labs_common.device import each_tensor, to_device
from labs_common.fitting import Fitting, channels_last
from labs_common.frozen.cache import CachedRows, Rows
from labs_common.options import Precision, RunOptions
from labs_common.run import Run
from labs_common.steps import ShuffledSteps
from labs_common.training import make_accelerator
from vit_transfer.config import DataOptions, ModelOptions, PictureTrainingOptions, TrainConfig, complete
from vit_transfer.data import Batch, PictureRows, Tensors, boundary_rows, read_splits, training_batches, transform_of
from vit_transfer.model import Transfer, create, transfer
from vit_transfer.train import label_loss

GPU = torch.cuda.is_available()
PRECISION: Precision = "bf16" if GPU else "fp32"


def random_cifar(folder: Path, count: int) -> Path:
    """Writes random pictures as CIFAR-10's authors publish theirs: `count` for training and a fifth of it for the test.

    Their bytes are as many as those of the real ones; nothing can be learnt from them.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [b"%d" % number for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        rows = count // 5
        levels = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
        batch = {b"data": levels, b"labels": [place % 10 for place in range(rows)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    return folder


@dataclass(frozen=True)
class DeviceRows:
    """A frozen front's output that lies in the device's memory."""

    there: torch.Tensor  # (pictures, width)

    def rows(self, view: int, places: Sequence[int]) -> torch.Tensor:
        """Returns the rows of these places; see `labs_common.frozen.cache.Rows`."""
        return self.there.index_select(0, torch.as_tensor(places).to(self.there.device, non_blocking=True))


def block(setting: Setting, folder: Path) -> Iterator[Row]:
    """Trains the last block of a ViT-S/16 on CIFAR-10, its front's rows on the disk's memory map and on the device."""
    name = "tiny-vit" if setting.tiny else "vit_small_patch16_224"
    data = setting.cifar or random_cifar(folder / "cifar", 100 if setting.tiny else 50_000)
    config = complete(TrainConfig(
        ModelOptions(name, pretrained=False),
        DataOptions(data=str(data), limit=100 if setting.tiny else 0),
        training=PictureTrainingOptions(epochs=3, batch_size=32 if setting.tiny else 256, precision=PRECISION,
                                        save_every=10**9, evaluate_every=10**9),
    ))  # fmt: skip
    accelerator = make_accelerator(config.training)
    splits = read_splits(config.data, 0, shown=False)
    pictures = len(splits["train"])
    torch.manual_seed(0)
    network = create(config.model, len(splits["train"].classes)).to(accelerator.device)
    model = transfer(network, config.model, True, accelerator)
    tensors = Tensors(splits["train"], transform_of(network, model.size, "flip", 0))
    began = clock()
    rows = boundary_rows("train", tensors, model, config.cache, 1, accelerator)
    what = f"the last block of {name} on {pictures:,} pictures of {'CIFAR-10' if setting.cifar else 'its size'}"
    yield Row(f"{what}: the front, once", "pictures/s", pictures / (clock() - began))
    host = statistics.median(epochs(config, model, rows.rows, rows.labels, accelerator, folder / "host")[1:])
    yield Row(f"{what}: an epoch, rows on the host", "s", host)
    assert isinstance(rows.rows, CachedRows)
    free, size = torch.cuda.mem_get_info()[0] if GPU else 2**34, rows.rows.bytes_on_disk
    if size > 0.8 * free:
        yield Row(f"{what}: an epoch, rows on the device", "s", None, note=f"skipped: {size / 2**30:.1f} GiB")
        return
    every = torch.cat([rows.rows.rows(0, range(start, min(start + 4096, pictures))).to(accelerator.device)
                       for start in range(0, pictures, 4096)])  # fmt: skip
    there = statistics.median(epochs(config, model, DeviceRows(every), rows.labels, accelerator, folder / "there")[1:])
    yield Row(f"{what}: an epoch, rows on the device", "s", there, "rows on the host", host,
              note=f"{size / 2**30:.2f} GiB")  # fmt: skip


def epochs(
    config: TrainConfig, model: Transfer, rows: Rows, labels: torch.Tensor, accelerator: Accelerator, folder: Path
) -> list[float]:
    """Trains a copy of the model as `vit_transfer.train` does, without evaluations; returns each epoch's seconds."""
    mine, options = copy.deepcopy(model), config.training
    optimizer = torch.optim.AdamW([weight for weight in mine.parameters() if weight.requires_grad], lr=1e-3)
    source = ShuffledSteps(len(labels), options.batch_size, 0, training_batches(PictureRows(rows, labels), 1,
                                                                                accelerator))  # fmt: skip
    fit(config, mine, optimizer, source, accelerator, folder)
    seconds = seconds_of(folder)
    return [sum(seconds[start : start + len(source)]) for start in range(0, len(seconds), len(source))]


def fit(
    config: TrainConfig,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    source: ShuffledSteps,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Does the loop of `vit_transfer.train`."""
    run = Run.start(config, RunOptions(output=folder, track="none"), "benchmark", accelerator)
    fitting = Fitting.start(run, accelerator, model, optimizer, source, config.training, 0, "pictures")
    loss_of = label_loss(0.0)
    for batch in fitting.loop.batches():
        loss, means = loss_of(fitting.model, each_tensor(to_device, batch, accelerator.device))
        shares = {name: float(value) * batch.share for name, value in means.items()}
        fitting.loop.step(loss * batch.share, len(batch.targets), **shares)


def seconds_of(folder: Path) -> list[float]:
    """Reads the time of each step of a run."""
    return [json.loads(line)["seconds"] for line in (folder / "timing.jsonl").read_text().splitlines()]


def resnet(setting: Setting, folder: Path) -> Iterator[Row]:
    """Trains all of a ResNet-50 on pictures that are on the device, by the lab and by timm's own task and scaler."""
    name, side, batch = ("test_resnet", 64, 8) if setting.tiny else ("resnet50", 224, 256)
    steps = 3 if setting.tiny else 30
    mine, its = (separate(work, name, side, batch, steps, folder) for work in (our_resnet, timm_resnet))
    yield Row(f"{name}, all of it trains, {PRECISION}, channels-last, batch {batch}", "pictures/s", mine,
              "timm's training step", its)  # fmt: skip


def pictures_there(side: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes a batch of pictures and labels on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, side, side, generator=generator).to(device, memory_format=torch.channels_last)
    return inputs, torch.randint(10, (batch,), generator=generator).to(device)


def our_resnet(name: str, side: int, batch: int, steps: int, folder: Path) -> float:
    """Returns pictures per second of the lab's loop, from the third step on."""
    training = PictureTrainingOptions(epochs=1, batch_size=batch, precision=PRECISION, save_every=10**9)
    config = complete(TrainConfig(ModelOptions(name, pretrained=False, image_size=side, unfreeze="all"),
                                  training=training))  # fmt: skip
    accelerator = make_accelerator(config.training)
    network = create(config.model, 10).to(accelerator.device)
    model = transfer(network, config.model, False, accelerator)
    channels_last(model, accelerator)
    inputs, targets = pictures_there(side, batch, accelerator.device)
    source = ShuffledSteps(batch * (steps + 2), batch, 0, lambda places, epoch, step: [
        Batch(inputs, targets, 0, places, 1.0)])  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    fit(config, model, optimizer, source, accelerator, folder / "ours")
    return batch * steps / sum(seconds_of(folder / "ours")[2:])


def timm_resnet(name: str, side: int, batch: int, steps: int, folder: Path) -> float:
    """Returns pictures per second of timm's parts in the order of its train.py, from the third step on."""
    device = torch.device("cuda" if GPU else "cpu")
    model = timm.create_model(name, num_classes=10).to(device).to(memory_format=torch.channels_last).train()
    task = ClassificationTask(model, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.01)
    # With bfloat16 timm takes no scaler; its own one does the same steps in float32.
    scaler = None if PRECISION == "bf16" else NativeScaler(device=device.type)
    inputs, targets = pictures_there(side, batch, device)
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            began = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=PRECISION == "bf16"):
            loss = task(inputs, targets)["loss"]
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return batch * steps / (clock() - began)


def clip(setting: Setting, folder: Path) -> Iterator[Row]:
    """Takes steps of CLIP in turn with open_clip's model and loss, the same weights and batches."""
    need("open_clip")
    options = clip_benchmark.Options(steps=1, batch=4, image="test_vit") if setting.tiny else clip_benchmark.Options(
        steps=10, batch=256)  # fmt: skip
    for precision in ("fp32", "bf16") if GPU else ("fp32",):  # a CPU without bf16 takes ten times as long for it
        found = separate(clip_step, options, precision)
        yield Row(f"a step of CLIP, {options.image}, batch {options.batch}, {precision}", "s", found["ours"],
                  "open_clip", found["theirs"], note=f"losses differ by {found['differ']:.1e}")  # fmt: skip


def clip_step(options: clip_benchmark.Options, precision: str) -> dict[str, Any]:
    """Measures both, under the same autocast."""
    bf16 = torch.autocast(clip_benchmark.DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    with bf16:
        return clip_benchmark.step(options)


def simclr(setting: Setting, folder: Path) -> Iterator[Row]:
    """Pre-trains by SimCLR with the lab's command and with a loop of lightly's parts."""
    need("lightly")
    options = pretraining.Options(rounds=1, batch=2, steps=1, workers=0) if setting.tiny else pretraining.Options(
        rounds=1, batch=512, steps=40, workers=12, data=str(setting.cifar) if setting.cifar else None)  # fmt: skip
    for bf16 in (False, True) if GPU else (False,):
        found = separate(pretraining.rates, replace(options, their_bf16=bf16))
        other = "lightly, bf16" if bf16 else "lightly"
        yield Row(f"SimCLR, ResNet-18, batch {options.batch}", "pictures/s", found["ours, pictures/s"], other,
                  found["lightly, pictures/s"])  # fmt: skip


def long(setting: Setting, folder: Path) -> Iterator[Row]:
    """Pre-trains by SimCLR for 200 epochs, or goes on where the last start was stopped.

    Raises:
        Stopped: the time was up; the run was saved.
    """
    run, data = folder / "run", setting.cifar
    if data is None:
        if not setting.tiny:
            raise Skipped("needs CIFAR-10: give it by --cifar")
        data = folder / "cifar"
        if not data.exists():
            random_cifar(data, 100)
    network = ("--batch-size", 8, "--epochs", 2, "--hidden", 16, "--outputs", 12, "--side", 16, "--backbone", "tiny"
               ) if setting.tiny else ("--backbone", "resnet18", "--stem", "small")  # fmt: skip
    asked = ("--resume", run) if (run / "config.yaml").exists() else (
        "--data", data, "--method", "simclr", *network, "--track", "none", "--output", run)  # fmt: skip
    stopped = None
    try:
        command("zsi_contrastive.pretrain", *asked)
    except Stopped as error:
        stopped = error
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    epochs_done = sum(line["pictures"] for line in lines)
    yield Row("SimCLR, ResNet-18: steps so far", "min", seconds / 60, note=f"{len(lines)} steps")
    yield Row("SimCLR, ResNet-18: the whole training", "pictures/s", epochs_done / seconds)
    if stopped is not None:
        raise stopped
    results = json.loads((run / "results.json").read_text())
    yield Row("SimCLR, ResNet-18, 200 epochs: kNN accuracy, test", "", results["test"]["knn"], "random weights",
              results["test"]["knn before"])  # fmt: skip


def probe(setting: Setting, folder: Path) -> Iterator[Row]:
    """Fits a linear layer on features by the batched solve and by scikit-learn: one penalty, and a whole search."""
    options = clip_benchmark.Options(features=400 if setting.tiny else 50_000)
    found = separate(clip_benchmark.probe, options)
    note = f"objectives {found['objectives'][0]:.6f} and {found['objectives'][1]:.6f}"
    size = f"{options.features:,} × {clip_benchmark.WIDTH}"
    yield Row(f"linear probe, {size}", "s", found["ours"], "scikit-learn", found["scikit"], note=note)
    swept = separate(clip_benchmark.sweep, options)
    yield Row(f"the same for {len(clip_benchmark.COARSE)} penalties", "s", swept["ours"], "scikit-learn",
              swept["scikit"])  # fmt: skip


def loss(setting: Setting, folder: Path) -> Iterator[Row]:
    """Computes CLIP's loss and gradient in chunks and by open_clip, each in a process of its own."""
    need("open_clip")
    for rows in (256, 512) if setting.tiny else (16_384, 32_768):
        mine = separate(timed_loss, rows, False)
        try:
            its = separate(timed_loss, rows, True)
        except RuntimeError as error:
            yield Row(f"CLIP's loss, batch {rows:,}: memory", "MiB", mine["bytes"] / 2**20, "open_clip",
                      note=f"failed: {error}")  # fmt: skip
            continue
        yield Row(f"CLIP's loss, batch {rows:,}: memory", "MiB", mine["bytes"] / 2**20, "open_clip",
                  its["bytes"] / 2**20, note=f"losses {mine['loss']:.6f} and {its['loss']:.6f}")  # fmt: skip
        yield Row(f"CLIP's loss, batch {rows:,}: time", "s", mine["seconds"], "open_clip", its["seconds"])


def timed_loss(rows: int, naive: bool) -> dict[str, Any]:
    """Measures bytes at the first time, which no other work has made room for, and seconds at the second."""
    found = clip_benchmark.loss_memory(rows, naive)
    began = time.perf_counter()
    clip_benchmark.loss_memory(rows, naive)
    return found | {"seconds": clock() - began}


def need(library: str) -> None:
    """Makes sure that a peer is installed.

    Raises:
        Skipped: it is not.
    """
    if importlib.util.find_spec(library) is None:
        raise Skipped(f"needs {library}, which is not installed")
