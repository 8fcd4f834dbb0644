"""What the report shows of pictures: views, neighbours, a map of features, where a transformer looks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from labs_common.data import LabelledPictures
from labs_common.report import Figure, Gallery, Section, Text, save_figure
from labs_common.report.captioned import shown
from labs_common.report.figures import map_figure
from labs_common.run import Run
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.data import Levels
from zsi_contrastive.ssl.evaluate import Features
from zsi_contrastive.ssl.model import Encoder
from zsi_contrastive.ssl.views import plain, recipes_of, views_of
from zsi_contrastive.ssl.views import shown as as_levels

EXAMPLES, MAPPED, THUMBNAIL = 6, 1000, 96
ACROSS = 4  # beside the picture: a row of the page has five


def views_gallery(config: PretrainConfig, levels: Levels) -> Gallery:
    """Some training pictures, each beside random views of it."""
    places = torch.linspace(0, len(levels) - 1, 4).long()
    recipes = (recipes_of(config) * ACROSS)[:ACROSS]
    pictures = levels.batch(places)
    views = views_of(pictures, levels.aspects[places], recipes, config.run.seed, 0, slice(0, len(places)))
    rows: list[tuple[Image.Image, str]] = []
    for number, place in enumerate(places.tolist()):
        rows.append((_thumbnail(levels.pictures.image(place)), "picture"))
        for view, recipe in zip(views, recipes, strict=True):
            small = recipe.side != config.encoder.side
            rows.append((_thumbnail(_image(view[number])), "small view" if small else "view"))
    return Gallery(rows, "Training pictures and views of them: what the network learns to see as one.")


def neighbours_gallery(test: LabelledPictures, train: LabelledPictures, asked: Features, bank: Features) -> Gallery:
    """Test pictures, each before its nearest training pictures."""
    chosen = np.linspace(0, len(test) - 1, EXAMPLES).round().astype(int)
    cosines = F.normalize(asked.values, dim=1)[chosen] @ F.normalize(bank.values, dim=1).T
    found = cosines.topk(ACROSS, dim=1)
    rows: list[tuple[Image.Image, str]] = []
    for place, near, likeness in zip(chosen, found.indices.cpu(), found.values.cpu(), strict=True):
        rows.append((_thumbnail(test.image(int(place))), f"asked: {_name(test, int(place))}"))
        for other, cosine in zip(near.tolist(), likeness.tolist(), strict=True):
            number = int(bank.places[other])
            rows.append((_thumbnail(train.image(number)), f"{cosine:.2f} {_name(train, number)}"))
    return Gallery(rows, f"Test pictures and the {ACROSS} training pictures with the nearest features (cosine).")


def map_section(run: Run, kind: str, asked: Features, names: tuple[str, ...], seed: int) -> Section:
    """Test pictures' features in two dimensions."""
    values = F.normalize(asked.values, dim=1)[:MAPPED].cpu().numpy()
    labels = asked.labels[:MAPPED].tolist()
    points = [(float(x), float(y)) for x, y in MAPS[kind](values, seed)]
    said = {"tsne": "t-SNE (van der Maaten & Hinton 2008): near points are alike, distances between groups mean "
                    "nothing.", "pca": "Their first two principal components."}  # fmt: skip
    figure = Figure(save_figure(run, "map", map_figure(points, labels, names)),
                    f"{len(points)} test pictures by their features. {said[kind]}")  # fmt: skip
    return Section("Map of the features", [figure])


def _tsne(values: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    found: np.ndarray = TSNE(2, perplexity=min(30, (len(values) - 1) / 3), random_state=seed).fit_transform(values)
    return found


def _pca(values: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    found: np.ndarray = PCA(2, random_state=seed).fit_transform(values)
    return found


MAPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"tsne": _tsne, "pca": _pca}


def attention_section(encoder: torch.nn.Module, levels: Levels, side: int) -> Section | None:
    """Where the class token of a vision transformer's last block looks, by head; None for other networks."""
    network = encoder.network if isinstance(encoder, Encoder) else None
    if network is None or not any(name.startswith("blocks.0.attn") for name, _ in network.named_modules()):
        return None
    places = torch.linspace(0, len(levels) - 1, 4).long()
    pictures = plain(levels.batch(places), levels.aspects[places], side)
    maps = class_attention(network, pictures)
    if maps is None:
        return None
    rows: list[tuple[Image.Image, str]] = []
    for picture, heads in zip(pictures, maps, strict=True):
        rows.append((_thumbnail(_image(picture)), "picture"))
        for number, head in enumerate(heads[:ACROSS]):
            grey = (head / head.max().clamp(min=1e-9) * 255).byte().cpu().numpy()
            rows.append((_thumbnail(Image.fromarray(grey)), f"head {number}"))
    return Section("Where it looks", [
        Text("Attention of the class token to the patches in the last block; in a network trained with DINO it often "
             "lies on things (Caron et al. 2021, figure 1)."),
        Gallery(rows, "Brighter patches count more."),
    ])  # fmt: skip


@torch.no_grad()
def class_attention(network: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor | None:
    """Attention (n, heads, rows, columns) of the class token in the last block of a timm ViT; None if it has none."""
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
    query, key, _ = kept[0].view(count, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    shares = (query[:, :, :1] @ key.transpose(-1, -2) * attention.scale).softmax(-1)[:, :, 0]
    rows, columns = (size // patch for size, patch in zip(pictures.shape[-2:], patches.patch_size, strict=True))
    return shares[:, :, -rows * columns :].view(count, -1, rows, columns)


def _name(pictures: LabelledPictures, place: int) -> str:
    return pictures.classes[int(pictures.labels[place])] if len(pictures.classes) > 1 else pictures.names[place]


def _image(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(as_levels(view[None])[0].cpu().numpy())


def _thumbnail(image: Image.Image) -> Image.Image:
    return shown(image, THUMBNAIL)
