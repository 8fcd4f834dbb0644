"""Trains a model that describes pictures: `accelerate launch -m caption_lab.train --model transformer`."""

from caption_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.train()

import copy
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from caption_lab.clipcap import ClipCap
from caption_lab.config import TrainConfig
from caption_lab.data import Batch, CaptionRows, caption_rows, caption_steps, check_unseen, drawn_scenes, read_data
from caption_lab.encoder import make_encoder
from caption_lab.evaluate import evaluate_captioner
from caption_lab.losses import OBJECTIVES, Learner, SelfCritic, next_word, next_word_loss
from caption_lab.model import ImageCaptioningModel, complete, make_model, make_vocabulary
from caption_lab.released import ClipJudge
from caption_lab.report import finish_report
from caption_lab.saved import Captioner, load_captioner, save_captioner
from caption_lab.vocabulary import PAD, TOKENS, padded
from labs_common.caption_metrics import caption_metrics, caption_words, references_of
from labs_common.checkpoint import SHARDED
from labs_common.data.captions import Captions, captions_alone
from labs_common.data.images import record_splits
from labs_common.decoding import GREEDY, written_captions
from labs_common.device import each_tensor, expect_fixed_shapes, to_device, widest_float
from labs_common.errors import LabError
from labs_common.fitting import Fitted, Fitting, begin, channels_last
from labs_common.frozen.cache import DTYPES
from labs_common.launch import main_process_first
from labs_common.plan import print_plan
from labs_common.progress import console
from labs_common.run import Run, training_means
from labs_common.saved import FOLDER
from labs_common.steps import shuffled

SAMPLES = 5  # validation pictures of which reports show what was said after each epoch


def train(config: TrainConfig) -> None:
    """Walks the road: pictures and captions, captioner, training, evaluation of what was saved, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    if config.plan.plan:
        print_needs(config)
        return
    accelerator = begin(config.run, config.training)
    clip = ClipJudge(config.clip_score) if config.clip_score else None  # before anything is trained: it may be missing
    with main_process_first(accelerator):
        data = read_data(config.data, config.run.seed, accelerator.is_main_process)
    if config.start is not None:
        for split in ("validation", "test"):
            check_unseen(data.splits[split], config.start, config.data.data, "--start")
    captioner = make(config, data, accelerator)
    run = Run.start(config, config.run, config.model.replace("_", "-"), accelerator)
    config = replace(config, decoder=captioner.options)  # which --start brought; config.yaml has what was asked for
    record_splits(run, data.splits)
    fitted = fit(config, captioner, run, accelerator, data)
    clock |= fitted.clock

    # What was saved is tested: the captioner is read back and sees the pictures themselves.
    captioner = load_captioner(run.path)
    test = data.splits["test"]
    judged = clip.look(test, accelerator.device) if clip else None
    found = evaluate_captioner(captioner, test, data.truth, config.decoding, accelerator, judged=judged)
    clock["tested"] = time.perf_counter()
    if accelerator.is_main_process:
        finish_report(run, config, data, captioner, fitted, found, clock)
    accelerator.end_training()


def print_needs(config: TrainConfig) -> None:
    """Prints the memory that the training needs; of the data it reads the captions.

    Raises:
        LabError: there is no such data or encoder, or the objective writes captions.
    """
    if OBJECTIVES[config.objective].writes:
        raise LabError(f"--plan: --objective {config.objective} learns from captions that it writes, whose lengths are "
                       "not known; leave it out")  # fmt: skip
    captions = captions_alone(config.data, drawn_scenes)
    vocabulary = make_vocabulary(config, [one for of_picture in captions for one in of_picture])
    with torch.device("meta"):
        encoder = make_encoder(replace(config.encoder, pretrained=False, weights=None))
        model = make_model(config.model, encoder, config.decoder, vocabulary).train()
        encoder.train_last(config.encoder.unfreeze, config.cache.cache)
    learner, side = Learner(config, model, model, vocabulary, None), encoder.transform.size
    dtype = DTYPES[config.cache.boundary_precision][0]
    # The cut's back holds some parameters by itself.
    whole = torch.nn.ModuleList([model, *(cut.back for cut in encoder.cuts)])

    def loss(count: int) -> torch.Tensor:
        rows = torch.empty(count, encoder.row_width, dtype=dtype) if encoder.has_front else None
        words = torch.zeros(count, vocabulary.length + 2, dtype=torch.long)
        rows = torch.empty(count, 3, side, side) if rows is None else rows
        return next_word(learner, Batch(rows, torch.arange(count), words, [], 1.0, 1.0), 0.0)[0]

    kept = (config.encoder.views * len(captions), len(captions) // 8)
    cached = encoder.has_front and config.cache.cache
    sizes = [count * encoder.row_width * dtype.itemsize for count in kept if cached]
    print_plan(f"{config.model} behind {config.encoder.encoder}", "captions", config, whole, loss, sizes)


def make(config: TrainConfig, data: Captions, accelerator: Accelerator) -> Captioner:
    """Makes the captioner that `config` describes, with fresh weights in the decoder, or reads that of --start.

    Raises:
        LabError: the encoder or the start cannot be had, or the start is of another kind.
    """
    with main_process_first(accelerator):  # the tiny encoder is made, others are downloaded on their first use
        set_seed(config.run.seed)
        if config.start is not None:
            captioner = load_captioner(config.start, "--start")
            if captioner.kind != config.model:
                raise LabError(f"--start {config.start}: holds another kind of captioner; add --model {captioner.kind}")
            captioner.model.decoder.requires_grad_(True)
        else:
            captions = [caption for of_picture in data.splits["train"].captions for caption in of_picture]
            vocabulary = make_vocabulary(config, captions)
            model = make_model(config.model, make_encoder(config.encoder), config.decoder, vocabulary)
            if isinstance(model.decoder, ClipCap):
                model.decoder.read(config.decoder.language_model)
            captioner = Captioner(config.model, model, vocabulary, config.decoder)
        captioner.model.encoder.train_last(config.encoder.unfreeze, config.cache.cache)
    return captioner


def fit(config: TrainConfig, captioner: Captioner, run: Run, accelerator: Accelerator, data: Captions) -> Fitted:
    """Trains the decoder, and what of the encoder is free, and saves the captioner to `model/` under the run.

    Raises:
        LabError: the encoder cannot be cut, the cache not be written, or the objective not have sharded weights.
        RunStopped: the loss is not a number, or something frozen has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    model, vocabulary = captioner.model.to(accelerator.device), captioner.vocabulary
    if accelerator.device.type == "cuda":
        channels_last(model.encoder, accelerator)
    expect_fixed_shapes(accelerator.device)
    options, objective, splits, seed = config.training, OBJECTIVES[config.objective], data.splits, config.run.seed
    plain = _writer(model, config, accelerator)
    rows = {
        name: caption_rows(name, splits[name], model.encoder, vocabulary, config.cache, accelerator, views, seed)
        for name, views in (("train", config.encoder.views), ("validation", 1))
    }
    groups = [{"params": [p for p in model.decoder.parameters() if p.requires_grad], "lr": options.learning_rate}]
    if own := [p for p in model.encoder.parameters() if p.requires_grad]:
        groups.append({"params": own, "lr": options.encoder_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
    source = caption_steps(
        rows["train"], options.batch_size, seed,
        "pictures" if objective.writes else "by picture" if options.by_picture else "captions",
        accelerator.process_index, accelerator.num_processes, accelerator.device,
    )  # fmt: skip
    fitting = Fitting.start(run, accelerator, model, optimizer, source, options, seed, "captions")
    critic = SelfCritic(splits["train"].captions, vocabulary) if objective.writes else None
    learner = Learner(config, fitting.model, plain, vocabulary, critic)
    watched = splits["validation"].subset(range(min(options.watch_pictures, len(splits["validation"]))))
    references = references_of(watched)
    loop = fitting.loop
    for batch in loop.batches():
        there = each_tensor(to_device, batch, accelerator.device)
        loss, metrics = objective.loss(learner, there, loop.step_number / loop.total)
        loop.step(loss, len(batch.pictures) if batch.of_captions else 0, **metrics)
        if loop.evaluation_due:
            found = scores(fitting, learner, rows["validation"], references, watched.names)
            loop.evaluated(found, f"validation/{options.watch}", options.watch != "loss", options.keep_best)

    kept = [part.rows for part in rows.values()]
    return fitting.finish(lambda state: save_captioner(run.path / FOLDER, captioner, state), kept)


def scores(
    fitting: Fitting, learner: Learner, data: CaptionRows, references: Sequence[Sequence[Sequence[str]]],
    names: Sequence[str],
) -> dict[str, float]:  # fmt: skip
    """Computes loss, BLEU-4 and CIDEr-D on the validation pictures, and the training loss since the last evaluation.

    Captions are written greedily for the pictures of `references`, which are called `names`. Those of some, drawn by
    the run's seed, are kept in samples.jsonl, and one is printed.
    """
    accelerator, run, step = fitting.accelerator, fitting.run, fitting.loop.step_number
    found = {"validation/loss": validation_loss(fitting, data)}
    captions = _captions(fitting, learner, data, len(references))
    metrics = caption_metrics([*map(caption_words, captions)], references)
    found |= {f"validation/{name}": metrics[name] for name in ("bleu-4", "cider")}
    told = {(line["step"], line["picture"]) for line in run.lines("samples.jsonl")}
    chosen = sorted(shuffled(learner.config.run.seed, 0, len(names))[:SAMPLES])
    for place in chosen:
        if (step, names[place]) not in told:  # a resumed run says again what it had said
            run.append("samples.jsonl", {"step": step, "picture": names[place], "caption": captions[place]})
    if accelerator.is_main_process:
        console.print(f"{names[chosen[0]]}: {captions[chosen[0]]}")
    fitting.model.train()
    return training_means(run, "captions", ("loss",)) | found


@torch.no_grad()
def validation_loss(fitting: Fitting, data: CaptionRows) -> float:
    """Returns the mean cross-entropy over all words of the validation captions; every process takes its share."""
    accelerator, size = fitting.accelerator, fitting.loop.options.batch_size
    fitting.model.eval()
    device, wide = accelerator.device, widest_float(accelerator.device)
    sums = torch.zeros(2, dtype=wide, device=device)  # on it: no batch is waited for
    mine = range(accelerator.process_index, len(data.pairs), accelerator.num_processes)
    for first in range(0, -(-len(data.pairs) // accelerator.num_processes), size):
        # Sharded weights are gathered by all processes together: one without captions left repeats one.
        chosen = [data.pairs[number] for number in mine[first : first + size]]
        there = bool(chosen)
        chosen = chosen or data.pairs[:1]
        words = to_device(padded([words for _, words in chosen])[0], device)
        rows, of_rows = (to_device(t, device) for t in data.of_pictures([picture for picture, _ in chosen]))
        loss = next_word_loss(fitting.model(rows, of_rows, words[:, :-1]).logits, words[:, 1:])
        count = (words[:, 1:] != PAD).sum()
        sums += torch.stack([loss.to(wide) * count, count.to(wide)]) * there
    everyone = (accelerator.reduce(sums.float()) if accelerator.num_processes > 1 else sums).cpu()
    return float(everyone[0] / everyone[1])


def _writer(model: ImageCaptioningModel, config: TrainConfig, accelerator: Accelerator) -> ImageCaptioningModel:
    """Returns the module that writes captions while training: the model, or where weights are sharded a copy to fill.

    Raises:
        LabError: the objective writes captions in every step, for which no copy can be filled.
    """
    if accelerator.distributed_type not in SHARDED:
        return model
    if OBJECTIVES[config.objective].writes:
        raise LabError(f"--objective {config.objective}: writes captions while it learns, which sharded weights "
                       "cannot; take one GPU, or launch/multi_gpu.yaml")  # fmt: skip
    if isinstance(model.decoder, ClipCap):
        raise LabError(f"--model {config.model}: its language model is not sharded; take one GPU, or "
                       "launch/multi_gpu.yaml")  # fmt: skip
    plain = copy.deepcopy(model)
    plain.encoder.train_last(config.encoder.unfreeze, config.cache.cache)  # with a cut of its own
    return plain


def _captions(fitting: Fitting, learner: Learner, data: CaptionRows, count: int) -> list[str]:
    """Writes greedy captions of the first pictures; where weights are sharded, the main process alone does."""
    accelerator, plain = fitting.accelerator, learner.plain

    @torch.no_grad()
    def features(places: Sequence[int]) -> torch.Tensor:
        return plain.encoder.back(data.rows.rows(0, places).to(accelerator.device))

    def write(by: Accelerator | None) -> list[str]:
        plain.eval()
        vocabulary = learner.vocabulary
        return written_captions(
            plain.decoder, features, count, TOKENS, vocabulary.length + 1, vocabulary.decode, GREEDY, by
        )

    if plain is fitting.plain:
        return write(accelerator)
    state = accelerator.get_state_dict(fitting.model)  # gathered by all processes together
    found: list[list[str]] = [[]]
    if accelerator.is_main_process:
        plain.load_state_dict(state)
        found = [write(None)]
    return list(broadcast_object_list(found)[0])
