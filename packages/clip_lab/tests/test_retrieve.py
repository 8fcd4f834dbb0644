"""Search, on a model that was trained here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from labs_testing import commands as lab_commands
from PIL import Image

from clip_lab import retrieve
from clip_lab.config import RetrieveConfig
from clip_lab.encoder import load_encoder
from labs_common.report.page import Section
from labs_common.run import Run

SENTENCES = ["a red circle to the left of a blue square", "one triangle"]


@pytest.mark.alone
def test_sentences_find_pictures_and_pictures_captions(run: Path, scenes: Path, tmp_path: Path) -> None:
    picture = sorted((scenes / "Images").iterdir())[0]
    done = lab_commands.here(
        "clip_lab.retrieve", *SENTENCES, "--picture", picture, "--checkpoint", run, "--data", scenes, "--top", "3",
        "--output", tmp_path / "found",
    )  # fmt: skip
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [one["asked"] for one in found[:2]] == SENTENCES
    assert all(len(one["results"]) == 3 for one in found)
    for one in found:
        scores = [result["score"] for result in one["results"]]
        assert scores == sorted(scores, reverse=True)
    assert found[3]["results"][0]["found"] == str(picture), "nothing is more like a picture than itself"
    assert found[3]["results"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert done.stdout.count("\n  ") == 12
    with Image.open(tmp_path / "found" / "grid.png") as grid:
        assert min(grid.size) > 300
    html = (tmp_path / "found" / "report.html").read_text()
    assert html.count("data:image/png") == 3 * 3 + 2
    # The scores are those of the model itself.
    encoder = load_encoder(str(run))
    best = Path(found[0]["results"][0]["found"])
    with Image.open(best) as image:
        vector = encoder.embedded(encoder.view(image.convert("RGB"))[None])
    cosine = float((encoder.read(SENTENCES[:1]) @ vector.T).squeeze())
    assert found[0]["results"][0]["score"] == pytest.approx(cosine, abs=1e-5)


def test_the_grid_has_the_first_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 300 sentences would be more pixels than a PNG can have, and there would be no page either."""
    drawn: list[retrieve.Found] = []
    monkeypatch.setattr(
        retrieve, "grid_figure", lambda found: drawn.extend(found) or SimpleNamespace(savefig=lambda file: None)
    )
    monkeypatch.setattr(retrieve, "rerun_section", lambda run: Section("How to run it again"))
    found = [retrieve.Found(str(n), None, [retrieve.Result("a dog", 0.5, None)] * 60) for n in range(300)]
    retrieve.write_found(Run(tmp_path), RetrieveConfig(), found)
    assert len(drawn) == 20
    assert {len(one.results) for one in drawn} == {48}
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("a dog") == 300 * 60


@pytest.mark.alone
def test_without_data_the_runs_own_test_pictures_are_searched(run: Path, tmp_path: Path) -> None:
    test = json.loads((run / "splits.json").read_text())["test"]["pictures"]
    done = lab_commands.here("clip_lab.retrieve", "one circle", "--checkpoint", run, "--output", tmp_path / "found")
    assert all(name in done.stdout for name in test)
    captions = tmp_path / "captions.txt"
    captions.write_text("one circle\n\ntwo squares\none circle\n")
    again = lab_commands.here("clip_lab.retrieve", "--picture", run / "missing.png", "--checkpoint", run, code=2)
    assert "missing.png" in again.errors[0]
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    done = lab_commands.here("clip_lab.retrieve", "--picture", picture, "--captions", captions, "--checkpoint", run,
                             "--output", tmp_path / "more")  # fmt: skip
    found = json.loads((tmp_path / "more" / "results.json").read_text())
    assert {result["found"] for result in found[0]["results"]} == {"one circle", "two squares"}
