"""What is around the training loop: making the model, setting up, and leaving a finished one behind."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed

from clip_lab.batches import (
    ClipSteps,
    Pairs,
    disk_bytes,
    frozen_rows,
    frozen_text_rows,
    picture_ids,
    picture_rows,
)
from clip_lab.config import OWN, TrainConfig
from clip_lab.data import transform_of
from clip_lab.model import ClipModel, Model, make_model
from clip_lab.stored import FOLDER, save_model
from clip_lab.tokens import Words, make_words
from labs_common.data import CaptionedPictures
from labs_common.data.described import Captions, PictureTensors
from labs_common.errors import LabError
from labs_common.freezing import FrozenAudit
from labs_common.run import Run
from labs_common.training import Loop, state_bytes


@dataclass(frozen=True)
class Fitting:
    """A training that is ready to begin, or to go on.

    Attributes:
        model: the prepared model, with `plain` the module in it.
        pairs: what is read, by split.
        prepared_at: the moment at which all this was there.
    """

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    model: torch.nn.Module
    plain: Model
    words: Words
    optimizer: torch.optim.Optimizer
    loop: Loop
    pairs: dict[str, Pairs]
    audit: FrozenAudit
    prepared_at: float


@dataclass(frozen=True)
class Fitted:
    """What a training leaves behind besides the saved model.

    Attributes:
        parameters: how many there are, by `trained` and `all`.
        optimizer_bytes: of its state, in a process.
        cache_bytes: of pictures and frozen features on disk.
        clock: moments at which its parts ended, in order.
    """

    audit: FrozenAudit
    parameters: dict[str, int]
    optimizer_bytes: int
    cache_bytes: int
    clock: dict[str, float]


def make(config: TrainConfig, data: Captions, accelerator: Accelerator) -> tuple[Model, Words]:
    """The model that `config` describes, and its tokenizer.

    Raises:
        LabError: a tower or tokenizer cannot be had.
    """
    with accelerator.main_process_first():  # weights are downloaded on their first use
        set_seed(config.run.seed)
        captions = [caption for of_picture in data.splits["train"].captions for caption in of_picture]
        text = config.text
        option = "--tokenizer" if text.text == OWN else "--text"
        words = make_words(text.tokenizer, captions, text.vocabulary, text.max_length, option)
        model = make_model(config.objective, config.image, config.text, config.head, words)
        longest = getattr(getattr(model, "text", model), "length", words.length)
        return model, Words(words.backend, min(words.length, longest))


def set_up(
    config: TrainConfig, model: Model, words: Words, run: Run, accelerator: Accelerator, data: Captions
) -> Fitting:
    """Decodes pictures and runs frozen towers once, and prepares the loop.

    Raises:
        LabError: the batch cannot be split evenly, or the cache not be written.
        RunStopped: the run is being resumed, and something fixed is another.
    """
    options, image, processes = config.training, config.image, accelerator.num_processes
    if options.batch_size % processes:
        raise LabError(f"--batch-size {options.batch_size}: must be a multiple of the {processes} processes")
    if len(data.splits["train"]) < processes:
        raise LabError(f"--data: {len(data.splits['train'])} training pictures are too few for {processes} processes")
    model.to(accelerator.device)
    augment = config.batch.augment or "none"
    pairs = {
        name: _pairs(name, config, model, words, data.splits[name], accelerator) for name in ("train", "validation")
    }
    prepared_at = time.perf_counter()
    if processes > 1 and accelerator.device.type == "cuda":
        model.image.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.image.network)
    if model.reads == "places":  # what makes the feature of them (a pool, a norm) gets no gradient then
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    if accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.DEEPSPEED:
        model.image.to(memory_format=torch.channels_last)  # half as fast again for small CNNs
    optimizer = torch.optim.AdamW(_groups(config, model), betas=(0.9, 0.98), fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(prepared)
    audit = FrozenAudit(plain)
    if run.resumed and (before := run.load_json("frozen.json")):
        audit.check(before)
    elif accelerator.is_main_process:
        run.save_json("frozen.json", audit.before)
    batch = config.batch
    source = ClipSteps(pairs["train"], words, options.batch_size, batch.captions_per_picture, augment, batch.chunk,
                       config.run.seed, image.views, config.objective == "simvlm", accelerator.process_index,
                       processes)  # fmt: skip
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="pictures")
    training_mode(prepared, plain)
    return Fitting(config, run, accelerator, prepared, plain, words, optimizer, loop, pairs, audit, prepared_at)


def _pairs(
    name: str, config: TrainConfig, model: Model, words: Words, pictures: CaptionedPictures, accelerator: Accelerator
) -> Pairs:
    tensors = PictureTensors(pictures, transform_of(model.image))
    rows = picture_rows(name, tensors, config.cache, accelerator.is_main_process)
    if config.image.freeze_image:
        views = config.image if name == "train" else replace(config.image, views=1)
        rows = frozen_rows(name, rows, model, views, config.cache, config.batch.augment or "none", config.run.seed,
                           tensors.recipe(), len(pictures), accelerator)  # fmt: skip
    numbers = [[words.numbers(caption) for caption in captions] for captions in pictures.captions]
    text_rows = None
    if config.text.freeze_text:
        flat = [row for captions in numbers for row in captions]
        text_rows = frozen_text_rows(name, flat, words, model, config.cache, accelerator)
    return Pairs(rows, model.image.size, config.image.freeze_image, numbers, picture_ids(pictures), text_rows)


def _groups(config: TrainConfig, model: Model) -> list[dict[str, Any]]:
    """Weights that started from others move more slowly; vectors and scalars do not decay."""
    options = config.training
    slow = {"image.network."} if config.image.image_pretrained or config.image.image_weights else set()
    if isinstance(model, ClipModel) and not hasattr(model.text, "blocks") and config.text.text_pretrained:
        slow.add("text.network.")
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(tuple(slow)), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": options.tower_learning_rate if is_slow else options.learning_rate,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (is_slow, decays), parameters in groups.items()
    ]


def training_mode(prepared: torch.nn.Module, plain: Model) -> None:
    """Training mode, but for towers that are frozen: no statistic of theirs moves."""
    prepared.train()
    for tower in (plain.image, getattr(plain, "text", None)):
        if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()


def finished(fitting: Fitting) -> Fitted:
    """Audits what was frozen and writes the whole model to `model/` under the run.

    Raises:
        RunStopped: something fixed has moved.
    """
    fitting.audit.check()
    accelerator = fitting.accelerator
    parameters = list(fitting.plain.parameters())
    sizes = {
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
        "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    }
    state = accelerator.get_state_dict(fitting.model)  # sharded weights: the whole ones, on the main process
    if accelerator.is_main_process:
        save_model(fitting.config, fitting.plain, state, fitting.words, fitting.run.path / FOLDER)
    clock = {"prepared": fitting.prepared_at, "trained": time.perf_counter()}
    kept = [rows for part in fitting.pairs.values() for rows in (part.rows, part.text_rows)]
    held = state_bytes(fitting.optimizer)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Fitted(fitting.audit, sizes, held, disk_bytes(kept), clock)
