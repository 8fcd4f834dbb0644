"""Captioning, side by side: training with the frozen encoder's output kept, and beam search of many pictures at once.

    uv run python benchmarks/captioning.py                                     # three models at 224 pixels
    uv run python benchmarks/captioning.py --models transformer:efficientnet_b0 --pictures 128

Training: ours, with captions shuffled and with --by-picture, against the two usual ways; all in processes of their
own, on the same drawn pictures with five captions each, with the same random encoder and decoder. "by caption"
loads, resizes and encodes the picture of every caption, as most PyTorch tutorials do; "by picture" does it once in
an epoch for all five captions, as Keras's example does. Each has the batches of one of ours, so losses are compared
step by step. Both pad captions to the fixed length.

Beam search of 5 on features that are there already: ours takes 64 pictures at once, keeps states, keys and values, and
computes what depends on the picture alone once; the usual way takes one picture at a time and repeats it for every beam
and step, and the transformer reads the whole beginning again for every word. The captions have to be the same.

Padding: CPU seconds of a decoder's step alone on 64 captions, with what is over left out, and computed to the end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from caption_lab.config import (
    CaptionTrainingOptions,
    EncoderOptions,
    TrainConfig,
    VocabularyOptions,
)
from caption_lab.data import encoded_pairs, read_data
from caption_lab.decoder import ShowAttendTell, ShowTell
from caption_lab.losses import attention_penalty, next_word_loss
from caption_lab.model import complete
from caption_lab.saved import Captioner
from caption_lab.train import fit, make
from caption_lab.vocabulary import END, PAD, START, TOKENS, padded
from labs_common.data.captions import Captions, PictureTensors
from labs_common.decoding import beam_search, log_probabilities
from labs_common.device import peak_memory
from labs_common.options import CaptionDataOptions, DecodingOptions, RunOptions
from labs_common.run import Run, write_atomically
from labs_common.scenes.files import write_flickr8k
from labs_common.training import make_accelerator

BATCH, RATE, DECAY, BEAMS = 60, 4e-4, 0.01, 5
DECODING = DecodingOptions(beam=BEAMS, length_penalty=0.0)


@dataclass
class Options:
    """Compares training and beam search side by side and prints ratios."""

    models: tuple[str, ...] = (
        "show_tell:resnet50",
        "show_attend_tell:resnet50",
        "transformer:efficientnet_b0",
    )
    """Captioner and timm encoder."""
    pictures: int = 64
    """Training pictures, with five captions each; a quarter more are read and not trained on."""
    epochs: int = 3
    """Passes over them."""
    workers: int = 2
    """Processes that decode for the others; ours has threads."""
    described: int = 128
    """Pictures that are captioned."""
    output: Path = Path("benchmarks/results/captioning.json")
    """Where the figures go."""
    worker: str | None = None
    """Used by the benchmark itself: measure one thing in this process."""
    data: Path | None = None
    """Used by the benchmark itself: the drawn pictures."""


def main() -> None:
    """Measures everything in a process of its own, prints the tables and writes the figures."""
    options = tyro.cli(Options)
    if options.worker is not None:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_flickr8k(data, range(round(options.pictures / 0.8)), side=256)
        for model in options.models:
            figures[model] = {}
            for name in WORKERS:
                command = [sys.executable, __file__, "--worker", name, "--models", model, "--data", str(data),
                           "--pictures", str(options.pictures), "--epochs", str(options.epochs),
                           "--workers", str(options.workers), "--described", str(options.described)]  # fmt: skip
                own = os.environ | {"XDG_CACHE_HOME": f"{folder}/{model}/{name}"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
                if done.returncode:
                    raise SystemExit(f"{model}, {name}: failed\n{done.stderr[-2000:]}")
                figures[model][name] = json.loads(done.stdout.splitlines()[-1])
                print(f"{model}, {name}: done", file=sys.stderr)
            show(model, figures[model])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps(figures, indent=1) + "\n")


def show(model: str, figures: dict[str, Any]) -> None:
    """Prints one model's tables: absolute figures, and the others as a ratio to ours."""
    table = Table("training", "epoch from 2nd, s", "ours is", "whole, s", "peak MiB", "losses differ by", title=model)
    for mine, name in (("ours", "by caption"), ("ours, by picture", "by picture")):
        ours = figures[mine]
        epoch = float(np.median(ours["epochs"][1:]))
        for which in (mine, name):
            row = figures[which]
            its = float(np.median(row["epochs"][1:]))
            differ = max(abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True))
            table.add_row(which, f"{its:.2f}", f"{its / epoch:.1f} x", f"{row['whole']:.1f}",
                          f"{row['peak_memory'] / 2**20:,.0f}", f"{differ:.1e}")  # fmt: skip
    console = Console(width=140)
    console.print(table)
    beam = figures["beam"]
    table = Table("beam search of 5", "captions/s", "ours is")
    table.add_row("ours", f"{beam['ours']:.1f}", "")
    table.add_row("one picture at a time", f"{beam['usual']:.2f}", f"{beam['ours'] / beam['usual']:.1f} x")
    console.print(table)
    print(f"captions that are the same: {beam['same']} of {beam['captions']}; {beam['words']:.1f} words each")
    step = figures["padding"]
    print(f"a decoder's step: {step['ours']:.2f} CPU s; {step['padded']:.2f} with all padding, {step['share']:.0%} of "
          f"what is read; losses differ by {step['differ']:.1e}")  # fmt: skip
    print(f"kept on disk: {ours['cache_bytes'] / ours['rows']:,.0f} bytes a picture")


def set_up(options: Options, by_picture: bool = False) -> tuple[Captions, TrainConfig, Captioner]:
    """The data and the captioner that all train, untrained."""
    kind, encoder = options.models[0].split(":")
    config = complete(
        TrainConfig(
            model=kind,
            encoder=EncoderOptions(encoder=encoder, pretrained=False, image_size=224),
            vocabulary=VocabularyOptions(min_count=1),
            data=CaptionDataOptions(data=str(options.data)),
            training=CaptionTrainingOptions(
                epochs=options.epochs, batch_size=BATCH, learning_rate=RATE, weight_decay=DECAY, schedule="constant",
                by_picture=by_picture, warmup=0, clip_norm=0, watch_pictures=1,
            ),
            run=RunOptions(track="none"),
        )
    )  # fmt: skip
    config.decoder.dropout = 0.0  # else each way would drop other values
    data = read_data(config.data, 0, shown=False)
    return data, config, make(config, data, make_accelerator(config.training))


def our_training(options: Options, by_picture: bool) -> dict[str, Any]:
    """The lab's own loop."""
    data, config, made = set_up(options, by_picture)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", True, resumed=False)
        run.path.mkdir()
        start = time.perf_counter()
        fitted = fit(config, made, run, make_accelerator(config.training), data)
        whole = time.perf_counter() - start
        seconds = [line["seconds"] for line in run.lines("timing.jsonl")]
        losses = [line["loss"] for line in run.lines("metrics.jsonl") if "loss" in line]
    steps = len(seconds) // options.epochs
    return {
        "epochs": [sum(seconds[first : first + steps]) for first in range(0, len(seconds), steps)],
        "whole": whole, "losses": losses, "peak_memory": peak_memory(), "cache_bytes": fitted.cache_bytes,
        "rows": len(data.splits["train"]) + len(data.splits["validation"]),
    }  # fmt: skip


class Pictures(Dataset[torch.Tensor]):
    """The training pictures, opened, resized and normalised each time they are asked for."""

    def __init__(self, tensors: PictureTensors) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors.pictures)

    def __getitem__(self, place: int) -> torch.Tensor:
        levels = self.tensors.transform.levels(self.tensors.pictures.image(place))
        return self.tensors.transform.normalised([levels])[0]


def usual_training(options: Options, by_picture: bool) -> dict[str, Any]:
    """A loop in which the encoder runs on what every batch needs; captions are padded to the fixed length."""
    data, _, made = set_up(options)
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, train = made.model.to(device), data.splits["train"]
    pairs = encoded_pairs(train, made.vocabulary)
    of_picture: dict[int, list[int]] = {}
    for number, (picture, _) in enumerate(pairs):
        of_picture.setdefault(picture, []).append(number)
    pictures = Pictures(PictureTensors(train, model.encoder.transform))
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=RATE, weight_decay=DECAY)
    epochs, losses = [], []

    def batches(epoch: int) -> Iterator[tuple[list[int], list[int]]]:
        """Pictures to encode, and captions of each batch."""
        generator = np.random.default_rng([0, epoch])
        if by_picture:
            order = generator.permutation(len(train)).tolist()
            size = BATCH // 5
            for first in range(0, len(order), size):
                chosen = order[first : first + size]
                yield chosen, [number for picture in chosen for number in of_picture[picture]]
        else:
            order = generator.permutation(len(pairs)).tolist()
            for first in range(0, len(order), BATCH):
                numbers = order[first : first + BATCH]
                yield [pairs[number][0] for number in numbers], numbers

    for epoch in range(options.epochs):
        begin = time.perf_counter()
        plan = list(batches(epoch))
        loader = DataLoader(pictures, batch_sampler=[chosen for chosen, _ in plan], num_workers=options.workers)
        for images, (chosen, numbers) in zip(loader, plan, strict=True):
            with torch.no_grad():
                features = model.encoder(images.to(device))
            if by_picture:
                features = features[torch.tensor([chosen.index(pairs[number][0]) for number in numbers])]
            words = torch.full((len(numbers), made.vocabulary.length + 2), PAD)
            for row, number in enumerate(numbers):
                words[row, : len(pairs[number][1])] = torch.tensor(pairs[number][1])
            words = words.to(device)
            output = model.decoder(features, words[:, :-1])
            loss = next_word_loss(output.logits, words[:, 1:])
            if output.attention is not None:
                loss = loss + attention_penalty(output.attention, words[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        epochs.append(time.perf_counter() - begin)
    return {"epochs": epochs, "whole": time.perf_counter() - start, "losses": losses, "peak_memory": peak_memory()}


def beam(options: Options) -> dict[str, Any]:
    """Captions per second of both ways, by the same decoder on the same features."""
    _, _, made = set_up(options)
    set_seed(1)
    model = made.model.eval()
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    shape = (options.described, encoder.width) if encoder.pool else (options.described, encoder.places, encoder.width)
    features = torch.randn(shape).abs()
    with torch.no_grad():  # untrained, all words are about equally probable: make them differ
        decoder.to_words.weight *= 8
        decoder.to_words.bias[END] -= 3.0
    length = 20
    beam_search(decoder, features[:8], TOKENS, length, DECODING)
    begin = time.perf_counter()
    parts = [beam_search(decoder, part, TOKENS, length, DECODING) for part in features.split(64)]
    batched = [words for part in parts for words in part.words]
    seconds = time.perf_counter() - begin
    few = features[: max(8, options.described // 8)]
    begin = time.perf_counter()
    single = [usual_beam(decoder, feature, length) for feature in few]
    usual_seconds = time.perf_counter() - begin
    return {
        "ours": len(features) / seconds, "usual": len(few) / usual_seconds, "captions": len(few),
        "same": sum(one == two for one, two in zip(single, batched, strict=False)),
        "words": float(np.mean([len(words) for words in batched])),
    }  # fmt: skip


def padding(options: Options) -> dict[str, Any]:
    """CPU seconds of forward and backward pass, the fastest of three, without and with the positions of padding."""
    data, _, made = set_up(options)
    model: Any = made.model
    vector = (model.encoder.width,) if model.encoder.pool else (model.encoder.places, model.encoder.width)
    features = torch.randn(64, *vector)
    numbers = np.random.default_rng(0).permutation(5 * len(data.splits["train"]))[:64]
    words, there = padded([encoded_pairs(data.splits["train"], made.vocabulary)[number][1] for number in numbers])

    def step() -> tuple[float, float]:
        begin = time.process_time()
        loss = next_word_loss(model.decoder(features, words[:, :-1]).logits, words[:, 1:])
        loss.backward()
        return time.process_time() - begin, loss.item()

    ours = [step() for _ in range(3)]
    everything = torch.arange(len(words)), [len(words)] * (words.shape[1] - 1)
    with (
        patch("caption_lab.decoder.longest_first", return_value=everything),
        patch("caption_lab.vocabulary.longest_first", return_value=everything),
    ):
        whole = [step() for _ in range(3)]
    return {
        "ours": min(ours)[0], "padded": min(whole)[0], "share": 1 - there[:, 1:].float().mean().item(),
        "differ": abs(ours[0][1] - whole[0][1]),
    }  # fmt: skip


@torch.no_grad()
def usual_beam(decoder: Any, feature: torch.Tensor, length: int) -> list[int]:
    """Beam search of one picture: `BEAMS` rows, each with the picture; finished captions leave."""
    features = feature[None].expand(BEAMS, *feature.shape)
    words = torch.full((BEAMS, 1), START)
    totals = torch.full((BEAMS,), -torch.inf)
    totals[0] = 0.0
    state = first_state(decoder, features)
    done: list[tuple[float, list[int]]] = []
    for step in range(length):
        logits, state = next_logits(decoder, features[: len(words)], words, state)
        scores = totals[:, None] + log_probabilities(logits, TOKENS.never)
        # A finished caption keeps one of the five places.
        best, flat = scores.flatten().topk(BEAMS - len(done))
        rows, chosen = flat // scores.shape[1], flat % scores.shape[1]
        open_ones: list[tuple[float, Any, int]] = [(float(value), None, index) for index, value in enumerate(best)]
        closed: list[tuple[float, Any, int]] = [(value, caption, -1) for value, caption in done]
        candidates = sorted(open_ones + closed, key=lambda item: -item[0])[:BEAMS]
        done = [(value, caption) for value, caption, _ in candidates if caption is not None]
        alive = [index for _, caption, index in candidates if caption is None]
        sequences = torch.cat([words[rows], chosen[:, None]], 1)
        done += [
            (float(best[i]), sequences[i, 1:].tolist()) for i in alive if int(chosen[i]) == END or step == length - 1
        ]
        alive = [i for i in alive if int(chosen[i]) != END]
        if not alive or (done and max(value for value, _ in done) >= max(float(best[i]) for i in alive)):
            break
        keep = torch.tensor(alive)
        words, totals = sequences[keep], best[keep]
        state = None if state is None else tuple(part[rows[keep]] for part in state)
    return max(done, key=lambda item: item[0])[1]


def first_state(decoder: Any, features: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Hidden and cell of an LSTM for every row."""
    if not isinstance(decoder, (ShowTell, ShowAttendTell)):
        return None
    _, moving = decoder.begin(features)
    return moving["hidden"][:, 0], moving["cell"][:, 0]


def next_logits(
    decoder: Any, features: torch.Tensor, words: torch.Tensor, state: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Of the next word of every row: from the state, or by reading the whole beginning again."""
    if state is None:
        return decoder(features, words).logits[:, -1], None
    # What depends on the picture alone is computed again for every row and word.
    fixed, _ = decoder.begin(features)
    logits, moving, _ = decoder.step(words[:, -1:], fixed, {"hidden": state[0][:, None], "cell": state[1][:, None]})
    return logits[:, 0], (moving["hidden"][:, 0], moving["cell"][:, 0])


WORKERS = {
    "ours": lambda options: our_training(options, by_picture=False),
    "ours, by picture": lambda options: our_training(options, by_picture=True),
    "by caption": lambda options: usual_training(options, by_picture=False),
    "by picture": lambda options: usual_training(options, by_picture=True),
    "beam": beam,
    "padding": padding,
}

if __name__ == "__main__":
    main()
