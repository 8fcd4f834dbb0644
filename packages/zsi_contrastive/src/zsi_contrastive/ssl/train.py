"""Learns features from pictures without labels: `accelerate launch -m zsi_contrastive.pretrain --method byol …`."""

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import Lars

from labs_common.checkpoint import SHARDED
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import record_splits
from labs_common.device import expect_fixed_shapes, to_device
from labs_common.errors import LabError, reason_of
from labs_common.fitting import Fitted, Fitting, begin, channels_last, share_batch_norms
from labs_common.launch import main_process_first
from labs_common.plan import print_plan
from labs_common.progress import console
from labs_common.run import Run
from labs_common.training import Loop, total_steps
from zsi_contrastive.ssl.config import PretrainConfig, PretrainTrainingOptions
from zsi_contrastive.ssl.data import Pixels, read_splits, recipes_of, training_steps, views_of
from zsi_contrastive.ssl.evaluate import COLLAPSED, features_of_splits, probe_by_sgd, scores
from zsi_contrastive.ssl.methods import METHODS, Memory, Step, complete, measured
from zsi_contrastive.ssl.model import DinoHead, Learner, encoder_of, features_of
from zsi_contrastive.ssl.report import finish_report
from zsi_contrastive.ssl.saved import save_encoder

EVALUATIONS = 12  # of a run, by default: enough points for a curve
MOMENTUM = 0.9  # of SGD and LARS, as in all of the papers


def train(config: PretrainConfig) -> None:
    """Walks the road: pictures, network, training, what its features are worth, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    if config.plan.plan:
        print_needs(config)
        return
    accelerator = begin(config.run, config.training)
    main = accelerator.is_main_process
    network = make_network(config, accelerator)
    with main_process_first(accelerator):
        splits = read_splits(config.data, config.run.seed, main)
    check_pictures(config, splits)
    run = Run.start(config, config.run, f"{config.method}-{config.encoder.backbone}", accelerator)
    record_splits(run, splits)
    pixels = {name: Pixels(part, config.encoder.side, accelerator.device, main) for name, part in splits.items()}
    learnt, fitted, teacher_tensors = fit(config, network, run, accelerator, pixels)
    encoder, side, measure = encoder_of(learnt), config.encoder.side, config.measure
    features = features_of_splits(encoder, pixels, side, measure.bank, accelerator, shown=True)
    more: dict[str, float] = {}
    if measure.projected and isinstance(learnt, Learner):
        projection = torch.nn.Sequential(encoder, learnt.projection)
        more["knn projected"] = scores(
            features_of_splits(projection, pixels, side, measure.bank, accelerator), measure
        )["test/knn"]
    if measure.probe_epochs:
        more["probe by sgd"] = probe_by_sgd(encoder, pixels, side, measure.probe_epochs, config.run.seed, accelerator)
    clock |= fitted.clock | {"measured": time.perf_counter()}
    if main:
        finish_report(run, config, pixels, features, fitted, teacher_tensors, clock, more)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def fit(
    config: PretrainConfig,
    network: torch.nn.Module,
    run: Run,
    accelerator: Accelerator,
    pixels: Mapping[str, Pixels],
) -> tuple[torch.nn.Module, Fitted, int]:
    """Trains the network and writes its encoder, or the teacher's, to `model/` under the run.

    Returns the network whose encoder that is, what the training leaves behind, and the number of the teacher's tensors.

    Raises:
        RunStopped: the loss is NaN, something frozen has moved, or the teacher was given a gradient.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options, own, method = config.training, config.own, METHODS[config.method]
    if not own.norm_splits:
        network = share_batch_norms(network, accelerator)
    network = network.to(accelerator.device)
    channels_last(network, accelerator)
    expect_fixed_shapes(accelerator.device)
    memory = Memory(config, network, accelerator.device)
    whole = memory.teacher if measured(config) == "teacher" else network
    assert whole is not None
    encoder = encoder_of(whole)
    optimizer = make_optimizer(options, network)
    recipes = recipes_of(config.encoder, config.views, method.full_views)
    source = training_steps(pixels["train"], recipes, options.batch_size, config.run.seed, accelerator)
    every = options.evaluate_every or max(1, round(total_steps(options, source) / EVALUATIONS))
    options = dataclasses.replace(options, evaluate_every=every)
    fitting = Fitting.start(run, accelerator, network, optimizer, source, options, config.run.seed, "pictures", memory)
    loop = fitting.loop
    keep_prototypes(network, loop, own.freeze_last * len(source))
    # Without classes no training picture votes.
    bank = config.measure.bank if len(pixels["train"].pictures.classes) > 1 else 1

    def evaluation() -> dict[str, float]:
        features = features_of_splits(encoder, pixels, config.encoder.side, bank, accelerator)
        found = scores(features, config.measure)
        if found["test/spread"] < COLLAPSED and accelerator.is_main_process:
            console.print(f"the features have collapsed: all pictures look alike (spread {found['test/spread']:.3f})")
        return found

    if loop.step_number == 0:  # the random encoder, beside which all figures stand
        loop.evaluated(evaluation())
    for batch in loop.batches():
        views = views_of(batch.pixels, batch.aspects, recipes, config.run.seed, batch.step, batch.own)
        warm = min(1.0, loop.step_number / max(1, own.teacher_warmup * len(source)))
        temperature = own.teacher_temperature * warm + own.teacher_temperature_start * (1 - warm)
        labels = to_device(batch.labels, accelerator.device) if own.loss == "supervised" else None
        loss = method.loss(Step(fitting.model, memory, own, accelerator, views, temperature, labels))
        decay = cosine(loop.step_number, loop.total, options.weight_decay, options.weight_decay_end)
        for group in fitting.optimizer.param_groups:
            group["weight_decay"] = decay if group["decays"] else 0.0
        loop.step(loss, len(batch.labels))
        memory.update_teacher(fitting.plain, cosine(loop.step_number, loop.total, own.momentum, own.momentum_end))
        if loop.evaluation_due:
            loop.evaluated(evaluation(), "validation/knn" if "validation" in pixels else None, higher_is_better=True)
    teacher_tensors = memory.check_teacher(fitting.optimizer)
    return whole, fitting.finish(lambda _: save_encoder(config, encoder, run.path)), teacher_tensors


def print_needs(config: PretrainConfig) -> None:
    """Prints the memory that the training needs; of the data it reads nothing.

    Raises:
        LabError: there is no such network.
    """
    method, views = METHODS[config.method], config.views
    with torch.device("meta"):
        network = method.network(config).train()
    memory = Memory(config, network, torch.device("meta"))
    sides = [config.encoder.side] * method.full_views + [views.local_side] * (views.local_crops * method.small_views)
    whole = network if memory.teacher is None else torch.nn.ModuleList([network, memory.teacher])
    accelerator: Any = SimpleNamespace(autocast=nullcontext)

    def loss(count: int) -> torch.Tensor:
        for name in ("queue", "centre"):
            if (tensor := getattr(memory, name)) is not None:
                setattr(memory, name, torch.empty(tensor.shape))
        pictures = [torch.empty(count, 3, side, side) for side in sides]
        labels = torch.zeros(count, dtype=torch.long)
        return method.loss(Step(network, memory, config.own, accelerator, pictures, 1.0, labels))

    title = f"{config.method} of {config.encoder.backbone}"
    moments = 2 if config.training.optimizer == "adamw" else 1
    print_plan(title, "pictures", config, whole, loss, moments=moments)


def make_network(config: PretrainConfig, accelerator: Accelerator) -> torch.nn.Module:
    """Makes the untrained network, the same in every process.

    Raises:
        LabError: it cannot be had, does not take pictures of that side, or the launch cannot train it.
    """
    if config.training.batch_size % accelerator.num_processes:
        raise LabError(f"--batch-size {config.training.batch_size}: must be a multiple of the "
                       f"{accelerator.num_processes} processes: each compares as many pictures")  # fmt: skip
    if accelerator.distributed_type in SHARDED:
        raise LabError(f"pretrain: a teacher is a copy of whole weights, and {accelerator.distributed_type.value} "
                       "spreads them out; launch with launch/multi_gpu.yaml or multi_node.yaml")  # fmt: skip
    with main_process_first(accelerator):
        set_seed(config.run.seed)
        network = METHODS[config.method].network(config)
    encoder = encoder_of(network).eval()
    for side in {config.encoder.side, config.views.local_side if config.views.local_crops else config.encoder.side}:
        try:  # a network that does not take such pictures says so before anything begins
            with torch.no_grad():
                features_of(encoder, torch.zeros(1, 3, side, side))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise LabError(f"--backbone {config.encoder.backbone}: does not take pictures of {side} pixels "
                           f"({reason_of(error)}); see --side and --local-side") from error  # fmt: skip
    return network.train()


def check_pictures(config: PretrainConfig, splits: Mapping[str, LabelledPictures]) -> None:
    """Makes sure that the pictures do for what is asked, before a run begins.

    Raises:
        LabError: there are fewer training pictures than a batch has, or nothing to watch for --patience or a plateau.
    """
    options, pictures = config.training, splits["train"]
    classes = len(pictures.classes) > 1
    for option, asked in (("--loss supervised", config.own.loss == "supervised"),
                          ("--projected", config.measure.projected),
                          ("--probe-epochs", config.measure.probe_epochs > 0)):  # fmt: skip
        if asked and not classes:
            raise LabError(f"{option}: the pictures have no classes")
    if config.measure.probe_epochs and "validation" not in splits:
        raise LabError("--probe-epochs: its learning rate is chosen by validation pictures; give --validation-fraction")
    if len(pictures) < options.batch_size:
        raise LabError(f"--batch-size {options.batch_size}: there are only {len(pictures)} training pictures")
    for option, asked in (("--patience", options.patience > 0), ("--schedule plateau", options.schedule == "plateau")):
        if asked and not (classes and "validation" in splits):
            raise LabError(f"{option}: there is nothing to watch without classes and validation pictures")


def make_optimizer(options: PretrainTrainingOptions, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Makes SGD, LARS or AdamW; the latter two do not decay biases and norms, and LARS does not scale their steps."""
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD([{"params": learnt, "decays": True}], rate, MOMENTUM, weight_decay=decay)
    matrices, rest = ([p for p in learnt if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "decays": True}, {"params": rest, "decays": False, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "lars":
        return Lars(groups, rate, MOMENTUM, weight_decay=decay)
    return torch.optim.AdamW(groups, rate, weight_decay=decay, fused=True)


def keep_prototypes(network: torch.nn.Module, loop: Loop, steps: int) -> None:
    """Zeroes the gradient of DINO's prototypes in the first steps: their directions stay, as in its authors' code."""
    if isinstance(network, Learner) and isinstance(network.projection, DinoHead):
        prototypes = network.projection.prototypes
        prototypes.register_hook(lambda gradient: gradient * float(loop.step_number >= steps))


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Returns the value at optimizer step `step` (from 0) of `total` on half a cosine from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(1, total))) / 2


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.pretrain")
