"""Gradient caching, batches, augmentation: what a step reads and what becomes of it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from clip_lab import train
from clip_lab.batches import ClipSteps, Pairs, augmented, drawn_crop, picture_rows
from clip_lab.config import BatchOptions, CacheOptions, HeadOptions, ImageOptions, TrainConfig
from clip_lab.data import read_data, transform_of
from clip_lab.fitting import training_mode
from clip_lab.image import make_image_tower
from clip_lab.model import built
from clip_lab.text import PretrainedText, TextTower
from clip_lab.tokens import Words, make_words
from labs_common.data.described import PictureTensors
from labs_common.options import CaptionDataOptions

HEAD = HeadOptions(embedding=16, queries=3, decoder_layers=1)
SHARES = {"clip": train.contrastive, "siglip": train.contrastive, "coca": train.coca, "simvlm": train.simvlm}


@pytest.fixture(scope="module")
def pairs(scenes: Path) -> tuple[Pairs, Words]:
    """Twenty pictures with their captions."""
    part = read_data(CaptionDataOptions(data=str(scenes)), 0, shown=False).splits["train"].subset(range(20))
    words = make_words("sentencepiece", [caption for of in part.captions for caption in of], 300, 0)
    tower = make_image_tower(ImageOptions(image="test_vit", image_size=32))
    rows = picture_rows("train", PictureTensors(part, transform_of(tower)), CacheOptions(cache=False), False)
    numbers = [[words.numbers(caption) for caption in of] for of in part.captions]
    return Pairs(rows, 32, False, numbers, np.arange(20)), words


def fitting_of(objective: str, words: Words, image: str = "test_vit", text: Any = None, **batch: Any) -> Any:
    """As much of a `Fitting` as the shares of the loss read."""
    torch.manual_seed(0)
    tower = make_image_tower(ImageOptions(image=image, image_size=32))
    text = text or TextTower(len(words), 32, 1, 4, words.length, words.end)
    model = built(objective, tower, text, HEAD)  # type: ignore[arg-type]
    training_mode(model, model)
    config = TrainConfig(objective=objective, head=HEAD, batch=BatchOptions(**batch))  # type: ignore[arg-type]
    return SimpleNamespace(config=config, accelerator=Accelerator(cpu=True), model=model, plain=model)


def of_a_step(fitting: Any, pairs: Pairs, words: Words, chunk: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step of twelve pictures, and its gradient by every parameter."""
    source = ClipSteps(pairs, words, 12, 2, "none", chunk, 0, prefixes=fitting.config.objective == "simvlm")
    step = source.step(list(range(12)), epoch=0)
    assert len(step.parts) == (1 if not chunk else -(-12 // chunk))
    total = 0.0
    for number in range(len(step.parts)):
        loss, _ = SHARES[fitting.config.objective](fitting, step, number)
        loss.backward()
        total += loss.item()
    named = fitting.model.named_parameters()
    found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    fitting.model.zero_grad()
    return total, found


@pytest.mark.parametrize("objective", list(SHARES))
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(objective: str, pairs: tuple[Pairs, Words]) -> None:
    fitting = fitting_of(objective, pairs[1])
    whole, expected = of_a_step(fitting, *pairs, 0)
    for chunk in (5, 1):
        loss, found = of_a_step(fitting, *pairs, chunk)
        assert loss == pytest.approx(whole, abs=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert any("scale" in name for name in expected) == (objective != "simvlm")


def test_dropout_falls_the_same_way_in_both_passes(pairs: tuple[Pairs, Words]) -> None:
    """With another mask in the second pass, gradients would be of embeddings that were never compared."""
    from transformers import BertConfig, BertModel

    data, words = pairs
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, hidden_dropout_prob=0.5)  # fmt: skip
    fitting = fitting_of("clip", words, text=PretrainedText(BertModel(config), words.length, words.end))
    step = ClipSteps(data, words, 12, 2, "none", 4, seed=0).step(list(range(12)), 0)
    seen: list[torch.Tensor] = []
    fitting.model.register_forward_hook(lambda _, __, output: seen.append(output.text.detach().clone()))
    for number in range(3):
        train.contrastive(fitting, step, number)[0].backward()
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(seen[0], seen[1])


def test_batch_norms_count_each_picture_once(pairs: tuple[Pairs, Words]) -> None:
    fitting = fitting_of("clip", pairs[1], image="tiny-cnn")
    norm = fitting.model.image.network.bn1
    of_a_step(fitting, *pairs, 6)
    assert int(norm.num_batches_tracked) == 2  # a pass for each of two parts, the first passes not counted
    assert norm.momentum == 0.1


def test_without_multi_positives_every_other_caption_is_a_negative(pairs: tuple[Pairs, Words]) -> None:
    from open_clip import ClipLoss

    from clip_lab.contrast import embedded

    data, words = pairs
    step = ClipSteps(data, words, 12, 2, "none", 0, seed=0).step(list(range(12)), 0)
    fitting = fitting_of("clip", words, multi_positive=False)
    found = embedded(fitting, step.parts[0])
    expected = ClipLoss()(found.image.repeat_interleave(2, 0), found.text, found.scale)
    torch.testing.assert_close(train.contrastive(fitting, step, 0)[0], expected)
    together = train.contrastive(fitting_of("clip", words), step, 0)[0]
    assert together.item() != pytest.approx(expected.item(), abs=1e-3)


def test_a_step_is_the_same_however_it_is_shared(pairs: tuple[Pairs, Words]) -> None:
    data, words = pairs
    one = ClipSteps(data, words, 8, 3, "crop+colour", 0, 5, prefixes=True)
    assert len(one) == 2, "what fills no batch is left out"
    halves = [ClipSteps(data, words, 8, 3, "crop+colour", 0, 5, 1, True, rank, 2) for rank in range(2)]
    for (whole, _), *parts in zip(
        [step[0] for step in one.steps(3, 0)],
        *([step[0][0] for step in half.steps(3, 0)] for half in halves),
        strict=True,
    ):
        (expected,) = whole.parts
        found = [part.parts[0] for part in parts]
        torch.testing.assert_close(torch.cat([part.pictures for part in found]), expected.pictures)
        torch.testing.assert_close(torch.cat([part.crops for part in found]), expected.crops)
        assert torch.equal(torch.cat([part.prefix for part in found]), expected.prefix)
        rows = [row for part in found for row in part.words.tolist()]
        width = expected.words.shape[1]
        assert [(row + [0] * width)[:width] for row in rows] == expected.words.tolist()
        assert sum(part.of_words for part in found) / 2 == pytest.approx(1)
    later = [step[0][0] for step in one.steps(3, 1)]
    assert len(later) == 1, "a resumed epoch goes on where it stopped"
    other = next(iter(one.steps(4, 0)))[0][0].parts[0]
    assert not torch.equal(other.words, expected.words) or not torch.equal(other.crops, expected.crops)


def test_copies_of_a_picture_have_one_number(scenes: Path) -> None:
    from clip_lab.batches import picture_ids

    part = read_data(CaptionDataOptions(data=str(scenes)), 0, shown=False).splits["train"].subset([0, 1, 0, 2])
    assert picture_ids(part).tolist() == [0, 1, 0, 2]


def test_a_crop_shows_the_part_that_was_drawn() -> None:
    ramp = torch.linspace(0, 255, 16).expand(1, 3, 16, 16)
    whole = torch.tensor([[1.0, 0, 0, 1, 1]])
    torch.testing.assert_close(augmented(ramp, whole), ramp, atol=1e-3, rtol=0)
    half = augmented(ramp, torch.tensor([[0.5, 0.5, 0.0, 1, 1]]))  # the right half
    assert half[0, 0, 0, 0] > 120
    assert half[0, 0, 0, -1] > 245
    flat = augmented(ramp, torch.tensor([[1.0, 0, 0, 1.2, 0.0]]))
    torch.testing.assert_close(flat, torch.full_like(flat, ramp.mean().item() * 1.2), atol=1e-2, rtol=0)
    for seed in range(50):
        side, across, down, brightness, contrast = drawn_crop(np.random.default_rng(seed), "crop+colour")
        assert 0.7 <= side**2 <= 1
        assert max(abs(across), abs(down)) <= 1 - side + 1e-6, "nothing outside of the picture"
        assert 0.75 <= brightness <= 1.25
        assert 0.75 <= contrast <= 1.25


def test_frozen_towers_stay_in_evaluation_mode() -> None:
    tower = make_image_tower(ImageOptions())
    tower.requires_grad_(False)
    model = built("clip", tower, TextTower(20, 32, 1, 4, 9, 3), HEAD)
    training_mode(model, model)
    assert not any(part.training for part in model.image.modules())
    assert model.text.training


def test_options_that_contradict_each_other_are_refused() -> None:
    from clip_lab.config import TextOptions, complete
    from labs_common.errors import LabError

    base = TrainConfig()
    wrong = {
        "--freeze-image": dataclasses.replace(base, image=ImageOptions(freeze_image=True)),
        "--freeze-text": dataclasses.replace(base, text=TextOptions(freeze_text=True)),
        "--views": dataclasses.replace(base, image=ImageOptions(views=2)),
        "--tokenizer": dataclasses.replace(base, text=TextOptions(text="bert", tokenizer="clip")),
        "causal": dataclasses.replace(base, objective="coca", text=TextOptions(text="bert")),
        "--caption-weight": dataclasses.replace(base, head=HeadOptions(caption_weight=1.0)),
        "--scale": dataclasses.replace(base, head=HeadOptions(scale=300)),
    }
    for said, config in wrong.items():
        with pytest.raises(LabError, match=said):
            complete(config)
