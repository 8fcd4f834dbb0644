"""Fills in options of a training that were left to its towers and data, and refuses those that contradict others."""

import dataclasses
from typing import Any, TypeVar

from clip_lab.config import OWN, REAL, TINY, HeadOptions, ImageOptions, TextOptions, TrainConfig
from labs_common.errors import LabError
from labs_common.scenes.files import is_drawn

Options = TypeVar("Options")
WRITERS = ("coca", "simvlm")  # need a causal text tower, which no Hugging Face encoder is


def complete(config: TrainConfig) -> TrainConfig:
    """Puts a default in the place of every option that was left to the towers and the data.

    Raises:
        LabError: options contradict each other.
    """
    drawn = is_drawn(config.data.data)
    batch = _filled(config.batch, augment="none" if drawn else "crop")
    if config.start.start:  # which brings its towers
        _check(config)
        usual = {"epochs": 5, "batch_size": 128, "learning_rate": 1e-4, "tower_learning_rate": 1e-5}
        return dataclasses.replace(config, batch=batch, training=_filled(config.training, **usual))
    image = _filled(config.image, image=TINY if drawn else REAL[0])
    tiny = image.image == TINY
    weighted = image.image_pretrained and not tiny and image.image_weights is None
    image = dataclasses.replace(image, image_pretrained=weighted)
    text = config.text
    sizes = (text.tokenizer, text.text_width, text.text_layers, text.text_heads, text.vocabulary)
    own = drawn or tiny or any(sizes) or config.objective in WRITERS
    text = _filled(text, text=OWN if own else REAL[1])
    _check(dataclasses.replace(config, image=image, text=text))
    layers = text.text_layers or (2 if tiny else 12)
    learnt = text.text != OWN and text.text_pretrained
    rate = config.training.learning_rate or (4e-3 if tiny else 1e-3 if learnt else 5e-4)
    return dataclasses.replace(
        config,
        image=image,
        text=_filled(
            text,
            text_width=128 if tiny else 512,
            text_layers=layers,
            text_heads=4 if tiny else 8,
            tokenizer="sentencepiece" if text.text == OWN else text.text,
            vocabulary=4000,
        ),
        head=_filled(config.head, embedding=128 if tiny else 512, queries=16 if tiny else 256, decoder_layers=layers),
        batch=batch,
        training=_filled(
            config.training,
            epochs=8 if drawn else 30,
            batch_size=128 if tiny else 256,
            learning_rate=rate,
            tower_learning_rate=rate / 10,
            text_learning_rate=rate / 100,
        ),
    )


def _filled(options: Options, **defaults: Any) -> Options:
    """Puts the defaults in the place of options that are 0, empty or None."""
    given = {name: getattr(options, name) or value for name, value in defaults.items()}
    return dataclasses.replace(options, **given)  # type: ignore[type-var]


def _check(config: TrainConfig) -> None:
    """Refuses what no training can do; `losses.check_objective` refuses what an objective cannot."""
    image, text, head, start = config.image, config.text, config.head, config.start
    weighted = {name: getattr(head, name) for name in ("contrastive_weight", "caption_weight")}
    own = (dataclasses.replace(image, freeze_image=False, views=1), dataclasses.replace(text, freeze_text=False), head)
    still = {"image": image.freeze_image, "text": text.freeze_text, "both": image.freeze_image or text.freeze_text}
    weights = image.image_weights
    heads = text.text_heads or 4
    refusals = (
        (weights is not None and weights.suffix != ".safetensors",
         f"--image-weights {weights}: must be a .safetensors file; convert it with safetensors.torch"),
        (weights is not None and not weights.is_file(), f"--image-weights {weights}: no such file"),
        (text.text_width % heads, f"--text-width {text.text_width}: must be a multiple of --text-heads {heads}"),
        (image.views > 1 and not image.freeze_image,
         "--views: is of --freeze-image; other towers see a new version every epoch"),
        (not head.contrastive_weight + head.caption_weight,
         "--contrastive-weight and --caption-weight must not both be 0"),
        (text.text != OWN and text.tokenizer not in ("", text.text),
         f"--tokenizer {text.tokenizer}: --text {text.text} has its own"),
        (start.start and own != (ImageOptions(), TextOptions(), HeadOptions(**weighted)),
         "--start brings its towers, tokenizer and projections: drop their options (--freeze-image, --freeze-text and "
         "--views may stay)"),
        (start.start and config.plan.plan, "--plan: counts no model of --start; drop one of them"),
        (start.lora != "none" and not start.start, "--lora: adds adapters to released weights; name some with --start"),
        (still.get(start.lora),
         f"--lora {start.lora}: trains adapters in a tower that is to be frozen; drop one of them"),
        (text.text_pool != "auto" and text.text == OWN,
         f"--text-pool: is of a Hugging Face encoder; --text {OWN} reads its end token"),
        (text.freeze_text and text.text == OWN and not start.start,
         f"--freeze-text: --text {OWN} is trained from scratch; name a Hugging Face encoder in --text"),
        (image.freeze_image and not (image.image_pretrained or weights or start.start),
         "--freeze-image: the tower has random weights; drop --no-image-pretrained, or add --image-weights FILE"),
        (config.data.splits is not None and not config.data.splits.is_dir(),
         f"--splits {config.data.splits}: no such directory"),
    )  # fmt: skip
    for wrong, message in refusals:
        if wrong:
            raise LabError(message)
