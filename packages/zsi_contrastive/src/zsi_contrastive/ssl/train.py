"""What is around the training loop: setting up, measuring on the way, and leaving the encoder behind."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from labs_common.checkpoint import SHARDED
from labs_common.data import LabelledPictures
from labs_common.errors import LabError
from labs_common.freezing import FrozenAudit
from labs_common.progress import console
from labs_common.run import Run
from labs_common.training import Loop, state_bytes
from zsi_contrastive.ssl.config import GREEDY, PretrainConfig
from zsi_contrastive.ssl.data import Batch, Levels, Steps, held_levels
from zsi_contrastive.ssl.evaluate import (
    COLLAPSED,
    Features,
    effective_rank,
    features_from,
    knn_accuracy,
    spread,
    usual_neighbours,
)
from zsi_contrastive.ssl.methods import Step
from zsi_contrastive.ssl.model import Learner, encoder_of, has_batch_norm, make_learner
from zsi_contrastive.ssl.saved import save_encoder
from zsi_contrastive.ssl.teacher import Memory, along_cosine
from zsi_contrastive.ssl.views import Recipe, recipes_of, views_of

EVALUATIONS = 12
MOMENTUM = 0.9


@dataclass(frozen=True)
class Fitting:
    """A pre-training that is ready to begin, or to go on.

    Attributes:
        network: the prepared network, with `plain` the module in it.
        measured: the module whose features count: the learner's encoder, or dino's teacher's.
        prepared_at: the moment at which all this was there.
    """

    config: PretrainConfig
    run: Run
    accelerator: Accelerator
    network: torch.nn.Module
    plain: torch.nn.Module
    measured: torch.nn.Module
    memory: Memory
    optimizer: torch.optim.Optimizer
    loop: Loop
    levels: dict[str, Levels]
    recipes: list[Recipe]
    audit: FrozenAudit
    prepared_at: float

    def step_of(self, batch: Batch) -> Step:
        """A batch's random views, and what its loss needs besides."""
        views = views_of(batch.pictures, batch.aspects, self.recipes, self.config.run.seed, batch.step, batch.own)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]  # convolutions are faster so
        return Step(self.network, self.memory, self.config.own, self.accelerator, views)

    def set_decay(self) -> None:
        """Sets this step's weight decay."""
        options, loop = self.config.training, self.loop
        decay = along_cosine(loop.step_number, loop.total, options.weight_decay, options.weight_decay_end)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = decay if group["decays"] else 0.0

    def follow(self) -> None:
        """Lets the teacher come after the step that was just done."""
        own, loop = self.config.own, self.loop
        momentum = along_cosine(loop.step_number, loop.total, own.momentum, own.momentum_end)
        self.memory.follow(self.plain, momentum)


@dataclass(frozen=True)
class Fitted:
    """What a pre-training leaves behind besides the saved encoder.

    Attributes:
        levels: the pictures of each split.
        features: of them, by the encoder as it is now.
        teacher_tensors: how many of the teacher's were audited.
        parameters: how many learn.
        optimizer_bytes: of its state, in a process.
        clock: moments at which its parts ended, in order.
    """

    levels: dict[str, Levels]
    features: dict[str, Features]
    audit: FrozenAudit
    teacher_tensors: int
    parameters: int
    optimizer_bytes: int
    clock: dict[str, float]


def make(config: PretrainConfig, accelerator: Accelerator) -> torch.nn.Module:
    """The untrained network, the same in every process.

    Raises:
        LabError: it cannot be had, or the launch cannot train it.
    """
    if config.training.batch_size % accelerator.num_processes:
        raise LabError(f"--batch-size {config.training.batch_size}: must be a multiple of the "
                       f"{accelerator.num_processes} processes: each compares as many pictures")  # fmt: skip
    if accelerator.distributed_type in SHARDED:
        raise LabError(f"pretrain: a teacher is a copy of whole weights, and {accelerator.distributed_type.value} "
                       "spreads them out; launch with launch/multi_gpu.yaml or multi_node.yaml")  # fmt: skip
    with accelerator.main_process_first():
        set_seed(config.run.seed)
        network = make_learner(config)
    try:  # a network that does not take pictures of that side, or its parts, says so before anything begins
        with torch.no_grad():
            encoder, side = encoder_of(network), config.encoder.side
            encoder.eval()
            sides = {side, config.views.local_side} if config.views.local_crops else {side}
            for each in sides:
                if config.method in GREEDY:
                    network(torch.zeros(2, 3, each, each))
                else:
                    encoder(torch.zeros(1, 3, each, each))
            encoder.train()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(f"--backbone {config.encoder.backbone}: does not take pictures of {each} pixels ({reason}); "
                       "see --side and --local-side") from error  # fmt: skip
    set_seed(config.run.seed)
    return network


def check_pictures(config: PretrainConfig, splits: Mapping[str, LabelledPictures]) -> None:
    """Makes sure that the pictures do for what is asked, before a run begins.

    Raises:
        LabError: there are fewer training pictures than a batch has, or nothing to watch for --patience.
    """
    options, train = config.training, splits["train"]
    if len(train) < options.batch_size:
        raise LabError(f"--batch-size {options.batch_size}: there are only {len(train)} training pictures")
    if options.patience and len(train.classes) < 2:
        raise LabError("--patience: there is nothing to watch without classes")


def set_up(
    config: PretrainConfig,
    network: torch.nn.Module,
    run: Run,
    accelerator: Accelerator,
    splits: Mapping[str, LabelledPictures],
) -> Fitting:
    """Prepares the loop.

    Raises:
        RunStopped: the run is being resumed, and something fixed is another.
    """
    options, shown, device = config.training, accelerator.is_main_process, accelerator.device
    levels = held_levels(splits, config.encoder.side, device, shown)
    several = accelerator.num_processes > 1
    if several and device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif several and shown and has_batch_norm(network):
        console.print("batch normalisation takes the statistics of each process's own pictures here: torch shares them "
                      "between GPUs only, so the result depends on the number of processes")  # fmt: skip
    network.to(device)
    network.to(memory_format=torch.channels_last)
    memory = Memory(config, network, device)
    optimizer = make_optimizer(config, network)
    measured = memory.teacher.encoder if config.method == "dino" and memory.teacher else encoder_of(network)
    if options.compile:
        network.compile()
    prepared, optimizer = accelerator.prepare(network, optimizer)
    plain = accelerator.unwrap_model(prepared)
    audit = FrozenAudit(plain)
    if run.resumed and (before := run.load_json("frozen.json")):
        audit.check(before)
    elif shown:
        run.save_json("frozen.json", audit.before)
    source = Steps(levels["train"], options.batch_size, config.run.seed, accelerator.process_index,
                   accelerator.num_processes)  # fmt: skip
    whole = options.epochs * len(source)
    if options.max_steps is not None:
        whole = min(whole, options.max_steps)
    every = options.evaluate_every or max(1, round(whole / EVALUATIONS))
    loop = Loop(run, accelerator, prepared, optimizer, source, dataclasses.replace(options, evaluate_every=every),
                config.run.seed, unit="pictures", also=memory)  # fmt: skip
    if config.method == "dino":
        _keep_prototypes(plain, loop, config.own.freeze_last * len(source))
    if memory.teacher is not None:
        memory.teacher.train()
    prepared.train()
    return Fitting(config, run, accelerator, prepared, plain, measured, memory, optimizer, loop, levels,
                   recipes_of(config), audit, time.perf_counter())  # fmt: skip


def make_optimizer(config: PretrainConfig, network: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD, LARS or AdamW. With the latter two, biases and norms are not decayed (and LARS does not scale them)."""
    options = config.training
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if options.optimizer == "sgd":
        groups = [{"params": learnt, "decays": True}]
        return torch.optim.SGD(groups, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    matrices, rest = ([p for p in learnt if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "decays": True}, {"params": rest, "decays": False, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "lars":
        from timm.optim import Lars

        return Lars(groups, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    return torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay)


def _keep_prototypes(learner: torch.nn.Module, loop: Loop, steps: int) -> None:
    """DINO's prototypes keep their directions in the first steps: their slope is nothing then."""
    assert isinstance(learner, Learner)
    prototypes = learner.projection.get_parameter("prototypes")
    prototypes.register_hook(lambda slope: slope * float(loop.step_number >= steps))


def scores(fitting: Fitting) -> dict[str, float]:
    """KNN accuracy where there are classes, and whether the features of test pictures have collapsed."""
    side, measure, accelerator = fitting.config.encoder.side, fitting.config.measure, fitting.accelerator
    features = {
        name: features_from(fitting.measured, fitting.levels[name], side, accelerator)
        for name in ("validation", "test")
    }
    found: dict[str, float] = {}
    if len(fitting.levels["train"].pictures.classes) > 1:
        bank = features_from(fitting.measured, fitting.levels["train"], side, accelerator, measure.bank)
        voters = measure.neighbours or usual_neighbours(len(bank.labels))
        found = {f"{name}/knn": knn_accuracy(bank, asked, voters) for name, asked in features.items()}
    test = features["test"].values
    found |= {"test/spread": spread(test), "test/effective_rank": effective_rank(test)}
    if found["test/spread"] < COLLAPSED and accelerator.is_main_process:
        console.print(f"the features have collapsed: all pictures look alike (spread {found['test/spread']:.3f})")
    return found


def finished(fitting: Fitting) -> Fitted:
    """Audits what was fixed, and the teacher; writes the encoder and takes the features of all pictures.

    Raises:
        RunStopped: something fixed has moved, or the teacher was given a gradient.
    """
    fitting.audit.check()
    tensors = fitting.memory.audit(fitting.optimizer)
    config, accelerator = fitting.config, fitting.accelerator
    parameters = sum(p.numel() for p in fitting.plain.parameters() if p.requires_grad)
    clock = {"prepared": fitting.prepared_at, "trained": time.perf_counter()}
    if accelerator.is_main_process:
        save_encoder(config, fitting.measured, fitting.run.path)
    accelerator.wait_for_everyone()
    most = {"train": config.measure.bank, "validation": 0, "test": 0}
    features = {
        name: features_from(
            fitting.measured, fitting.levels[name], config.encoder.side, accelerator, count, f"features, {name}"
        )
        for name, count in most.items()
    }
    clock["measured"] = time.perf_counter()
    accelerator.wait_for_everyone()
    held = state_bytes(fitting.optimizer)
    return Fitted(fitting.levels, features, fitting.audit, tensors, parameters, held, clock)
