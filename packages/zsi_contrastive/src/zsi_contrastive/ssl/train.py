"""Learns features from pictures without labels: `accelerate launch -m zsi_contrastive.pretrain --method byol …`."""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import Lars

from labs_common.checkpoint import SHARDED
from labs_common.data.classes import LabelledPictures
from labs_common.data.splits import record_splits
from labs_common.errors import LabError
from labs_common.fitting import Fitted, Fitting, begin, channels_last, share_batch_norms
from labs_common.run import Run
from labs_common.training import Loop, total_steps
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.data import Batch, Pixels, read_splits, training_steps
from zsi_contrastive.ssl.evaluate import Features, features_from, scores
from zsi_contrastive.ssl.methods import METHODS, Memory, Step, complete
from zsi_contrastive.ssl.model import DinoHead, Learner, encoder_of, features_of
from zsi_contrastive.ssl.report import finish_report
from zsi_contrastive.ssl.saved import save_encoder
from zsi_contrastive.ssl.views import Recipe, recipes_of, views_of

EVALUATIONS = 12  # of a run, by default: enough points for a curve
MOMENTUM = 0.9  # of SGD and LARS, as in all of the papers


def train(config: PretrainConfig) -> None:
    """The road: pictures, network, training, what its features are worth, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    accelerator = begin(config.run, config.training)
    network = make_network(config, accelerator)
    with accelerator.main_process_first():
        splits = read_splits(config.data, config.run.seed, accelerator.is_main_process)
    check_pictures(config, splits)
    run = Run.start(config, config.run, f"{config.method}-{config.encoder.backbone}", accelerator)
    record_splits(run, splits)
    learning = set_up(config, network, run, accelerator, splits)
    fitted, teacher_tensors = fit(learning)
    features = final_features(learning)
    clock |= fitted.clock | {"measured": time.perf_counter()}
    if accelerator.is_main_process:
        finish_report(run, config, learning.pixels, features, fitted, teacher_tensors, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@dataclass(frozen=True)
class Learning:
    """A pre-training that is ready to begin, or to go on.

    Attributes:
        measured: the module whose features count: the learner's encoder, or the teacher's.
        pixels: the pictures of each split.
    """

    config: PretrainConfig
    fitting: Fitting
    memory: Memory
    measured: torch.nn.Module
    pixels: dict[str, Pixels]
    recipes: list[Recipe]

    def step_of(self, batch: Batch) -> Step:
        """Makes a batch's random views, beside what its loss needs."""
        views = views_of(batch.pixels, batch.aspects, self.recipes, self.config.run.seed, batch.step, batch.own)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]  # convolutions are faster so
        return Step(self.fitting.model, self.memory, self.config.own, self.fitting.accelerator, views)

    def set_weight_decay(self) -> None:
        """Sets the weight decay of the step that comes next."""
        options, loop = self.config.training, self.fitting.loop
        decay = cosine(loop.step_number, loop.total, options.weight_decay, options.weight_decay_end)
        for group in self.fitting.optimizer.param_groups:
            group["weight_decay"] = decay if group["decays"] else 0.0

    def update_teacher(self) -> None:
        """Moves the teacher after the step that was just done."""
        own, loop = self.config.own, self.fitting.loop
        self.memory.update_teacher(
            self.fitting.plain, cosine(loop.step_number, loop.total, own.momentum, own.momentum_end)
        )

    def scores(self) -> dict[str, float]:
        """Measures the features as they are now."""
        return scores(self.measured, self.pixels, self.config, self.fitting.accelerator)


def fit(learning: Learning) -> tuple[Fitted, int]:
    """Trains, and writes the encoder to `model/` under the run; also returns the number of the teacher's tensors.

    Raises:
        RunStopped: the loss is NaN, something fixed has moved, or the teacher was given a gradient.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    config, fitting = learning.config, learning.fitting
    loop, loss_of = fitting.loop, METHODS[config.method].loss
    if loop.step_number == 0:
        loop.evaluated(learning.scores())  # the random encoder, beside which all figures stand
    for batch in loop.batches():
        loss = loss_of(learning.step_of(batch))
        learning.set_weight_decay()
        loop.step(loss, len(batch.pixels))
        learning.update_teacher()
        if loop.evaluation_due:
            loop.evaluated(learning.scores(), "validation/knn", higher_is_better=True)
    teacher_tensors = learning.memory.check_teacher(fitting.optimizer)
    fitted = fitting.finish(lambda _: save_encoder(config, learning.measured, fitting.run.path))
    return fitted, teacher_tensors


def final_features(learning: Learning) -> dict[str, Features]:
    """Computes the features of all pictures of each split, of the training pictures at most --bank."""
    side, accelerator = learning.config.encoder.side, learning.fitting.accelerator
    most = {"train": learning.config.measure.bank, "validation": 0, "test": 0}
    return {name: features_from(learning.measured, learning.pixels[name], side, accelerator, count, f"features, {name}")
            for name, count in most.items()}  # fmt: skip


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
    with accelerator.main_process_first():
        set_seed(config.run.seed)
        network = METHODS[config.method].network(config)
    encoder, side = encoder_of(network), config.encoder.side
    encoder.eval()
    for each in {side, config.views.local_side} if config.views.local_crops else {side}:
        try:  # a network that does not take such pictures says so before anything begins
            with torch.no_grad():
                features_of(encoder, torch.zeros(1, 3, each, each))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LabError(f"--backbone {config.encoder.backbone}: does not take pictures of {each} pixels ({reason}); "
                           "see --side and --local-side") from error  # fmt: skip
    encoder.train()
    return network


def check_pictures(config: PretrainConfig, splits: Mapping[str, LabelledPictures]) -> None:
    """Makes sure that the pictures do for what is asked, before a run begins.

    Raises:
        LabError: there are fewer training pictures than a batch has, or nothing to watch for --patience.
    """
    options, pictures = config.training, splits["train"]
    if len(pictures) < options.batch_size:
        raise LabError(f"--batch-size {options.batch_size}: there are only {len(pictures)} training pictures")
    if options.patience and len(pictures.classes) < 2:
        raise LabError("--patience: there is nothing to watch without classes")


def set_up(
    config: PretrainConfig,
    network: torch.nn.Module,
    run: Run,
    accelerator: Accelerator,
    splits: Mapping[str, LabelledPictures],
) -> Learning:
    """Decodes the pictures and prepares network, memory, optimizer and loop.

    Raises:
        RunStopped: the run is being resumed, and something fixed is another.
    """
    options, method, device = config.training, METHODS[config.method], accelerator.device
    pixels = {name: Pixels(part, config.encoder.side, device, accelerator.is_main_process)
              for name, part in splits.items()}  # fmt: skip
    network = share_batch_norms(network, accelerator).to(device)
    channels_last(network, accelerator)
    memory = Memory(config, network, device)
    learner = memory.teacher if method.measured == "teacher" and memory.teacher is not None else network
    optimizer = make_optimizer(config, network)
    if options.compile:
        network.compile()
    source = training_steps(pixels["train"], options.batch_size, config.run.seed, accelerator.process_index,
                            accelerator.num_processes)  # fmt: skip
    every = options.evaluate_every or max(1, round(total_steps(options, source) / EVALUATIONS))
    options = dataclasses.replace(options, evaluate_every=every)
    fitting = Fitting.start(run, accelerator, network, optimizer, source, options, config.run.seed, "pictures", memory)
    if isinstance(network, Learner) and isinstance(network.projection, DinoHead):
        keep_prototypes(network.projection, fitting.loop, config.own.freeze_last * len(source))
    recipes = recipes_of(config.encoder, config.views, method.full_views)
    return Learning(config, fitting, memory, encoder_of(learner), pixels, recipes)


def make_optimizer(config: PretrainConfig, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Makes SGD, LARS or AdamW; the latter two do not decay biases and norms, and LARS does not scale their steps."""
    options = config.training
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if options.optimizer == "sgd":
        groups = [{"params": learnt, "decays": True}]
        return torch.optim.SGD(groups, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    matrices, rest = ([p for p in learnt if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "decays": True}, {"params": rest, "decays": False, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "lars":
        return Lars(groups, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    return torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay)


def keep_prototypes(head: DinoHead, loop: Loop, steps: int) -> None:
    """Zeroes the gradient of DINO's prototypes in the first steps: their directions stay, as in its authors' code."""
    head.prototypes.register_hook(lambda gradient: gradient * float(loop.step_number >= steps))


def cosine(step: int, total: int, start: float, end: float) -> float:
    """The value at optimizer step `step` (from 0) of `total` on half a cosine from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * step / max(1, total))) / 2
