"""Batches and augmentation: what a step reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clip_lab.config import BatchOptions
from clip_lab.data import Batches, Pairs, picture_ids, read_data
from clip_lab.tokens import Words
from labs_common.data.captions import augmented, drawn_crop
from labs_common.options import CaptionDataOptions


def test_a_step_is_the_same_however_it_is_shared(pairs: tuple[Pairs, Words]) -> None:
    data, words = pairs
    options = BatchOptions(captions_per_picture=3, augment="crop+colour")
    one = Batches(data, words, options, 5, prefixes=True).steps(8)
    assert len(one) == 2, "what fills no batch is left out"
    halves = [Batches(data, words, options, 5, 1, True, rank, 2).steps(9) for rank in range(2)]
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
