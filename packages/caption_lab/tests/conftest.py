"""Small drawn scenes with captions, and a captioner with a random encoder."""

from pathlib import Path

import pytest
from labs_testing.commands import here, real_data

from caption_lab.tiny import demo_scene
from labs_common.scenes.files import write_flickr8k

SMALL = ("--no-pretrained", "--width", "32", "--batch-size", "32", "--epochs", "3", "--track", "none")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes with five captions each, as Flickr8k is laid out."""
    folder = tmp_path_factory.mktemp("scenes")
    write_flickr8k(folder, range(60), side=32, sample=demo_scene)
    return folder


@pytest.fixture(scope="session")
def real_pictures() -> Path:
    """Real photographs with captions."""
    return real_data("flickr8k-mini")


@pytest.fixture(scope="session")
def options(scenes: Path) -> tuple[object, ...]:
    return ("--model", "show_attend_tell", "--data", scenes, *SMALL)


@pytest.fixture(scope="session")
def finished(options: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = here("caption_lab.train", *options, "--output", run, "--save-every", "4")
    assert f"report: {run / 'report.html'}" in done.stdout
    return run
