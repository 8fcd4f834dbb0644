"""CLIP, side by side: the training step, the loss of a large batch, the linear probe, and what the user waits for.

    uv run python benchmarks/clip.py                          # all of it
    uv run python benchmarks/clip.py --parts loss --rows 32768

Everything is measured in a process of its own. `step` is against open_clip on the same towers, weights, pictures and
captions, so losses are compared step by step; `loss` is the peak memory of loss and gradient; `probe` is scikit-learn
against the batched solve, at the same objective, and `sweep` a round of the search for the penalty; `features` is the
frozen tower's speed with decoding and keeping against the tower alone; `waiting` is the share of a training's time in
which it waits for its next batch; `search` is one query among drawn vectors, by a matrix product and by FAISS.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from clip_lab.config import BatchOptions, CacheOptions, HeadOptions, ImageOptions, TrainConfig
from clip_lab.data import Batches, Pairs, picture_rows, read_data, transform_of
from clip_lab.encoder import load_encoder
from clip_lab.image import make_image_tower
from clip_lab.index import Index
from clip_lab.losses import Embeddings, clip_loss, contrastive, pictures_of
from clip_lab.model import ClipModel, training_mode
from clip_lab.probe import features_of
from clip_lab.saved import Loaded, to_open_clip
from clip_lab.text import TextTower
from clip_lab.tokens import Words, make_words
from labs_common.data.captions import PictureTensors
from labs_common.data.classes import LabelledPictures
from labs_common.data.images import checked
from labs_common.device import peak_memory
from labs_common.logistic import COARSE, Layer, fitted_layers, solved
from labs_common.options import CaptionDataOptions
from labs_common.run import write_atomically
from labs_common.saved import load_auto
from labs_common.scenes.files import write_flickr8k

WIDTH, CHUNK, RATE = 512, 1024, 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Options:
    """Compares clip_lab side by side with what else there is."""

    parts: tuple[str, ...] = ("step", "loss", "probe", "sweep", "features", "waiting", "search")
    """What to measure."""
    image: str = "vit_small_patch16_224"
    """Towers of `step`, `features` and `waiting`."""
    batch: int = 32
    """Pictures of a training step."""
    steps: int = 6
    """Steps that are timed, after one that is not."""
    rows: int = 16384
    """Batch of `loss`, for both; ours is measured at twice that as well."""
    features: int = 50_000
    """Rows of `probe` and `sweep`, of 512 values."""
    searched: int = 100_000
    """Pictures of `search`, with 512 values each."""
    output: Path = Path("benchmarks/results/clip.json")
    """Where the figures go."""
    worker: str | None = None
    """Used by the benchmark itself: measure one thing in this process."""


def main() -> None:
    """Measures everything in a process of its own, prints the tables and writes the figures."""
    options = tyro.cli(Options)
    if options.worker is not None:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    figures: dict[str, Any] = {}
    for worker in WORKERS:
        if worker.split()[0] not in options.parts:
            continue
        given = {"image": options.image, "batch": options.batch, "steps": options.steps, "rows": options.rows,
                 "features": options.features, "searched": options.searched}  # fmt: skip
        flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--worker", worker, *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # One that the system stops for want of memory is a result too.
        figures[worker] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        if done.returncode > 0:
            raise SystemExit(f"{worker}: failed\n{done.stderr[-2000:]}")
        print(f"{worker}: done", file=sys.stderr)
    table = Table("what", "ours", "the other", "ratio", "agreement")
    for row in shown(figures):
        table.add_row(*row)
    Console(width=150).print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, json.dumps({"device": str(DEVICE), **figures}, indent=1) + "\n")


def shown(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each comparison."""
    rows: list[tuple[str, ...]] = []
    if step := figures.get("step"):
        rows.append(("training step, s", f"{step['ours']:.3f}", f"open_clip {step['theirs']:.3f}",
                     f"{step['theirs'] / step['ours']:.2f} x", f"losses differ by {step['differ']:.1e}"))  # fmt: skip
    if loss := figures.get("loss ours"):
        naive = figures["loss naive"]
        other = f"open_clip {naive['bytes'] / 2**20:,.0f}" if naive else "more than there is"
        share = f"{loss['bytes'] / naive['bytes']:.3f}" if naive else ""
        rows.append((f"memory of the loss at {loss['rows']:,}, MiB", f"{loss['bytes'] / 2**20:,.0f}", other, share,
                     f"loss {loss['loss']:.5f} and {naive['loss']:.5f}" if naive else ""))  # fmt: skip
        large = figures["loss ours twice"]
        rows.append((f"memory of the loss at {large['rows']:,}, MiB", f"{large['bytes'] / 2**20:,.0f}", "", "", ""))
    if probe := figures.get("probe"):
        rows.append(("linear probe, s", f"{probe['ours']:.2f}", f"scikit-learn {probe['scikit']:.2f}",
                     f"{probe['scikit'] / probe['ours']:.2f} x",
                     f"objectives {probe['objectives'][0]:.6f}, {probe['objectives'][1]:.6f}; "
                     f"accuracies {probe['accuracies'][0]:.4f}, {probe['accuracies'][1]:.4f}"))  # fmt: skip
    if swept := figures.get("sweep"):
        ratio = f"{swept['scikit'] / swept['ours']:.2f} x"
        rows.append((f"{len(COARSE)} penalties at once, s", f"{swept['ours']:.2f}",
                     f"scikit-learn {swept['scikit']:.2f}", ratio, ""))  # fmt: skip
    if features := figures.get("features"):
        rows.append(("features, pictures/s", f"{features['whole']:.1f}", f"the bare tower {features['bare']:.1f}",
                     f"{features['whole'] / features['bare']:.2f}",
                     f"again from disk {features['again']:,.0f}"))  # fmt: skip
    if waiting := figures.get("waiting"):
        rows.append(("share of time waiting for data", f"{waiting['share']:.4f}", "", "", ""))
    if found := figures.get("search"):
        rows.append((f"search among {found['pictures']:,}, ms", f"FAISS {found['faiss']:.2f}",
                     f"matrix product {found['exact']:.2f}", f"{found['exact'] / found['faiss']:.1f} x",
                     f"{found['same']:.1%} of the first ten; FAISS's lists took {found['built']:.0f} s"))  # fmt: skip
    return rows


def towers(options: Options, words: Words) -> tuple[ClipModel, Any]:
    """Ours, and open_clip's model with the same weights."""
    import open_clip

    torch.manual_seed(0)
    text = TextTower(len(words), 256, 4, 8, words.length, words.end)
    model = ClipModel(make_image_tower(ImageOptions(options.image, False)), text, HeadOptions(embedding=256))
    with tempfile.TemporaryDirectory() as folder:
        to_open_clip(Loaded("clip", model, words, transform_of(model.image)), Path(folder) / "exported")
        theirs = load_auto(open_clip.create_model, f"local-dir:{folder}/exported", said="exported", remedy="try again")
    return model.to(DEVICE), theirs.to(DEVICE).train()


def drawn(options: Options, cache: bool) -> tuple[Pairs, Words]:
    """Drawn pictures of 256 pixels with captions, as the tower reads them."""
    count = options.batch * (options.steps + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_flickr8k(folder, range(round(count / 0.8) + 2), side=256)
        part = read_data(CaptionDataOptions(data=str(folder)), 0, shown=False).splits["train"].subset(range(count))
        words = make_words("sentencepiece", [caption for of in part.captions for caption in of], 1000, 0)
        tower = make_image_tower(ImageOptions(options.image, False))
        rows = picture_rows(
            "bench", PictureTensors(part, transform_of(tower)), CacheOptions(cache=cache), Accelerator()
        )
        numbers = [[words.numbers(caption) for caption in of] for of in part.captions]
        if not cache:  # the folder goes away: all are decoded now
            decoded = rows.rows(0, range(count))
            rows = SimpleNamespace(rows=lambda _, places: decoded[list(places)])
    return Pairs(rows, tower.size, False, numbers, np.arange(count)), words


def fitting_of(model: ClipModel) -> Any:
    """As much of a training as a step reads."""
    training_mode(model, model)
    config = TrainConfig(head=HeadOptions(embedding=256))
    return SimpleNamespace(config=config, accelerator=Accelerator(), model=model, plain=model)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def step(options: Options) -> dict[str, Any]:
    """Median seconds of a step, ours and open_clip's in turn, and how far their losses are apart."""
    from open_clip import ClipLoss

    pairs, words = drawn(options, cache=False)
    model, theirs = towers(options, words)
    fitting, criterion = fitting_of(model), ClipLoss()
    optimizers = [torch.optim.AdamW(which.parameters(), lr=RATE, fused=True) for which in (model, theirs)]
    source = Batches(pairs, words, BatchOptions(captions_per_picture=1, augment="none"), 0).steps(options.batch)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    differ = 0.0
    for whole, number in (parts[0] for parts in source.steps(0, 0)):
        part = whole.parts[0]

        def ours(whole: Any = whole, number: int = number) -> float:
            loss, _ = contrastive(fitting, fitting.config, whole, number)
            loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            return float(loss.detach())

        text = part.words.to(DEVICE)
        text = F.pad(text, (0, words.length - text.shape[1]), value=words.pad)  # open_clip's own tokenizer pads

        def others(part: Any = part, text: torch.Tensor = text) -> float:
            image, said, scale = theirs(pictures_of(fitting, part), text)
            loss = criterion(image, said, scale)
            loss.backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
            return float(loss.detach())

        mine, its = timed(ours), timed(others)
        seconds["ours"].append(mine[0])
        seconds["theirs"].append(its[0])
        differ = max(differ, abs(mine[1] - its[1]))
    return {name: float(np.median(found[1:])) for name, found in seconds.items()} | {"differ": differ}


def loss_memory(rows: int, naive: bool) -> dict[str, Any]:
    """Bytes that loss and gradient of a batch need beyond the embeddings."""
    from open_clip import ClipLoss

    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, WIDTH, device=DEVICE), dim=1).requires_grad_() for _ in range(2))
    scale, ids = torch.tensor(14.3, device=DEVICE, requires_grad=True), torch.arange(rows, device=DEVICE)
    few = Embeddings(image[:64], text[:64], ids[:64], ids[:64])
    clip_loss(few, scale).backward()  # libraries take their own room once
    before = peak_memory()
    every = Embeddings(image, text, ids, ids)
    found = ClipLoss()(image, text, scale) if naive else clip_loss(every, scale, chunk=CHUNK)
    found.backward()
    return {"bytes": peak_memory() - before, "loss": float(found.detach()), "rows": rows}


def probed(options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of ten classes that overlap, and labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, WIDTH, generator=generator)
    labels = torch.randint(10, (options.features,), generator=generator)
    return centres[labels] * 0.12 + torch.randn(options.features, WIDTH, generator=generator), labels


def probe(options: Options) -> dict[str, Any]:
    """Seconds, objective and accuracy of scikit-learn, and of the batched solve on this device."""
    features, labels = probed(options)
    penalty = 1e-3

    def objective(layer: Layer) -> float:
        loss = F.cross_entropy(layer.logits(features).double(), labels)
        return float(loss + penalty / 2 * layer.weight.double().pow(2).sum())

    def accuracy(layer: Layer) -> float:
        return float((layer.logits(features).argmax(1) == labels).double().mean())

    fitted_layers(features[:500], labels[:500], 10, [penalty])  # imports
    scikit, theirs = timed(lambda: fitted_layers(features, labels, 10, [penalty])[0])
    there = (features.to(DEVICE), labels.to(DEVICE))
    solved(there[0][:500], there[1][:500], 10, [penalty])
    ours, mine = timed(lambda: solved(*there, 10, [penalty])[0])
    both = [Layer(layer.weight.cpu(), layer.bias.cpu()) for layer in (mine, theirs)]
    return {"scikit": scikit, "ours": ours,
            "objectives": list(map(objective, both)), "accuracies": list(map(accuracy, both))}  # fmt: skip


def sweep(options: Options) -> dict[str, float]:
    """Seconds of a round of the search for the penalty: scikit-learn one by one, ours all at once."""
    features, labels = probed(options)
    there = (features.to(DEVICE), labels.to(DEVICE))
    fitted_layers(features[:500], labels[:500], 10, [1e-3])  # imports
    solved(there[0][:500], there[1][:500], 10, [1e-3])
    ours, _ = timed(lambda: solved(*there, 10, COARSE))
    scikit, _ = timed(lambda: fitted_layers(features, labels, 10, COARSE))
    return {"scikit": scikit, "ours": ours}


def features(options: Options) -> dict[str, Any]:
    """Pictures a second: the tower on tensors that are there, decoding and keeping included, and read again."""
    encoder = load_encoder(f"timm:{options.image},random")
    count = options.batch * 16
    levels = np.random.default_rng(0).integers(0, 255, (count, 256, 256, 3), dtype=np.uint8)
    noise = LabelledPictures(
        source="noise", classes=("one", "two"), labels=np.arange(count) % 2, contents=list(levels),
        names=[str(number) for number in range(count)],
    )  # fmt: skip
    pictures = checked(noise, "error", False)
    batch = torch.stack([encoder.view(pictures.image(place)) for place in range(options.batch)])

    @torch.no_grad()
    def bare() -> None:
        for _ in range(16):
            encoder.features(batch.to(DEVICE)).float().cpu()

    bare()
    alone, _ = timed(bare)
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.environ["XDG_CACHE_HOME"] = folder
        splits = {"test": pictures}
        whole, _ = timed(lambda: features_of(encoder, splits, "tower", options.batch, True))
        again, _ = timed(lambda: features_of(encoder, splits, "tower", options.batch, True))
    return {"bare": count / alone, "whole": count / whole, "again": count / again}


def waiting(options: Options) -> dict[str, Any]:
    """The share of the time of a training's steps that passes before the next batch is there."""
    pairs, words = drawn(options, cache=True)
    model, _ = towers(options, words)
    fitting = fitting_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    source = Batches(pairs, words, BatchOptions(augment="crop+colour"), 0).steps(options.batch)
    waited, start = 0.0, time.perf_counter()
    steps = iter(source.steps(0, 0))
    while True:
        before = time.perf_counter()
        parts = next(steps, None)
        waited += time.perf_counter() - before
        if parts is None:
            break
        for whole, number in parts:
            loss, _ = contrastive(fitting, fitting.config, whole, number)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"share": waited / (time.perf_counter() - start)}


def search(options: Options) -> dict[str, Any]:
    """Milliseconds of a query among drawn vectors in a thousand clouds, and the share of the true ten that is found."""
    generator = torch.Generator().manual_seed(0)

    def drawn_vectors(count: int) -> torch.Tensor:
        clouds = centres[torch.randint(len(centres), (count,), generator=generator)]
        return F.normalize(clouds + torch.randn(count, WIDTH, generator=generator), dim=1)

    centres = torch.randn(1000, WIDTH, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        names = tuple(Path(f"{number}.jpg") for number in range(options.searched))
        index, queries = Index(names, drawn_vectors(options.searched), Path(folder)), drawn_vectors(50)
        built, _ = timed(lambda: index.inverted)
        seconds: dict[str, list[float]] = {}
        found: dict[str, list[set[int]]] = {}
        for query in queries.split(1):
            for how in ("exact", "faiss"):
                took, (_, places) = timed(lambda how=how, query=query: index.nearest(query, 10, how))  # type: ignore[misc]
                seconds.setdefault(how, []).append(1000 * took)
                found.setdefault(how, []).append({*places[0].tolist()})
    same = np.mean([len(one & other) / 10 for one, other in zip(found["exact"], found["faiss"], strict=True)])
    medians = {how: float(np.median(each)) for how, each in seconds.items()}
    return {"pictures": options.searched, "built": built, "same": float(same), **medians}


WORKERS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "step": step,
    "loss ours": lambda options: loss_memory(options.rows, False),
    "loss naive": lambda options: loss_memory(options.rows, True),
    "loss ours twice": lambda options: loss_memory(2 * options.rows, False),
    "probe": probe,
    "sweep": sweep,
    "features": features,
    "waiting": waiting,
    "search": search,
}


if __name__ == "__main__":
    main()
