"""What is around the training loop: setting up, evaluations on the way, and leaving a finished model behind."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from labs_common.errors import LabError
from labs_common.freezing import FrozenAudit
from labs_common.run import Run
from labs_common.training import Loop, state_bytes
from zsi_contrastive.detector.batches import PictureSteps
from zsi_contrastive.detector.config import TrainConfig
from zsi_contrastive.detector.data import ZeroShotData
from zsi_contrastive.detector.evaluation import AT_ONCE
from zsi_contrastive.detector.finding import asked_for, found_in, of_classes
from zsi_contrastive.detector.model import ZeroShotMaskRCNN
from zsi_contrastive.detector.scoring import harmonic_mean, scored
from zsi_contrastive.detector.stored import FOLDER, make_model, save_model
from zsi_contrastive.detector.vectors import read_vocabulary

MOMENTUM = 0.9


@dataclass(frozen=True)
class Fitting:
    """A training that is ready to begin, or to go on.

    Attributes:
        model: the prepared model, with `plain` the module in it.
        prepared_at: the moment at which all this was there.
    """

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    model: torch.nn.Module
    plain: ZeroShotMaskRCNN
    optimizer: torch.optim.Optimizer
    loop: Loop
    data: ZeroShotData
    audit: FrozenAudit
    prepared_at: float


@dataclass(frozen=True)
class Fitted:
    """What a training leaves behind besides the saved model.

    Attributes:
        parameters: how many there are, by `trained` and `all`.
        optimizer_bytes: of its state, in a process.
        clock: moments at which its parts ended, in order.
    """

    audit: FrozenAudit
    parameters: dict[str, int]
    optimizer_bytes: int
    clock: dict[str, float]


def make(config: TrainConfig, data: ZeroShotData, accelerator: Accelerator) -> ZeroShotMaskRCNN:
    """The untrained model, the same in every process.

    Raises:
        LabError: the backbone or the vocabulary cannot be had.
    """
    words = None
    if config.words.vocabulary is not None:
        words = read_vocabulary(config.words.vocabulary, data.vectors.seen.shape[1])
    with accelerator.main_process_first():  # weights are downloaded on their first use
        set_seed(config.run.seed)
        return make_model(config, data.vectors, words)


def set_up(
    config: TrainConfig, model: ZeroShotMaskRCNN, run: Run, accelerator: Accelerator, data: ZeroShotData
) -> Fitting:
    """Prepares the loop.

    Raises:
        LabError: there are fewer pictures than processes.
        RunStopped: the run is being resumed, and something fixed is another.
    """
    options, pictures = config.training, data.pictures["train"]
    if len(pictures) < accelerator.num_processes:
        raise LabError(f"--data: {len(pictures)} training pictures are too few for {accelerator.num_processes} "
                       "processes")  # fmt: skip
    model.to(accelerator.device)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:  # which wants plain memory
        model.to(memory_format=torch.channels_last)  # convolutions are faster so
    groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay, fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(prepared)
    audit = FrozenAudit(plain)
    if run.resumed and (before := run.load_json("frozen.json")):
        audit.check(before)
    elif accelerator.is_main_process:
        run.save_json("frozen.json", audit.before)
    source = PictureSteps(pictures, options.batch_size, options.at_once, options.flip, config.run.seed,
                          accelerator.process_index, accelerator.num_processes)  # fmt: skip
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="pictures")
    prepared.train()
    return Fitting(config, run, accelerator, prepared, plain, optimizer, loop, data, audit, time.perf_counter())


def scores(fitting: Fitting) -> dict[str, float]:
    """AP at 0.5 of boxes of seen and unseen classes on validation pictures, each kind looked for alone."""
    pictures = fitting.data.pictures["validation"]
    pictures = pictures.subset(range(min(len(pictures), fitting.config.training.validation_pictures)))
    split, detection = fitting.data.split, fitting.config.detection
    seen, unseen = pictures.part.ids(split.seen), pictures.part.ids(split.unseen)
    fitting.plain.eval()
    asked = asked_for(fitting.data.vectors, detection, masks=False)
    (rows,) = found_in(
        fitting.plain, pictures, [asked], [[*seen, *unseen]], detection, fitting.accelerator, AT_ONCE, "validating"
    )
    fitting.model.train()
    one, two = (scored(pictures.part, of_classes(rows, ids), ids, "box").means(ids)["ap@0.5"] for ids in (seen, unseen))
    return {"validation/seen_ap50": one, "validation/unseen_ap50": two,
            "validation/harmonic_mean": harmonic_mean(one, two)}  # fmt: skip


def finished(fitting: Fitting) -> Fitted:
    """Audits what was frozen and writes the whole model to `model/` under the run.

    Raises:
        RunStopped: something fixed has moved.
    """
    fitting.audit.check()
    accelerator, data = fitting.accelerator, fitting.data
    parameters = list(fitting.plain.parameters())
    sizes = {
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
        "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    }
    state: dict[str, Any] = accelerator.get_state_dict(fitting.model)  # sharded weights: whole ones, on the main one
    if accelerator.is_main_process:
        folder = fitting.run.path / FOLDER
        save_model(fitting.config, fitting.plain, state, data.split, data.vectors, folder)
    clock = {"prepared": fitting.prepared_at, "trained": time.perf_counter()}
    held = state_bytes(fitting.optimizer)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Fitted(fitting.audit, sizes, held, clock)
