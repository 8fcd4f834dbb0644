"""The report of a pre-training: what its features are worth, in numbers and pictures, and how to go on with them."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from labs_common.data.classes import LabelledPictures
from labs_common.fitting import Fitted, results_of, write_results
from labs_common.progress import console
from labs_common.report.classes import Predictions, class_data_section, class_sections, wilson_interval
from labs_common.report.figures import curve_figure, map_figure
from labs_common.report.page import Code, Figure, Gallery, Section, Table, Text, save_figure, shown
from labs_common.report.sections import asked_section, cost_section, curves_section, rerun_section, trained_section
from labs_common.run import Run, seconds_between
from labs_common.saved import FOLDER
from zsi_contrastive import TINY
from zsi_contrastive.networks import PatchModules
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.data import Pixels, middle_square, pixels_of, recipes_of, views_of
from zsi_contrastive.ssl.evaluate import COLLAPSED, Features, linear_probe, scores
from zsi_contrastive.ssl.methods import METHODS, measured
from zsi_contrastive.ssl.model import Encoder
from zsi_contrastive.ssl.saved import WEIGHTS, load_encoder

EXAMPLES = 6  # test pictures beside their neighbours
ACROSS = 4  # pictures beside the first of a row: a row of the page has five
MAPPED = 1000  # test pictures on the map: t-SNE takes seconds for these, and more would hide each other
THUMBNAIL = 96  # pixels
MORE = {"probe by sgd": "linear probe by SGD on crops, test", "knn projected": "kNN, test, after the projection"}


def finish_report(
    run: Run,
    config: PretrainConfig,
    pixels: Mapping[str, Pixels],
    features: Mapping[str, Features],
    fitted: Fitted,
    teacher_tensors: int,
    clock: dict[str, float],
    more: Mapping[str, float],
) -> None:
    """Probes the features, writes results.json and the report, and prints the main numbers."""
    splits = {name: part.pictures for name, part in pixels.items()}
    test, classes = features["test"], features["test"].classes
    final = scores(features, config.measure)
    probe: Predictions | None = None
    if classes > 1 and config.measure.probe:
        probe = linear_probe(features)
        clock["probed"] = time.perf_counter()
    evaluations = [line for line in run.lines("metrics.jsonl") if "test/spread" in line]
    first = evaluations[0]
    worth = {"spread": final["test/spread"], "effective rank": final["test/effective_rank"],
             "spread before": first["test/spread"]}  # fmt: skip
    if classes > 1:
        worth |= {"knn": final["test/knn"], "knn before": first["test/knn"], "chance": 1 / classes,
                  "knn max": max(line["test/knn"] for line in evaluations)}  # fmt: skip
        if "validation/knn" in final:
            worth["knn validation"] = final["validation/knn"]
    if probe is not None:
        worth["probe"] = probe.accuracy
    worth |= more
    seconds, summary = seconds_between(clock), summary_of(config, worth)
    console.print(summary)
    print(f"encoder: {run.path / FOLDER / WEIGHTS}")

    def page() -> tuple[str, list[Section]]:
        data, trained = class_data_section(splits), trained_section(fitted.audit)
        data.blocks.append(views_gallery(config, pixels["train"]))
        if teacher_tensors:
            trained.blocks.append(Text(f"The teacher's {teacher_tensors} tensors follow the learner's as a moving "
                                       "average: none was given a gradient or is the optimizer's."))  # fmt: skip
        encoder = load_encoder(run.path)
        sections = [
            asked_section(config),
            data,
            trained,
            curves_section(run, ()),
            worth_section(run, config, worth, evaluations, len(test.labels)),
            neighbours_section(splits, features),
            map_section(run, config.measure.map, test, splits["test"].classes, config.run.seed),
            attention_section(encoder, pixels["test"], config.encoder.side),
            *(class_sections(run, splits["test"], probe) if probe is not None else []),
            use_section(run, config, encoder),
            cost_section(run, "pictures", seconds),
            rerun_section(run),
        ]
        return summary, [section for section in sections if section is not None]

    results = results_of(run, config, fitted, "pictures", seconds["prepared"]) | {"test": worth}
    write_results(run, results, config.run.report, f"Pre-training with {config.method}", page)


def summary_of(config: PretrainConfig, worth: Mapping[str, float]) -> str:
    """Puts the main numbers into a sentence."""
    said = f"{config.method}: spread {worth['spread']:.2f}, effective rank {worth['effective rank']:.1f}"
    if "knn" in worth:
        said = (f"{config.method}: neighbours name {worth['knn']:.1%} of the test pictures right (random weights "
                f"{worth['knn before']:.1%}, chance {worth['chance']:.1%})")  # fmt: skip
    if "probe" in worth:
        said += f", a linear layer {worth['probe']:.1%}"
    if worth["spread"] < COLLAPSED:
        said += "; the features have collapsed"
    return said + "."


def worth_section(
    run: Run, config: PretrainConfig, worth: Mapping[str, float], evaluations: list[dict[str, Any]], pictures: int
) -> Section:
    """Shows kNN accuracy on test `pictures` beside the random encoder's, the probe, and signs of collapse."""
    steps = [line["step"] for line in evaluations]
    rows: list[tuple[str, Any]] = []
    figures = []

    def draw(name: str, curves: Mapping[str, list[float]], up: str, caption: str) -> None:
        drawn = curve_figure({key: (steps, values) for key, values in curves.items()}, "optimizer step", up)
        figures.append(Figure(save_figure(run, name, drawn), caption))

    if "knn" in worth:
        low, high = wilson_interval(worth["knn"], pictures)
        rows += [("kNN, test", worth["knn"]), ("95 % interval", f"{low:.3f} to {high:.3f}"),
                 ("kNN, test, best of all evaluations", worth["knn max"]),
                 ("kNN, test, random weights", worth["knn before"]), ("chance", worth["chance"])]  # fmt: skip
        curves = {name: [line[f"{name}/knn"] for line in evaluations] for name in ("test", "validation")
                  if f"{name}/knn" in evaluations[0]}  # fmt: skip
        draw("knn", curves | {"random weights, test": [worth["knn before"]] * len(steps)}, "kNN accuracy",
             "Share of pictures whose nearest training pictures name their class. The best of all evaluations is "
             "chosen by the test pictures, and too good by that; benchmarks print it.")  # fmt: skip
    if "probe" in worth:
        rows.append(("linear probe, test", worth["probe"]))
    rows += [(said, worth[name]) for name, said in MORE.items() if name in worth]
    rows += [("spread", worth["spread"]), ("effective rank", worth["effective rank"])]
    draw("spread", {"spread": [line["test/spread"] for line in evaluations]}, "spread",
         "Deviation of the features' directions; 0 is collapse, all pictures look alike.")  # fmt: skip
    draw("rank", {"rank": [line["test/effective_rank"] for line in evaluations]}, "effective rank",
         "How many dimensions the features use.")  # fmt: skip
    of_teacher = ", of the teacher" if measured(config) == "teacher" else ""
    note = (f"Method: {METHODS[config.method].about}. Features are those before the heads{of_teacher}. Spread is 1 "
            "where directions fill all of the space (SimSiam's measure times the root of the width).")  # fmt: skip
    return Section("What the features are worth", [Text(note), Table(("", ""), rows), *figures])


def use_section(run: Run, config: PretrainConfig, encoder: torch.nn.Module) -> Section:
    """Says how to go on with the encoder, with the commands."""
    file, name = run.path / FOLDER / WEIGHTS, config.encoder.backbone
    commands: list[str] = []
    if isinstance(encoder, PatchModules) and not encoder.isolated:
        said = "zsi_contrastive.ssl.saved.load_encoder reads the encoder."
    elif isinstance(encoder, PatchModules):
        said = "Its modules start the detector's Greedy InfoMax head."
        backbone = "" if name == TINY else "--backbone resnet101 "
        commands = [f"python -m zsi_contrastive.train {backbone}--greedy-infomax --greedy-weights {file}"]
    elif config.encoder.stem == "small":
        said = "A network with a small stem is another network than the detector's: train with --stem usual for that."
    else:
        said = "The weights start a detector, if the network has feature maps at strides of 4 to 32"
        said += "." if name == TINY else ", and the networks of other labs."
        commands = [f"python -m zsi_contrastive.train --backbone {name} --backbone-weights {file}"]
        if name != TINY:
            commands += [f"python -m vit_transfer.train --model {name} --weights {file}",
                         f"python -m clip_lab.train --image {name} --image-weights {file}"]  # fmt: skip
    return Section("How to use it", [Text(said), *map(Code, commands)])


def views_gallery(config: PretrainConfig, pixels: Pixels) -> Gallery:
    """Shows some training pictures, each beside random views of it."""
    places = torch.linspace(0, len(pixels) - 1, 4).long()
    of_method = recipes_of(config.encoder, config.views, METHODS[config.method].full_views)
    recipes = (of_method * ACROSS)[:ACROSS]
    aspects, own, seed = pixels.aspects[places], slice(0, len(places)), config.run.seed
    views = views_of(pixels.to_crop(places, recipes, aspects, seed, 0, own), aspects, recipes, seed, 0, own)
    rows: list[tuple[Image.Image, str]] = []
    for number, place in enumerate(places.tolist()):
        rows.append((_thumbnail(pixels.pictures.image(place)), "picture"))
        for view, recipe in zip(views, recipes, strict=True):
            small = recipe.side != config.encoder.side
            rows.append((_thumbnail(_image(view[number])), "small view" if small else "view"))
    return Gallery(rows, "Training pictures and views of them: what the network learns to see as one.")


def neighbours_section(splits: Mapping[str, LabelledPictures], features: Mapping[str, Features]) -> Section:
    """Shows test pictures, each before the training pictures with the nearest features."""
    test, train, bank = splits["test"], splits["train"], features["train"]
    chosen = np.linspace(0, len(test) - 1, EXAMPLES).round().astype(int)
    cosines = F.normalize(features["test"].values, dim=1)[chosen] @ F.normalize(bank.values, dim=1).T
    nearest = cosines.topk(min(ACROSS, cosines.shape[1]), dim=1)
    rows: list[tuple[Image.Image, str]] = []
    for place, near, likeness in zip(chosen, nearest.indices.cpu(), nearest.values.cpu(), strict=True):
        rows.append((_thumbnail(test.image(int(place))), f"asked: {_name(test, int(place))}"))
        for number, cosine in zip(bank.places[near].tolist(), likeness.tolist(), strict=True):
            rows.append((_thumbnail(train.image(number)), f"{cosine:.2f} {_name(train, number)}"))
    caption = f"Test pictures and the {nearest.indices.shape[1]} training pictures with the nearest features (cosine)."
    return Section("Nearest neighbours", [Gallery(rows, caption)])


def map_section(run: Run, kind: str, asked: Features, names: tuple[str, ...], seed: int) -> Section | None:
    """Draws test pictures' features in two dimensions; None if no map was asked for, or there is nothing to map."""
    values = F.normalize(asked.values, dim=1)[:MAPPED].cpu().numpy()
    if kind == "none" or len(values) < 3:
        return None
    if kind == "tsne":
        perplexity = min(30, (len(values) - 1) / 3)  # its usual value, as far as there are three times as many pictures
        places = TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(values)
        said = "t-SNE (van der Maaten & Hinton 2008): near points are alike, distances between groups mean nothing."
    else:
        places = PCA(2, random_state=seed).fit_transform(values)
        said = "Their first two principal components."
    points = [(float(x), float(y)) for x, y in places]
    drawn = save_figure(run, "map", map_figure(points, asked.labels[:MAPPED].tolist(), names))
    return Section("Map of the features", [Figure(drawn, f"{len(points)} test pictures by their features. {said}")])


def attention_section(encoder: torch.nn.Module, pixels: Pixels, side: int) -> Section | None:
    """Draws where the class token of a vision transformer's last block looks, by head; None for other networks."""
    network = encoder.network if isinstance(encoder, Encoder) else None
    if network is None or not any(name.startswith("blocks.0.attn") for name, _ in network.named_modules()):
        return None
    places = torch.linspace(0, len(pixels) - 1, 4).long()
    pictures = middle_square(pixels.batch(places), pixels.aspects[places], side).cpu()  # where the encoder was loaded
    maps = class_attention(network, pictures)
    if maps is None:
        return None
    rows: list[tuple[Image.Image, str]] = []
    for picture, heads in zip(pictures, maps, strict=True):
        rows.append((_thumbnail(_image(picture)), "picture"))
        for number, head in enumerate(heads[:ACROSS]):
            grey = (head / head.max().clamp(min=1e-9) * 255).byte().numpy()
            rows.append((_thumbnail(Image.fromarray(grey)), f"head {number}"))
    note = ("Attention of the class token to the patches in the last block; in a network trained with DINO it often "
            "lies on things (Caron et al. 2021, figure 1).")  # fmt: skip
    return Section("Where it looks", [Text(note), Gallery(rows, "Brighter patches count more.")])


@torch.no_grad()
def class_attention(network: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor | None:
    """Computes attention (n, heads, rows, columns) of the class token in a timm ViT's last block; None without one."""
    attention: Any = [*network.get_submodule("blocks").children()][-1].get_submodule("attn")
    patches: Any = getattr(network, "patch_embed", None)
    if patches is None or getattr(network, "cls_token", None) is None or not hasattr(attention, "qkv"):
        return None
    kept: list[torch.Tensor] = []
    handle = attention.qkv.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        network(pictures)
    finally:
        handle.remove()
    count, tokens, _ = kept[0].shape
    # (n, tokens, 3 · width) to query, key and value (n, heads, tokens, width of a head)
    query, key, _ = kept[0].view(count, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    shares = (query[:, :, :1] @ key.transpose(-1, -2) * attention.scale).softmax(-1)[:, :, 0]  # (n, heads, tokens)
    rows, columns = (size // patch for size, patch in zip(pictures.shape[-2:], patches.patch_size, strict=True))
    return shares[:, :, -rows * columns :].view(count, -1, rows, columns)  # class and register tokens come first


def _name(pictures: LabelledPictures, place: int) -> str:
    return pictures.classes[int(pictures.labels[place])] if len(pictures.classes) > 1 else pictures.names[place]


def _image(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels_of(view[None])[0].cpu().numpy())


def _thumbnail(image: Image.Image) -> Image.Image:
    return shown(image, THUMBNAIL)
