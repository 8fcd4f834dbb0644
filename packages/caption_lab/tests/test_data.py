from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from caption_lab.config import DecoderOptions, VocabularyOptions
from caption_lab.data import Batch, CaptionRows, Order, caption_rows, caption_steps
from caption_lab.decoder import CAPTIONERS, Sizes
from caption_lab.encoder import Encoder
from caption_lab.losses import next_word_loss
from caption_lab.vocabulary import END, START, build_vocabulary
from labs_common.data.captions import read_captioned
from labs_common.options import CacheOptions


class Counted:
    """Rows that say which pictures were read."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.read = table, Counter[int]()

    def rows(self, view: int, places: list[int]) -> torch.Tensor:
        self.read.update(places)
        return self.table[places]


@pytest.fixture
def data() -> CaptionRows:
    torch.manual_seed(0)
    pairs = [
        (picture, [START, *range(4, 5 + (picture + place) % 4), END]) for picture in range(7) for place in range(5)
    ]
    return CaptionRows(Counted(torch.randn(7, 24)), pairs)


def captions(batch: Batch) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (picture, tuple(word for word in words if word))
        for picture, words in zip(batch.pictures, batch.words.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("order", "count"), [("captions", 35), ("by picture", 35), ("pictures", 7)])
def test_every_epoch_has_each_once_in_another_order(data: CaptionRows, order: Order, count: int) -> None:
    steps = caption_steps(data, 8, 0, order)
    epochs = [[pair for (batch,) in steps.steps(epoch, 0) for pair in captions(batch)] for epoch in (0, 1)]
    every = [(picture, tuple(words)) for picture, words in data.pairs]
    expected = every[::5] if order == "pictures" else every
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1]
    assert len(steps) == -(-count // 8)
    resumed = [pair for (batch,) in steps.steps(0, 2) for pair in captions(batch)]
    assert resumed == epochs[0][16:]
    if order == "by picture":
        assert [picture for picture, _ in epochs[0]] == [
            epochs[0][5 * place][0] for place in range(7) for _ in range(5)
        ]


def test_a_picture_is_read_once_for_all_its_captions(data: CaptionRows) -> None:
    list(caption_steps(data, 10, 0, "by picture").steps(0, 0))
    assert set(data.rows.read.values()) == {1}


def decoders() -> list[torch.nn.Module]:
    torch.manual_seed(1)
    options = DecoderOptions(width=16, layers=1, heads=2, dropout=0.0)
    return [
        kind.decoder(Sizes(12, 24 if kind.one_vector else 6, 4, 9), options)
        for kind in (CAPTIONERS[name] for name in ("show_tell", "show_attend_tell", "transformer"))
    ]


@pytest.mark.parametrize("number", range(3))
def test_parts_of_a_step_add_up_and_shared_features_change_nothing(data: CaptionRows, number: int) -> None:
    decoder = decoders()[number]

    def loss_of(batch: Batch, shared: bool) -> torch.Tensor:
        features = batch.rows if number == 0 else batch.rows.unflatten(1, (4, 6))
        inputs, targets = batch.words[:, :-1], batch.words[:, 1:]
        if shared:
            logits = decoder(features, inputs, batch.of_rows).logits
        else:
            logits = decoder(features[batch.of_rows], inputs).logits
        return next_word_loss(logits, targets) * batch.of_words

    whole = [batch for (batch,) in caption_steps(data, 16, 0).steps(0, 0)]
    parts = [[batch for (batch,) in caption_steps(data, 16, 0, "captions", rank, 3).steps(0, 0)] for rank in range(3)]
    for step, batch in enumerate(whole):
        expected = loss_of(batch, shared=False)
        torch.testing.assert_close(loss_of(batch, shared=True), expected)
        mean = sum(loss_of(part[step], shared=True) for part in parts) / 3
        torch.testing.assert_close(mean, expected)
        assert sum(part[step].of_captions for part in parts) == pytest.approx(3)


def test_a_process_without_a_part_takes_part_without_weight(data: CaptionRows) -> None:
    steps = caption_steps(data, 16, 0, "captions", rank=4, processes=5)
    (last,) = next(iter(steps.steps(0, 2)))  # three captions are left for five processes
    assert (last.of_words, last.of_captions, len(last.pictures)) == (0, 0, 1)


def test_views_take_turns_by_epoch(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of view 0 are those of the plain pictures; the others differ, and are the same when asked again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = read_captioned(scenes, shown=False).subset(range(6))
    vocabulary = build_vocabulary(
        [caption for of in pictures.captions for caption in of], VocabularyOptions(min_count=1)
    )
    torch.manual_seed(0)
    encoder = Encoder("test_resnet", {}, 32, 0)
    made = [caption_rows("train", pictures, encoder, vocabulary, CacheOptions(cache=cache), Accelerator(), views, 3)
            for cache, views in ((True, 1), (True, 3), (False, 3))]  # fmt: skip

    def of_epoch(data: CaptionRows, epoch: int) -> torch.Tensor:
        batches = [batch for (batch,) in caption_steps(data, 64, 0).steps(epoch, 0)]
        return batches[0].rows.float()

    plain = of_epoch(made[0], 0)
    assert plain.shape == (6, encoder.row_width)
    turns = [of_epoch(made[1], epoch) for epoch in range(4)]
    assert torch.equal(turns[0], plain)
    assert torch.equal(turns[3], plain)
    assert min((turns[a] - turns[b]).norm() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.02 * plain.norm()
    for epoch in range(3):
        torch.testing.assert_close(of_epoch(made[2], epoch), turns[epoch], rtol=1e-2, atol=1e-6)  # bf16
