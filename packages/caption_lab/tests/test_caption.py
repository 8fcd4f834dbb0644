from pathlib import Path

import numpy as np
import pytest
from labs_testing import commands as lab_commands
from PIL import Image


@pytest.mark.alone
def test_caption_command(finished: Path, scenes: Path, tmp_path: Path) -> None:
    """In a process of its own, on pictures that no training saw, by file, directory and pattern."""

    def said(*arguments: object, code: int = 0) -> lab_commands.Done:
        return lab_commands.here("caption_lab.caption", *arguments, "--checkpoint", finished, code=code)

    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, size in enumerate([(90, 40), (40, 90), (300, 300)]):
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    Image.new("L", (50, 50)).save(folder / "grey.jpg")
    (folder / "notes.txt").write_text("no picture")
    heat = tmp_path / "heat.png"
    named = (folder, folder / "0.png")
    process = lab_commands.forked(
        "caption_lab.caption", ["caption_lab.train"], *named, "--checkpoint", finished, "--heatmap", heat
    )
    process.join()
    assert process.exitcode == 0
    rows = [line.split("\t") for line in said(*named).stdout.splitlines()]
    assert [Path(name).name for name, _ in rows] == ["0.png", "1.png", "2.png", "grey.jpg"]
    assert sorted(path.name for path in tmp_path.glob("heat*")) == [f"heat-{number}.png" for number in (1, 2, 3, 4)]
    Image.open(tmp_path / "heat-1.png").verify()

    by_pattern = said(f"{folder}/*.png", "--beam", "3").stdout.splitlines()
    assert [line.split("\t") for line in by_pattern] == rows[:3]
    said(folder / "0.png", "--heatmap", heat, "--top-p", "0.9")
    assert heat.exists()
    word = rows[0][1].split()[0]
    said(folder / "0.png", "--heatmap", heat, "--word", word)
    assert Image.open(heat).size == (896, 896)
    for wrong in (("--word", word), ("--word", "zebra", "--heatmap", heat)):
        assert len(said(folder / "0.png", *wrong, code=2).errors) == 1
    (folder / "empty.jpg").write_bytes(b"")
    assert "empty.jpg" in said(folder, code=2).errors[0]
    assert len(said(folder, "--on-bad-data", "skip").stdout.splitlines()) == 4
    for wrong in (("nothing.png",), (), (folder / "0.png", "--heatmap", "heat.txt"), (folder / "0.png", "--beam", "0")):
        assert len(said(*wrong, code=2).errors) == 1
