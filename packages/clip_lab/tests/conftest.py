"""Small drawn scenes with captions, small models that are trained on them, and pictures with classes."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from labs_testing import commands as lab_commands
from labs_testing.commands import first_rows, real_data
from PIL import Image

from clip_lab.config import CacheOptions, ImageOptions
from clip_lab.data import Pairs, demo_scene, picture_rows, read_data, transform_of
from clip_lab.image import make_image_tower
from clip_lab.tokens import Words, make_words
from labs_common.data.captions import PictureTensors
from labs_common.options import CaptionDataOptions
from labs_common.scenes.files import write_flickr8k

SMALL = ("--image", "tiny-cnn", "--text-width", "32", "--text-layers", "1", "--embedding", "32", "--batch-size", "16", "--epochs", "2",
         "--queries", "4", "--track", "none", "--no-report")  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with five captions each, as Flickr8k is laid out."""
    folder = tmp_path_factory.mktemp("scenes")
    write_flickr8k(folder, range(60), side=32, sample=demo_scene)
    return folder


@pytest.fixture(scope="session")
def pairs(scenes: Path) -> tuple[Pairs, Words]:
    """Twenty pictures with their captions, as training reads them."""
    part = read_data(CaptionDataOptions(data=str(scenes)), 0, shown=False).splits["train"].subset(range(20))
    words = make_words("sentencepiece", [caption for of in part.captions for caption in of], 300, 0)
    tensors = PictureTensors(part, transform_of(make_image_tower(ImageOptions("test_vit", False, image_size=32))))
    rows = picture_rows("train", tensors, CacheOptions(cache=False), Accelerator(cpu=True))
    numbers = [[words.numbers(caption) for caption in of] for of in part.captions]
    return Pairs(rows, 32, False, numbers, np.arange(20)), words


@pytest.fixture(scope="session")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP that was trained for two epochs, on parts of its few scenes."""
    run = tmp_path_factory.mktemp("runs") / "clip"
    lab_commands.here("clip_lab.train", *SMALL, "--output", run, "--data", scenes, "--augment", "crop")
    return run


@pytest.fixture(scope="session")
def coca(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CoCa that was trained for two epochs."""
    run = tmp_path_factory.mktemp("runs") / "coca"
    lab_commands.here("clip_lab.train", *SMALL, "--output", run, "--data", scenes, "--objective", "coca")
    return run


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, easy to tell apart."""
    folder = tmp_path_factory.mktemp("things")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, colour in (("red thing", (200, 30, 30)), ("green thing", (30, 180, 40)), ("apple", (40, 60, 200))):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                levels = np.clip(np.array(colour) + generator.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(levels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Real photographs with captions."""
    return real_data("flickr8k-mini")


@pytest.fixture(scope="session")
def real_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures of CIFAR-10."""
    return first_rows(real_data("cifar10-mini"), tmp_path_factory.mktemp("cifar"), 1000)
