"""`compare` as it is run."""

import json
from pathlib import Path

import pytest
from labs_testing import commands as lab_commands

SMALL = ("--side", "16", "--batch-size", "32", "--epochs", "1", "--hidden", "16", "--outputs", "12", "--queue", "64")


@pytest.mark.long
def test_compare_and_its_report(looks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    arguments = ("--methods", "simclr,byol,byol:momentum=0", "--data", looks, *SMALL, "--map", "none",
                 "--no-probe", "--output", folder)  # fmt: skip
    done = lab_commands.here("zsi_contrastive.compare", *arguments)
    assert "report:" in done.stdout
    found = json.loads((folder / "comparison.json").read_text())
    assert found["failed"] == {}
    assert [row["method"] for row in found["rows"]] == ["simclr", "byol", "byol:momentum=0"]
    assert {row["steps"] for row in found["rows"]} == {3}, "one budget"
    page = (folder / "report.html").read_text()
    assert "What each change does" in page
    asked = json.loads((folder / "byol-momentum=0" / "seed-0" / "results.json").read_text())["config"]
    assert asked["own"]["momentum"] == 0
    assert asked["own"]["momentum_end"] == 0
    for wrong, said in (
        ("swav", "no such method"),
        ("moco:queues=3", "queues"),
        ("moco:queue=-3", "--queue: must be"),
        ("moco,moco", "twice"),
    ):
        done = lab_commands.here("zsi_contrastive.compare", "--methods", wrong, "--data", looks, code=2)
        assert said in done.errors[0]
