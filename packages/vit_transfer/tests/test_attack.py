"""The command that makes perturbations."""

import json
from pathlib import Path

import numpy as np
import pytest
from labs_testing import commands as lab_commands
from safetensors.torch import load_file

from labs_common.errors import LabError
from vit_transfer.attack import counts_of


def test_counts() -> None:
    assert counts_of("100, 50,50") == [50, 100]
    for wrong in ("", "0", "1.5", "many", "9" * 5000):
        with pytest.raises(LabError, match="--used"):
            counts_of(wrong)


@pytest.mark.long
def test_the_command(scenes: Path, tmp_path: Path, vit_file: Path, cnn_file: Path) -> None:
    shared = ("--data", scenes, "--epochs", "2", "--batch-size", "8", "--track", "none")
    for name, file in (("vit", vit_file), ("cnn", cnn_file)):
        lab_commands.here("vit_transfer.train", "--model", f"tiny-{name}", "--weights", file, *shared, "--baselines", "no",
                          "--unfreeze", "all", "--no-report", "--output", tmp_path / name)  # fmt: skip
    run = tmp_path / "attack"
    # The second is a plain model directory, as another program may have written one.
    models = f"{tmp_path / 'vit'},{tmp_path / 'cnn' / 'model'}"
    arguments = ("--models", models, "--used", "2,4", "--passes", "1", "--radius", "60", *shared)
    done = lab_commands.here("vit_transfer.attack", *arguments, "--output", run)
    assert f"report: {run / 'report.html'}" in done.stdout
    results = json.loads((run / "results.json").read_text())
    assert set(results["fooling rate"]) == set(models.split(","))
    files = sorted((run / "perturbations").iterdir())
    assert len(files) == 4
    for file in files:
        change = load_file(file)["perturbation"]
        assert change.shape == (3, 48, 48)
        assert 0 < float(change.abs().max()) <= 60
    for name in models.split(","):
        assert results["transfer"][name][name] == results["fooling rate"][name]["universal, DeepFool inside"]
        assert [row["pictures"] for row in results["by pictures used"][name]] == [2, 4]
    html = (run / "report.html").read_text(encoding="utf-8")
    for heading in ("Numbers", "How many pictures it takes", "Transfer", "What fools"):
        assert heading in html
    # What is there is not made again, and what was lost is: the same.
    kept, lost = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    lab_commands.here("vit_transfer.attack", "--resume", run)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == lost
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("radius: 60.0", "radius: 61.0"))
    changed = lab_commands.here("vit_transfer.attack", "--resume", run, code=2)
    assert "an option or a network changed" in changed.errors[0]
    assert np.isfinite([rate for found in results["fooling rate"].values() for rate in found.values()]).all()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--used", "0"), "--used"),
        (("--used", "100000"), "--used 100000"),
        (("--models", "runs/missing"), "runs/missing"),
        (("--models", "{other}"), "other classes"),
        (("--radius", "-1"), "--radius"),
        (("--models", ""), "--models"),
        (("--models", "a/b,a-b"), "called the same"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], names: str, scenes: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"label_names": ["cat", "dog"]}))
    filled = [argument.format(other=other) for argument in arguments]
    filled += ["--data", str(scenes), "--output", str(tmp_path / "run")]
    filled += [] if "--used" in filled else ["--used", "4"]
    if "--models" not in filled:
        filled += ["--models", "resnet18"]
    done = lab_commands.here("vit_transfer.attack", *filled, code=2)
    assert len(done.errors) == 1, done.stderr
    assert names in done.errors[0]
    assert not (tmp_path / "run").exists()
