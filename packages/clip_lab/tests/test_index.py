"""Indexes of folders: only what is new or changed is computed, and what is found is what is there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_lab.encoder import Encoder, View
from clip_lab.index import Index, build_index, pictures_in
from labs_common.errors import LabError


class Counting(torch.nn.Module):
    """Embeds a picture as its mean colour, and counts pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), 0

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.seen += len(pictures)
        return torch.nn.functional.normalize(pictures.mean((2, 3)) + 1e-6, dim=1)


@pytest.fixture
def encoder() -> Encoder:
    module = Counting()
    return Encoder("counting", module, View(8, (0.0,) * 3, (1.0,) * 3, "bilinear", True), module, module, None, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue", "yellow", "white")):
        Image.new("RGB", (20, 10), colour).save(pictures / ("more" if number > 2 else ".") / f"{colour}.png")
    return pictures


def seen(encoder: Encoder) -> int:
    module: Any = encoder.module
    count, module.seen = module.seen, 0
    return int(count)


def test_only_new_and_changed_pictures_are_computed(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    kept = tmp_path / "index"

    def again() -> Index:
        return build_index(pictures_in(folder), "it", encoder, kept, 2, "skip")

    first = again()
    assert [file.name for file in first.files] == ["blue.png", "green.png", "white.png", "yellow.png", "red.png"]
    assert seen(encoder) == 5
    assert torch.equal(again().vectors, first.vectors)
    assert seen(encoder) == 0
    Image.new("RGB", (20, 10), "black").save(folder / "green.png")
    os.utime(folder / "green.png", ns=(1, 1))
    Image.new("RGB", (20, 10), "pink").save(folder / "pink.png")
    (folder / "blue.png").unlink()
    found = again()
    assert seen(encoder) == 2
    assert [file.name for file in found.files] == ["green.png", "white.png", "yellow.png", "pink.png", "red.png"]
    expected = build_index(pictures_in(folder), "it", encoder, tmp_path / "anew", 8, "skip")
    assert torch.equal(found.vectors, expected.vectors)
    scores, places = found.nearest(torch.tensor([[1.0, 0, 0]]), 9)
    assert found.files[places[0, 0]].name == "red.png"
    assert scores.shape == (1, 5)
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)


def test_a_kill_loses_the_last_few_pictures_only(
    folder: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_lab.index.PART", 2)
    module: Any = encoder.module
    forward, kept = module.forward, tmp_path / "index"

    def killed(pictures: torch.Tensor) -> torch.Tensor:
        if module.seen >= 3:
            raise KeyboardInterrupt
        return forward(pictures)

    def build() -> Index:
        return build_index(pictures_in(folder), "it", encoder, kept, 1, "skip")

    monkeypatch.setattr(module, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert seen(encoder) == 3
    assert not kept.exists()
    monkeypatch.setattr(module, "forward", forward)
    found = build()
    assert seen(encoder) == 3, "two were written before the kill"
    assert [file.name for file in tmp_path.iterdir() if "index" in file.name] == ["index"], "and nothing is left over"
    assert torch.equal(
        found.vectors, build_index(pictures_in(folder), "it", encoder, tmp_path / "anew", 1, "skip").vectors
    )
    assert seen(encoder) == 5
    assert torch.equal(build().vectors, found.vectors)
    assert seen(encoder) == 0


# Takes the lock of a directory as another process, says whether it got it, and holds it until its input ends.
OTHER = """import fcntl, sys
file = open(sys.argv[1] + "/.lock", "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(print("refused"))
print("process 7 on another machine", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()"""


def other_process(parts: Path) -> tuple[Any, str]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: Any = subprocess.Popen([sys.executable, "-c", OTHER, parts], **pipes)
    return process, process.stdout.readline().strip()


def test_two_processes_do_not_make_one_index(
    folder: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, found, module = tmp_path / "index", list[tuple[Path, str]](), encoder.module
    forward: Any = module.forward

    def build() -> Index:
        return build_index(pictures_in(folder), "it", encoder, kept, 9, "skip")

    def while_it_is_made(pictures: torch.Tensor) -> torch.Tensor:
        (parts,) = tmp_path.glob(".index-*.parts")
        found.append((parts, other_process(parts)[1]))
        return forward(pictures)

    with monkeypatch.context() as moment:
        moment.setattr(module, "forward", while_it_is_made)
        build()
    assert seen(encoder) == 5
    (parts, said) = found[0]
    assert said == "refused"
    assert not parts.exists(), "nothing is left over"
    parts.mkdir()
    process, said = other_process(parts)
    assert said == "held"
    assert len(build().files) == 5, "a finished one is read"
    Image.new("RGB", (20, 10), "pink").save(folder / "pink.png")
    with pytest.raises(LabError, match="process 7 on another machine is at work there"):
        build()
    assert (parts / ".lock").exists(), "what the other process did so far, and its lock, are its own"
    process.communicate()
    assert len(build().files) == 6


def test_pictures_that_cannot_be_read_are_left_out_or_named(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    files = pictures_in(folder)
    assert len(build_index(files, "it", encoder, tmp_path / "index", 2, "skip").files) == 5
    with pytest.raises(LabError, match=r"broken\.jpg"):
        build_index(files, "it", encoder, tmp_path / "other", 2, "error")
    with pytest.raises(LabError, match="holds no pictures"):
        pictures_in(tmp_path / "index")
    with pytest.raises(LabError, match="no such directory"):
        pictures_in(tmp_path / "missing")


def test_an_index_of_another_model_or_of_something_else_is_refused(
    folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    files, kept = pictures_in(folder), tmp_path / "index"
    build_index(files, "it", encoder, kept, 2, "skip")
    with torch.no_grad():
        encoder.module.weight.fill_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(LabError, match="another model"):
        build_index(files, "it", encoder, kept, 2, "skip")
    with pytest.raises(LabError, match="not empty"):
        build_index(files, "it", encoder, folder, 2, "skip")
    (kept / "notes.txt").touch()
    with pytest.raises(LabError, match=r"notes\.txt, which is no part of an index"):
        build_index(files, "it", encoder, kept, 2, "skip")
    (kept / "notes.txt").unlink()
    vectors = load_file(kept / "vectors.safetensors")["vectors"]
    save_file({"vectors": -vectors}, kept / "vectors.safetensors")
    with pytest.raises(LabError, match="its vectors were changed"):
        build_index(files, "it", encoder, kept, 2, "skip")
    save_file({"other": torch.ones(1)}, kept / "vectors.safetensors")
    with pytest.raises(LabError, match="cannot be read"):
        build_index(files, "it", encoder, kept, 2, "skip")


def test_faiss_finds_what_the_matrix_product_finds(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="needs the extra clip-lab[faiss]")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(3000, 8, generator=generator), dim=1)
    index = Index(tuple(Path(f"{number}.png") for number in range(3000)), vectors, tmp_path)
    queries = vectors[:50] + 0.01 * torch.randn(50, 8, generator=generator)
    exact, fast = (index.nearest(queries, 5, search) for search in ("exact", "faiss"))
    assert (exact[1][:, 0] == fast[1][:, 0]).double().mean() > 0.95
    torch.testing.assert_close(exact[0][:, 0], fast[0][:, 0], atol=1e-2, rtol=0)
    assert (tmp_path / "inverted.faiss").is_file()
    again = index.nearest(queries, 5, "faiss")
    assert torch.equal(again[1], fast[1])
    (tmp_path / "inverted.faiss").write_bytes(b"something else")
    assert torch.equal(index.nearest(queries, 5, "faiss")[1], fast[1]), "made again"
