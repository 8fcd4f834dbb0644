"""What is around the training loop: setting up, scoring after an epoch, and leaving a finished captioner behind."""

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from caption_lab.batches import CaptionRows, CaptionSteps, Order, disk_bytes, encoded_pairs, front_rows
from caption_lab.config import TrainConfig
from caption_lab.data import transform_of
from caption_lab.export import FOLDER, load_captioner, save_captioner
from caption_lab.model import ImageCaptioningModel, make_model
from caption_lab.objectives import GREEDY, SelfCritic, next_word_loss
from caption_lab.vocabulary import Vocabulary, build_vocabulary, padded
from caption_lab.writing import captions_of, references_of, scored
from labs_common.checkpoint import SHARDED
from labs_common.data.described import Captions, PictureTensors
from labs_common.errors import LabError
from labs_common.freezing import FrozenAudit
from labs_common.progress import console
from labs_common.run import Run
from labs_common.training import Loop, state_bytes, training_means


@dataclass(frozen=True)
class Made:
    """A captioner before its training.

    Attributes:
        config: with what the start fixed.
    """

    config: TrainConfig
    model: ImageCaptioningModel
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Fitting:
    """A training that is ready to begin, or to go on.

    Attributes:
        model: the prepared captioner.
        plain: the same one as a plain module, or a copy to be filled where weights are sharded.
        rows: what is read, by split.
        references: cleaned true captions of the validation pictures that are captioned after an epoch.
        critic: for --objective scst.
        prepared_at: the moment at which all this was there.
    """

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    model: torch.nn.Module
    plain: ImageCaptioningModel
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    loop: Loop
    rows: dict[str, CaptionRows]
    references: list[list[list[str]]]
    sample: str
    critic: SelfCritic | None
    audit: FrozenAudit
    prepared_at: float


@dataclass(frozen=True)
class Fitted:
    """What a training leaves behind besides the exported captioner.

    Attributes:
        parameters: how many there are, by `trained` and `all`.
        optimizer_bytes: of its state, in a process.
        cache_bytes: of the frozen features on disk.
        clock: moments at which its parts ended, in order.
    """

    audit: FrozenAudit
    parameters: dict[str, int]
    optimizer_bytes: int
    cache_bytes: int
    clock: dict[str, float]


def make(config: TrainConfig, data: Captions, accelerator: Accelerator) -> Made:
    """The captioner that `config` describes, with fresh weights in the decoder, or that of --start.

    Raises:
        LabError: the encoder or the start cannot be had, or the start is of another kind.
    """
    with accelerator.main_process_first():  # the tiny encoder is made, others are downloaded on their first use
        set_seed(config.run.seed)
        if config.start is not None:
            made = _started(config)
            made.model.encoder.train_last(config.encoder.unfreeze, config.cache.cache)
            return made
        captions = [caption for of_picture in data.splits["train"].captions for caption in of_picture]
        vocabulary = build_vocabulary(captions, config.vocabulary)
        model = make_model(config.model, config.encoder, config.decoder, len(vocabulary), vocabulary.length + 1)
        model.encoder.train_last(config.encoder.unfreeze, config.cache.cache)
        return Made(config, model, vocabulary)


def _started(config: TrainConfig) -> Made:
    assert config.start is not None
    found = load_captioner(config.start, "--start")
    if found.kind != config.model:
        raise LabError(f"--start {config.start}: is of --model {found.kind}; say so")
    return Made(dataclasses.replace(config, decoder=found.options), found.model, found.vocabulary)


def set_up(made: Made, run: Run, accelerator: Accelerator, data: Captions) -> Fitting:
    """Freezes the encoder's front, computes its output for every picture once, and prepares the loop.

    Raises:
        LabError: the encoder cannot be cut, or the cache not be written.
        RunStopped: the run is being resumed, and something fixed is another.
    """
    config, model, vocabulary = made.config, made.model.to(accelerator.device), made.vocabulary
    options, splits, shown = config.training, data.splits, accelerator.is_main_process
    sharded = accelerator.distributed_type in SHARDED
    if sharded and config.objective == "scst":
        raise LabError("--objective scst: writes captions while it learns, which sharded weights cannot; take one GPU, "
                       "or launch/multi_gpu.yaml")  # fmt: skip
    plain = copy.deepcopy(model) if sharded else model
    if sharded:
        plain.encoder.train_last(config.encoder.unfreeze, config.cache.cache)  # with a cut of its own
    transform = transform_of(model.encoder)
    rows = {
        name: CaptionRows(
            front_rows(name, PictureTensors(splits[name], transform), model.encoder, config.cache, accelerator),
            encoded_pairs(splits[name], vocabulary),
        )
        for name in ("train", "validation")
    }
    prepared_at = time.perf_counter()
    groups = [{"params": [p for p in model.decoder.parameters() if p.requires_grad], "lr": options.learning_rate}]
    if own := [p for p in model.encoder.parameters() if p.requires_grad]:
        groups.append({"params": own, "lr": options.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    audit = FrozenAudit(accelerator.unwrap_model(prepared))
    if run.resumed and (before := run.load_json("frozen.json")):
        audit.check(before)
    elif shown:
        run.save_json("frozen.json", audit.before)
    scst = config.objective == "scst"
    order: Order = "pictures" if scst else "by picture" if options.by_picture else "captions"
    source = CaptionSteps(rows["train"], options.batch_size, config.run.seed, order, accelerator.process_index,
                          accelerator.num_processes)  # fmt: skip
    loop = Loop(run, accelerator, prepared, optimizer, source, options, config.run.seed, unit="captions")
    prepared.train()
    watched = splits["validation"].subset(range(min(options.watch_pictures, len(splits["validation"]))))
    critic = SelfCritic(splits["train"].captions, vocabulary) if scst else None
    return Fitting(
        config, run, accelerator, prepared, plain, vocabulary, optimizer, loop, rows,
        references_of(watched, vocabulary), splits["validation"].names[0], critic, audit, prepared_at,
    )  # fmt: skip


def scores(fitting: Fitting) -> dict[str, float]:
    """Training loss since the last evaluation; loss, BLEU-4 and CIDEr-D on the validation pictures; in training mode.

    Captions are written greedily. The first picture's is printed and kept in samples.jsonl.
    """
    accelerator, run = fitting.accelerator, fitting.run
    found = {"validation/loss": validation_loss(fitting)}
    captions = _captions(fitting)
    metrics = scored(captions, fitting.references)
    found |= {f"validation/{name}": metrics[name] for name in ("bleu-4", "cider")}
    step = fitting.loop.step_number
    if step not in {line["step"] for line in run.lines("samples.jsonl")}:
        run.append("samples.jsonl", {"step": step, "picture": fitting.sample, "caption": captions[0]})
    if accelerator.is_main_process:
        console.print(f"{fitting.sample}: {captions[0]}")
    fitting.model.train()
    return training_means(run, "captions", ("loss",)) | found


@torch.no_grad()
def validation_loss(fitting: Fitting) -> float:
    """Mean cross-entropy over all words of the validation captions; every process takes its share."""
    data, accelerator, size = fitting.rows["validation"], fitting.accelerator, fitting.config.training.batch_size
    fitting.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    mine = range(accelerator.process_index, len(data.pairs), accelerator.num_processes)
    for first in range(0, -(-len(data.pairs) // accelerator.num_processes), size):
        # Sharded weights are gathered by all processes together: one without captions left repeats one.
        chosen = [data.pairs[number] for number in mine[first : first + size]]
        there = bool(chosen)
        chosen = chosen or data.pairs[:1]
        words = padded([words for _, words in chosen])[0].to(accelerator.device)
        rows, of_rows = (t.to(accelerator.device) for t in data.of_pictures([picture for picture, _ in chosen]))
        loss = next_word_loss(fitting.model(rows, of_rows, words[:, :-1]).logits, words[:, 1:])
        count = int((words[:, 1:] != 0).sum())
        sums += torch.tensor([float(loss) * count, count], dtype=torch.float64) * there
    everyone = accelerator.reduce(sums.float().to(accelerator.device)) if accelerator.num_processes > 1 else sums
    return float(everyone[0] / everyone[1])


def _captions(fitting: Fitting) -> list[str]:
    """Greedy captions of the watched validation pictures; where weights are sharded, the main process writes them."""
    accelerator, rows, plain = fitting.accelerator, fitting.rows["validation"], fitting.plain

    @torch.no_grad()
    def features(places: Sequence[int]) -> torch.Tensor:
        return plain.encoder.back(rows.rows.rows(0, places).to(accelerator.device))

    def written(by: Accelerator | None) -> list[str]:
        plain.eval()
        return captions_of(plain.decoder, features, len(fitting.references), fitting.vocabulary, GREEDY, by)

    if plain is accelerator.unwrap_model(fitting.model):
        return written(accelerator)
    found: list[list[str]] = [[]]
    gathered = accelerator.get_state_dict(fitting.model)
    if accelerator.is_main_process:
        plain.load_state_dict(gathered)
        found = [written(None)]
    return list(broadcast_object_list(found)[0])


def finished(fitting: Fitting) -> Fitted:
    """Audits what was frozen and writes the whole captioner to `model/` under the run.

    Raises:
        RunStopped: something fixed has moved.
    """
    fitting.audit.check()
    accelerator, plain = fitting.accelerator, fitting.plain
    parameters = list(accelerator.unwrap_model(fitting.model).parameters())
    sizes = {
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
        "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
    }
    gathered = accelerator.get_state_dict(fitting.model)  # sharded weights: the whole ones, on the main process
    if accelerator.is_main_process:
        if plain is not accelerator.unwrap_model(fitting.model):
            plain.load_state_dict(gathered)
        save_captioner(
            fitting.config.model, plain, fitting.config.decoder, fitting.vocabulary, fitting.run.path / FOLDER
        )
    clock = {"prepared": fitting.prepared_at, "trained": time.perf_counter()}
    kept = disk_bytes([part.rows for part in fitting.rows.values()]) if accelerator.is_main_process else 0
    state = state_bytes(fitting.optimizer)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Fitted(fitting.audit, sizes, state, kept, clock)
