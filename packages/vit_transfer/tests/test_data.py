"""The key of a cached front, the augmented views, and how pictures are dealt to steps and processes."""

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from labs_common.data.classes import LabelledPictures, read_pictures
from labs_common.data.images import checked
from labs_common.frozen.cache import front_key
from labs_common.steps import ShuffledSteps
from vit_transfer.config import DataOptions, ModelOptions
from vit_transfer.data import PictureRows, Tensors, Transform, erased, read_splits, training_batches, transform_of
from vit_transfer.model import Transfer, create, transfer


def made(seed: int = 0, **options: object) -> Transfer:
    chosen = ModelOptions(model="tiny-vit", pretrained=False, **options)
    torch.manual_seed(seed)
    return transfer(create(chosen, 4), chosen, cached=True)


def test_the_key_of_a_front() -> None:
    accelerator = Accelerator(cpu=True)

    def key(model: Transfer) -> dict[str, object]:
        return front_key(model.cut.front, accelerator)

    first = key(made())
    assert key(made()) == first
    assert key(made(seed=1))["weights"] != first["weights"]
    assert key(made(unfreeze="head"))["architecture"] != first["architecture"]
    other = made()
    with torch.no_grad():
        other.model.blocks[3].attn.qkv.weight.add_(1)  # trained: no part of the front
    assert key(other) == first
    with torch.no_grad():
        other.model.blocks[0].attn.qkv.weight.view(-1)[0].add_(1e-3)
    assert key(other) != first


@pytest.fixture
def pictures(scenes: Path) -> LabelledPictures:
    found = read_pictures(str(scenes)).train
    assert found is not None
    return checked(found, "error", shown=False)


def test_the_key_of_the_pictures(pictures: LabelledPictures) -> None:
    transform = transform_of(made().model, 48, "flip", 0)
    first = Tensors(pictures, transform).recipe(1)
    assert Tensors(pictures, transform).recipe(1) == first
    for change in ({"size": 40}, {"mean": (0.4, 0.5, 0.5)}, {"interpolation": "nearest"}):
        assert Tensors(pictures, dataclasses.replace(transform, **change)).recipe(1) != first
    assert Tensors(pictures.subset([1, 2, 3]), transform).recipe(1) != first
    # What is drawn by chance counts only where something is.
    seeded = dataclasses.replace(transform, seed=1)
    assert Tensors(pictures, seeded).recipe(1) == first
    assert Tensors(pictures, seeded).recipe(2) != Tensors(pictures, transform).recipe(2)


def test_few_labels_are_stratified_and_nested(scenes: Path, tmp_path: Path) -> None:
    def labelled(share: float, seed: int = 0) -> LabelledPictures:
        return read_splits(DataOptions(data=str(scenes), label_fraction=share), seed, shown=False)["train"]

    whole, half, few = (labelled(share) for share in (1.0, 0.5, 0.01))
    counts = [np.bincount(part.labels, minlength=len(whole.classes)) for part in (whole, half, few)]
    assert counts[1].tolist() == [round(int(count) / 2) for count in counts[0]]
    assert set(counts[2].tolist()) == {1}, "one of each class at least"
    assert set(few.names) < set(half.names) < set(whole.names)
    assert labelled(0.5).names == half.names != labelled(0.5, seed=1).names
    for number in range(21):
        folder = tmp_path / ("many" if number else "single")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    rare = read_splits(DataOptions(data=str(tmp_path), label_fraction=0.25), 0, shown=False)["train"]
    assert sorted(np.bincount(rare.labels).tolist()) == [1, 4], "the only picture of its class stays"


def test_mirrored_in_every_other_view(pictures: LabelledPictures) -> None:
    plain, one, two, three = (
        Tensors(pictures, Transform(32, (0.5,) * 3, (0.25,) * 3, "bilinear", "mirror", 0)).batch(view, range(4))
        for view in range(4)
    )
    torch.testing.assert_close(one, plain.flip(3), atol=0.05, rtol=0)
    assert torch.equal(plain, two)
    assert torch.equal(one, three)


def test_deits_views_depend_on_their_seed_alone(pictures: LabelledPictures) -> None:
    """They are drawn in threads, by generators that timm takes from Python and NumPy."""
    tensors = Tensors(pictures, Transform(32, (0.5,) * 3, (0.25,) * 3, "bilinear", "deit", 0))
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = tensors.levels(1, range(16))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(5)
    assert torch.equal(first, tensors.levels(1, range(16)))
    assert torch.equal(first[3:5], tensors.levels(1, range(3, 5)))
    cropped = Tensors(pictures, dataclasses.replace(tensors.transform, augment="crop"))
    assert not torch.equal(first, tensors.levels(2, range(16)))
    assert not torch.equal(first, cropped.levels(1, range(16)))
    assert torch.equal(tensors.levels(0, range(16)), cropped.levels(0, range(16)))


def test_erasing() -> None:
    levels, generator = np.full((3, 32, 32), 300), np.random.default_rng(0)  # 300 is no level
    gone = np.array([(erased(levels, generator) != 300)[0] for _ in range(400)])  # (pictures, height, width)
    share = gone.mean((1, 2))
    assert 0.2 < (share > 0).mean() < 0.3
    assert 0.015 < share[share > 0].min() < share.max() < 0.36
    for some in gone[share > 0]:
        rows, columns = some.any(1), some.any(0)
        assert some.sum() == rows.sum() * columns.sum(), "a rectangle"


def test_views_are_augmented_and_repeatable(pictures: LabelledPictures) -> None:
    for augment in ("flip", "crop"):
        transform = Transform(32, (0.5,) * 3, (0.25,) * 3, "bilinear", augment, 0)
        tensors = Tensors(pictures, transform)
        plain = tensors.batch(0, range(16))
        views = [tensors.batch(view, range(16)) for view in (1, 2)]
        assert torch.equal(views[0], tensors.batch(1, range(16)))
        changed = [(view != plain).flatten(1).any(1) for view in views]
        assert all(int(some.sum()) > 4 for some in changed)
        assert not torch.equal(*views)
        assert not torch.equal(views[0], Tensors(pictures, dataclasses.replace(transform, seed=1)).batch(1, range(16)))
        if augment == "flip":
            mirrored = plain[changed[0]].flip(3)
            torch.testing.assert_close(views[0][changed[0]], mirrored, atol=0.05, rtol=0)


def test_every_picture_once_an_epoch_whatever_the_processes() -> None:
    class Places:
        def rows(self, view: int, places: list[int]) -> torch.Tensor:
            return torch.tensor(places, dtype=torch.float32)[:, None]

    data = PictureRows(Places(), torch.arange(23))

    def dealt(rank: int, processes: int, epoch: int = 0, start: int = 0) -> list[tuple[list[int], float]]:
        accelerator = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        source = ShuffledSteps(len(data.labels), 5, 3, training_batches(data, 2, accelerator))
        assert len(source) == 5
        steps = [batch for (batch,) in source.steps(epoch, start)]
        assert all(batch.view == epoch % 2 for batch in steps)
        assert all(batch.targets.tolist() == list(batch.places) == batch.inputs[:, 0].tolist() for batch in steps)
        return [(list(batch.places), batch.share) for batch in steps]

    alone = dealt(0, 1)
    assert sorted(place for places, _ in alone for place in places) == list(range(23))
    assert dealt(0, 1, start=2) == alone[2:]
    assert dealt(0, 1, epoch=1) != alone
    both = [dealt(rank, 2) for rank in range(2)]
    for step, (places, _) in enumerate(alone):
        parts = [both[rank][step] for rank in range(2)]
        assert sorted(parts[0][0] + parts[1][0]) == sorted(places)
        # Each process's mean times its share, averaged over the processes, is the mean of all.
        mean = sum(share * sum(part) / len(part) for part, share in parts) / 2
        assert mean == pytest.approx(sum(places) / len(places))
    # More processes than pictures in the last step: the others take part with nothing.
    last = [dealt(rank, 5)[-1] for rank in range(5)]
    assert [share for _, share in last].count(0.0) == 2


def test_small_data_gets_its_splits(pictures: LabelledPictures, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes((scenes / "train.parquet").read_bytes())
    options = DataOptions(data=str(tmp_path), validation_fraction=0.25, test_fraction=0.25)
    splits = read_splits(options, 0, shown=False)
    names = [set(part.names) for part in splits.values()]
    assert list(splits) == ["train", "validation", "test"]
    assert sum(map(len, names)) == len(set.union(*names)) == len(pictures)
    assert read_splits(options, 0, shown=False)["test"].names == splits["test"].names
    assert read_splits(options, 1, shown=False)["test"].names != splits["test"].names
    limited = read_splits(dataclasses.replace(options, limit=8), 0, shown=False)
    assert len(limited["train"]) == 8
    assert len(set(limited["train"].labels.tolist())) == 4, "evenly over the classes"
