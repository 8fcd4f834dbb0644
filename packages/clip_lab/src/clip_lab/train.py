"""Trains CLIP, SigLIP, CoCa or SimVLM: `accelerate launch -m clip_lab.train --objective clip --data flickr8k`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from clip_lab.config import MOST_SCALE, OWN, TrainConfig
from clip_lab.data import Batches, Part, Step, drawn_scenes, normalised, read_data, read_pairs, transform_of
from clip_lab.defaults import complete
from clip_lab.evaluate import evaluate_model, scores
from clip_lab.image import make_image_tower
from clip_lab.losses import OBJECTIVES, check_objective
from clip_lab.model import Model, Scale, training_mode
from clip_lab.released import ReleasedModel
from clip_lab.report import finish_report
from clip_lab.saved import Loaded, load_any, load_model, save_model
from clip_lab.text import PretrainedText, TextTower, pretrained_text
from clip_lab.tokens import Words, make_words
from labs_common.data.captions import Captions, captions_alone
from labs_common.data.images import record_splits
from labs_common.device import CPU, expect_fixed_shapes
from labs_common.errors import LabError
from labs_common.fitting import Fitted, Fitting, begin, channels_last, share_batch_norms
from labs_common.frozen.audit import state_hash
from labs_common.frozen.cache import DTYPES
from labs_common.launch import main_process_first
from labs_common.plan import print_plan
from labs_common.run import Run, keep


def train(config: TrainConfig) -> None:
    """Walks the road: pictures and captions, model, training, evaluation of what was written, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    check_objective(config)
    if config.plan.plan:
        print_needs(config)
        return
    accelerator = begin(config.run, config.training)
    with main_process_first(accelerator):
        data = read_data(config.data, config.run.seed, accelerator.is_main_process)
    with main_process_first(accelerator):  # weights are downloaded on their first use
        set_seed(config.run.seed)
        captions = [caption for of_picture in data.splits["train"].captions for caption in of_picture]
        begun, weights = start_model(config) if config.start.start else (new_model(config, captions), "")
    run = Run.start(config, config.run, config.objective, accelerator)
    record_splits(run, data.splits)
    before = None
    if config.start.start:
        keep(run, "start.json", {"weights": weights, "view": asdict(begun.transform)}, f"--start {config.start.start}")
        if accelerator.is_main_process:
            before = evaluate_model(begun, data.splits["test"], data.truth, accelerator.device)
    fitted = fit(config, begun, run, accelerator, data)
    clock |= fitted.clock

    # The test is of what was written: the model is read back and sees the pictures themselves.
    if accelerator.is_main_process:
        loaded = load_model(run.path)
        found = evaluate_model(loaded, data.splits["test"], data.truth, accelerator.device)
        clock["tested"] = time.perf_counter()
        finish_report(run, config, data, loaded, fitted, found, clock, before)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def print_needs(config: TrainConfig) -> None:
    """Prints the memory that the training needs; of the data it reads the captions.

    Raises:
        LabError: there is no such data, tower or tokenizer.
    """
    captions, batch = captions_alone(config.data, drawn_scenes), config.batch
    image = dataclasses.replace(config.image, image_pretrained=False, image_weights=None)
    text = dataclasses.replace(config.text, text_pretrained=False)
    with torch.device("meta"):
        bare = dataclasses.replace(config, image=image, text=text)
        begun = new_model(bare, [caption for of_picture in captions for caption in of_picture])
    model, words = cast(Model, begun.model), begun.words
    training_mode(model, model)
    tower, frozen, side, share = model.image, image.freeze_image, model.image.size, OBJECTIVES[config.objective].share
    width = tower.width * (1 if model.reads == "feature" else tower.count)
    fitting: Any = SimpleNamespace(model=model, plain=model, accelerator=SimpleNamespace(device=CPU, process_index=0))
    normalised(torch.zeros(1, 3, 1, 1), tower)  # its constants are kept: they have to be made with values

    def loss(count: int) -> torch.Tensor:
        pictures = torch.empty(count, width) if frozen else torch.empty(count, 3, side, side, dtype=torch.uint8)
        crops = None if frozen or batch.augment == "none" else torch.empty(count, 5)
        each = count * batch.captions_per_picture
        read = torch.zeros(each, words.length, dtype=torch.long)
        if text.freeze_text:
            read = torch.empty(each, cast(Any, model).text.width)
        ids, prefix = torch.arange(count), torch.ones(each, dtype=torch.long)
        return share(fitting, config, Step([Part(pictures, crops, read, ids, prefix, 1.0)]), 0)[0]

    row = width * DTYPES[config.cache.boundary_precision][0].itemsize * image.views if frozen else 3 * side**2
    rows = [len(captions) * row, len(captions) // 8 * row] if config.cache.cache else []
    print_plan(f"{config.objective} of {image.image}", "pictures", config, model, loss, rows, batch.chunk)


def new_model(config: TrainConfig, captions: Sequence[str]) -> Loaded:
    """Makes the model that `config` describes, with its towers' weights, and its tokenizer; set the seed first.

    Raises:
        LabError: a tower or tokenizer cannot be had.
    """
    text = config.text
    option = "--tokenizer" if text.text == OWN else "--text"
    words = make_words(text.tokenizer, captions, text.vocabulary, text.max_length, option)
    tower = make_image_tower(config.image)
    reader: TextTower | PretrainedText
    if text.text == OWN:
        reader = TextTower(len(words), text.text_width, text.text_layers, text.text_heads, words.length, words.end)
    else:
        reader = pretrained_text(text.text, text.text_pretrained, words.length, words.end, text.text_pool)
    model: Model = OBJECTIVES[config.objective].model(tower, reader, config.head)
    if config.image.freeze_image:
        tower.requires_grad_(False)
    if text.freeze_text:
        reader.requires_grad_(False)
    read = Words(words.backend, min(words.length, reader.length))
    return Loaded(config.objective, model, read, transform_of(tower))


def start_model(config: TrainConfig) -> tuple[Loaded, str]:
    """Loads the model of --start, and lets train what the options say; returns also a hash of its weights.

    Raises:
        LabError: it cannot be had, or cannot be trained so.
    """
    options, objective = config.start, config.objective
    said = f"--start {options.start}"
    loaded = load_any(options.start, "--start")
    model, weights = loaded.model, state_hash(loaded.model)
    if isinstance(model, ReleasedModel):
        if objective not in ("clip", "siglip") or (objective == "siglip" and model.scale.bias is None):
            able = "clip" if model.scale.bias is None else "clip or siglip"
            raise LabError(f"{said}: has no parts for --objective {objective}; take {able}")
        if objective == "clip":  # whose loss has no bias
            model.scale = Scale(min(float(model.scale().detach()), MOST_SCALE))
        model.train_towers(options.lora, options.lora_rank)
    elif objective != loaded.objective:
        raise LabError(f"{said}: was trained with --objective {loaded.objective}, which --objective has to name too")
    elif options.lora != "none":
        raise LabError(f"{said}: is a run of this lab, which trains whole; drop --lora {options.lora}")
    else:
        model.requires_grad_(True)
    if config.image.freeze_image:
        model.image.requires_grad_(False)
    if config.text.freeze_text:
        text: Any = getattr(model, "text", None)
        if text is None or model.writes:
            raise LabError(f"--freeze-text: {said} writes captions by its text tower, which has to train")
        text.requires_grad_(False)
    return loaded, weights


def fit(config: TrainConfig, begun: Loaded, run: Run, accelerator: Accelerator, data: Captions) -> Fitted:
    """Trains what is not frozen and writes the model to `model/` under the run.

    Raises:
        LabError: the batch cannot be split evenly, or the cache not be written.
        RunStopped: the loss is not a number, or something frozen has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options, processes = config.training, accelerator.num_processes
    model: Any = begun.model  # of this lab or another library
    words = begun.words
    if options.batch_size % processes:
        raise LabError(f"--batch-size {options.batch_size}: must be a multiple of the {processes} processes")
    if len(data.splits["train"]) < processes:
        raise LabError(f"--data: {len(data.splits['train'])} training pictures are too few for {processes} processes")
    model.to(accelerator.device)
    training, validation = (
        read_pairs(name, data.splits[name], config, model, words, accelerator) for name in ("train", "validation")
    )
    if not config.image.freeze_image:
        model.image.network = share_batch_norms(model.image.network, accelerator)
    # What makes the feature of places (a pool, a norm) gets no gradient then; nor does some of released networks.
    if model.reads == "places" or isinstance(model, ReleasedModel):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    channels_last(model.image, accelerator)
    optimizer = torch.optim.AdamW(parameter_groups(config, model), betas=(0.9, 0.98), fused=True)  # CLIP's own betas
    seed, views, rank = config.run.seed, config.image.views, accelerator.process_index
    expect_fixed_shapes(accelerator.device)
    batches = Batches(training, words, config.batch, seed, views, model.continues, rank, processes, accelerator.device)
    source = batches.steps(options.batch_size)
    fitting = Fitting.start(run, accelerator, model, optimizer, source, options, seed, "pictures")
    training_mode(fitting.model, fitting.plain)
    loop, share_of_loss = fitting.loop, OBJECTIVES[config.objective].share
    for step, number in loop.batches():
        loss, metrics = share_of_loss(fitting, config, step, number)
        loop.step(loss, len(step.parts[number].ids), **metrics)
        if loop.evaluation_due:
            found = scores(fitting, config, validation, words)
            watch = options.watch if model.embeds else "loss"
            loop.evaluated(found, f"validation/{watch}", watch == "recall", options.keep_best)
    rows = [kept for pairs in (training, validation) for kept in (pairs.rows, pairs.text_rows)]
    return fitting.finish(lambda state: save_model(config, model, state, words, run.path, begun.said), rows)


def parameter_groups(config: TrainConfig, model: Model | ReleasedModel) -> list[dict[str, Any]]:
    """Groups what trains: weights that started from others move more slowly; vectors and scalars do not decay."""
    options, text = config.training, getattr(model, "text", None)
    rates: dict[tuple[str, ...], float] = {}  # by the beginnings of names
    if config.image.image_pretrained or config.image.image_weights:
        rates[("image.network.",)] = options.tower_learning_rate
    if isinstance(text, PretrainedText) and config.text.text_pretrained:
        rates[("text.network.",)] = options.text_learning_rate
    if config.start.start:
        rates = {("network.", "image.", "text.", "image_projection", "text_projection"): options.tower_learning_rate}
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = [rate for names, rate in rates.items() if name.startswith(names) and "lora_" not in name]
            groups.setdefault((slow[0] if slow else options.learning_rate, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": options.weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]
