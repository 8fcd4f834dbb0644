"""The offline encoder: a small CNN of timm, pre-trained here on first use on what drawn scenes show.

It learns which shape, colour, texture and size each place of its grid shows and where that place is, and, from the mean
over all places, which pairs of shape and colour there are, where each shape lies, and the background. About two minutes
on two cores; then kept in the user's cache.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from labs_common.cache import cached_directory
from labs_common.progress import tracked
from labs_common.scenes.captions import captions
from labs_common.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    picture,
    random_scene,
    scene_generator,
)
from labs_common.tiny import reproducible, train_tiny

# As small as the things of a scene can still be told apart, and a grid of 6 × 6 places to attend to.
SIDE, CELL = 48, 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
THIRDS = 3  # left, middle, right; top, middle, bottom: the places that captions name
# The labels of each cell, by kind; a cell without a thing shows the background, whatever the kind.
NAMES = {
    kind: [*names, *BACKGROUNDS]
    for kind, names in (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES), ("size", SIZES))
}
# Weights in the loss: most cells show background, which counts less; of over a hundred facts few are so of a scene,
# and their mean is small against the sum over six kinds of labels.
BACKGROUND, FACTS = 0.2, 50.0
RECIPE: dict[str, Any] = {
    "architecture": "resnet10t", "arguments": {"channels": (32, 64, 96, 128), "output_stride": CELL},
    "pictures": 10000, "steps": 1800, "batch": 32, "learning_rate": 4e-3, "things": 3,
    "shapes": ("circle", "square", "triangle", "star", "moon"),
    "colours": ("red", "yellow", "green", "blue", "purple", "white"), "textures": ("plain", "striped", "dotted"),
    "radii": ((0.14, 0.17), (0.22, 0.27)),  # nothing between medium and large
}  # fmt: skip
# The language model: 80 seconds of one core; 1.01 nats a token of captions of other scenes.
LANGUAGE: dict[str, Any] = {
    "tokens": 512, "scenes": 4000, "steps": 700, "batch": 64, "learning_rate": 3e-3,
    "sizes": {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
              "attn_pdrop": 0.0},
}  # fmt: skip
LAST = "<|endoftext|>"


def demo_scene(generator: np.random.Generator) -> Scene:
    """Draws one to three things of `RECIPE`'s looks: as much as 48 pixels and two minutes of training can tell."""
    count = 1 + int(generator.integers(RECIPE["things"]))
    names = [RECIPE[kind] for kind in ("shapes", "colours", "textures")]
    looks = [tuple(kind[generator.integers(len(kind))] for kind in names) for _ in range(count)]
    radii = [RECIPE["radii"][generator.integers(2)] for _ in range(count)]
    return random_scene(generator, count, radii, looks)


def tiny_arguments() -> dict[str, Any]:
    """Returns what timm's `create_model` needs besides the name to build the network."""
    shown = {"mean": MEAN, "std": STD, "input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "pool_size": None}
    return dict(RECIPE["arguments"]) | {"pretrained_cfg_overlay": shown}


def tiny_weights() -> dict[str, torch.Tensor]:
    """Returns the pre-trained weights; trains them if that was never done here."""
    return load_file(cached_directory("caption-tiny-cnn", RECIPE | {"format": 1}, _make) / "model.safetensors")


def _make(folder: Path) -> None:
    with reproducible():
        state = _pretrained().state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def _pretrained() -> torch.nn.Module:
    images, cells, wholes = _scenes(RECIPE["pictures"])
    model: Any = timm.create_model(RECIPE["architecture"], num_classes=0, **tiny_arguments()).train()
    # On a CPU the training takes half as long again without this layout.
    model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    kinds = [*(len(names) for names in NAMES.values()), SIDE // CELL, SIDE // CELL]
    by_cell = torch.nn.Conv2d(model.num_features, sum(kinds), 1)
    of_whole = torch.nn.Linear(model.num_features, wholes.shape[1])

    weights = [torch.tensor([BACKGROUND if n in BACKGROUNDS else 1.0 for n in names]) for names in NAMES.values()]
    weights += [torch.full((SIDE // CELL,), BACKGROUND)] * 2  # equal weights: they cancel

    def loss_of(places: torch.Tensor) -> torch.Tensor:
        features = model.forward_features((images[places].float() / 255 - MEAN[0]) / STD[0])  # (batch, width, 6, 6)
        said = by_cell(features).split(kinds, 1)  # for each kind (batch, labels, 6, 6)
        losses = [
            F.cross_entropy(logits, cells[places, kind].long(), weight)
            for kind, (logits, weight) in enumerate(zip(said, weights, strict=True))
        ]
        there = of_whole(features.mean((2, 3)))
        return sum(losses) + FACTS * F.binary_cross_entropy_with_logits(there, wholes[places].float())

    parameters = [*model.parameters(), *by_cell.parameters(), *of_whole.parameters()]
    train_tiny(parameters, loss_of, len(images), RECIPE["steps"], RECIPE["batch"], RECIPE["learning_rate"],
               "pre-training the tiny CNN on scenes")  # fmt: skip
    return model.eval()


def _scenes(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws pictures (count, 3, side, side) with labels by cell (count, 6, rows, columns) and facts (count, facts)."""
    images, cells, wholes = [], [], []
    for number in tracked(range(count), "drawing scenes for the tiny CNN", count):
        scene = demo_scene(scene_generator(1, number))
        images.append(np.asarray(picture(scene, SIDE)))
        cells.append(_kinds_by_cell(scene))
        wholes.append(_facts(scene))
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(cells)),
        torch.from_numpy(np.stack(wholes)),
    )


def _kinds_by_cell(scene: Scene) -> np.ndarray:
    """Labels each cell by what is at its middle, in each of `NAMES`, and by its row and column (6, rows, columns)."""
    found = []
    for kind, names in NAMES.items():
        canvas = Image.new("L", (SIDE, SIDE), names.index(scene.background))
        for thing in scene.things:
            ImageDraw.Draw(canvas).polygon(thing.outline(SIDE).ravel().tolist(), fill=names.index(getattr(thing, kind)))
        found.append(np.asarray(canvas)[CELL // 2 :: CELL, CELL // 2 :: CELL])
    return np.stack([*found, *np.indices(found[0].shape, dtype=np.uint8)])


def _facts(scene: Scene) -> np.ndarray:
    """Marks the pairs of shape and colour there are, the thirds that each shape is in, and the background."""
    shapes, colours = list(SHAPES), list(COLOURS)
    pairs = np.zeros((len(shapes), len(colours)), dtype=np.uint8)
    places = np.zeros((len(shapes), 2, THIRDS), dtype=np.uint8)
    for thing in scene.things:
        shape = shapes.index(thing.shape)
        pairs[shape, colours.index(thing.colour)] = 1
        places[shape, 0, min(THIRDS - 1, int(thing.x * THIRDS))] = 1
        places[shape, 1, min(THIRDS - 1, int(thing.y * THIRDS))] = 1
    ground = np.array([name == scene.background for name in BACKGROUNDS], dtype=np.uint8)
    return np.concatenate([pairs.ravel(), places.ravel(), ground])


def tiny_language_model() -> Path:
    """Returns the directory of a small GPT-2 that knows how scenes are spoken of, and never saw one; made on first use.

    transformers loads it as any other. It is trained on captions of other scenes than those of the data.
    """
    recipe = LANGUAGE | {"things": RECIPE, "format": 1}
    return cached_directory("caption-tiny-gpt2", recipe, _make_language)


def _make_language(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds, and only --model clipcap needs it

    texts = []
    for number in range(LANGUAGE["scenes"]):
        generator = scene_generator(1, number)
        texts += captions(demo_scene(generator), generator)
    tokenizer = Tokenizer(models.BPE())  # of bytes, as GPT-2's own
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=LANGUAGE["tokens"], special_tokens=[LAST], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": LAST, "bos_token": LAST, "unk_token": LAST}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
    rows = [[0, *tokenizer.encode(text).ids, 0] for text in texts]  # as GPT-2 had its texts: the end before and after
    longest = max(map(len, rows))
    words = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])  # nothing is learnt after the end
    with reproducible():
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **LANGUAGE["sizes"])
        )

        def loss_of(places: torch.Tensor) -> torch.Tensor:
            read = words[places]  # (batch, longest)
            logits = model(input_ids=read[:, :-1].clamp(min=0)).logits
            return F.cross_entropy(logits.flatten(0, 1), read[:, 1:].flatten())  # -100 does not count

        train_tiny(model.parameters(), loss_of, len(words), LANGUAGE["steps"], LANGUAGE["batch"],
                   LANGUAGE["learning_rate"], "pre-training the tiny language model on captions")  # fmt: skip
    model.save_pretrained(folder)
