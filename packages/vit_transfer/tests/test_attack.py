"""Attacks against foolbox, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from labs_testing import commands as lab_commands
from safetensors.torch import load_file
from torch import nn

from labs_common.errors import LabError
from vit_transfer.attack import counts_of
from vit_transfer.attacks import (
    OnLevels,
    deepfool,
    fast_gradient,
    fooling_rate,
    projected,
    said_of,
    universal_fast_gradient,
    universal_perturbation,
)


class Curved(nn.Module):
    """Six classes with curved borders, on levels."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, classes))

    def forward(self, normal: torch.Tensor) -> torch.Tensor:
        return self.body(normal)


@pytest.fixture
def model() -> OnLevels:
    return OnLevels(Curved(), lambda levels: (levels - 127.5) / 40, 8)


@pytest.fixture
def pictures() -> torch.Tensor:
    """Far from 0 and 255, so that clipping has nothing to do."""
    return 127.5 + 25 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)


def test_deepfool_is_foolboxs(model: OnLevels, pictures: torch.Tensor) -> None:
    foolbox = pytest.importorskip("foolbox", reason="an independent DeepFool")
    peer = foolbox.PyTorchModel(model, bounds=(0, 255), device="cpu")
    attack = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=6, overshoot=0.02)
    said = said_of(model, pictures)
    expected, _, fooled = attack(peer, pictures, said, epsilons=None)
    own = torch.stack([deepfool(model, picture, classes=6) for picture in pictures])
    torch.testing.assert_close(own, expected - pictures, atol=2e-3, rtol=1e-3)
    assert fooled.all()
    assert fooling_rate(said, said_of(model, pictures, own)) == 1.0
    # Nearly the shortest: half of it does not do.
    assert fooling_rate(said, said_of(model, pictures, own / 2)) == 0.0


def test_fast_gradients_and_the_fooling_rate_are_foolboxs(model: OnLevels, pictures: torch.Tensor) -> None:
    foolbox = pytest.importorskip("foolbox", reason="independent fast gradients")
    peer = foolbox.PyTorchModel(model, bounds=(0, 255), device="cpu")
    said = said_of(model, pictures)
    for norm, attack in (("linf", foolbox.attacks.FGSM()), ("l2", foolbox.attacks.L2FastGradientAttack())):
        radius = 4.0 if norm == "linf" else 60.0
        expected, _, fooled = attack(peer, pictures, said, epsilons=radius)
        own = fast_gradient(model, pictures, said, norm, radius)
        torch.testing.assert_close(own, expected - pictures, atol=1e-3, rtol=1e-4)
        rate = fooling_rate(said, said_of(model, pictures, own))
        assert 0 < rate < 1
        assert rate == pytest.approx(float(fooled.float().mean()))
        assert rate == pytest.approx(1 - foolbox.accuracy(peer, pictures + own, said))


def test_deepfool_reaches_the_border_of_a_linear_model_in_one_step() -> None:
    """For two classes f = w.x + b the least change is -f w / |w|^2 (Moosavi-Dezfooli et al. 2016, eq. 3)."""
    w = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            f = (x * w).sum((1, 2, 3)) + 0.7
            return torch.stack([f, torch.zeros_like(f)], 1)

    picture = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    f = float((picture * w).sum() + 0.7)
    expected = -f * w / w.square().sum()
    torch.testing.assert_close(deepfool(Linear(), picture) / 1.02, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_universal_perturbation_stays_in_its_ball_and_fools(
    norm: str, model: OnLevels, pictures: torch.Tensor
) -> None:
    radius = 30.0 if norm == "linf" else 250.0
    visited: list[int] = []

    def each(order: list[int]) -> list[int]:
        visited.extend(order)
        return order

    change = universal_perturbation(model, pictures, norm, radius, wanted=0.75, passes=4, seed=0, each=each)
    size = change.abs().max() if norm == "linf" else change.norm()
    assert size <= radius * (1 + 1e-5)
    before = said_of(model, pictures)
    rate = fooling_rate(before, said_of(model, pictures, change))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 8, 8, generator=generator)
    noise = noise.sign() * radius if norm == "linf" else noise * radius / noise.norm()
    assert rate > fooling_rate(before, said_of(model, pictures, noise)) + 0.1, "more than noise of the same size"
    assert sorted(visited[:40]) == list(range(40))
    again = universal_perturbation(model, pictures, norm, radius, wanted=0.75, passes=4, seed=0)
    assert torch.equal(change, again)
    one = universal_fast_gradient(model, pictures, before, norm, radius)
    assert (one.abs().max() if norm == "linf" else one.norm()) == pytest.approx(radius, rel=1e-5)


def test_projection_is_the_nearest_point() -> None:
    change = torch.tensor([3.0, -4.0, 0.5]).reshape(3, 1, 1)
    assert projected(change, "linf", 1.0).flatten().tolist() == [1.0, -1.0, 0.5]
    short = projected(change, "l2", 2.0)
    assert float(short.norm()) == pytest.approx(2.0)
    assert torch.allclose(short / short.norm(), change / change.norm())
    assert torch.equal(projected(change, "l2", 50.0), change)


def test_what_is_seen_is_a_picture(model: OnLevels) -> None:
    black = torch.zeros(1, 3, 8, 8)
    assert torch.equal(model(black), model(black - 40)), "levels below 0 are 0"


def test_counts() -> None:
    assert counts_of("100, 50,50") == [50, 100]
    for wrong in ("", "0", "1.5", "many"):
        with pytest.raises(LabError, match="--used"):
            counts_of(wrong)


def test_the_command(scenes: Path, tmp_path: Path, vit_file: Path, cnn_file: Path) -> None:
    shared = ("--data", scenes, "--epochs", "2", "--batch-size", "8", "--track", "none")
    for name, file in (("vit", vit_file), ("cnn", cnn_file)):
        lab_commands.here("vit_transfer.train", "--model", f"tiny-{name}", "--weights", file, *shared, "--baselines", "no",
                          "--unfreeze", "all", "--no-report", "--output", tmp_path / name)  # fmt: skip
    run = tmp_path / "attack"
    # The second is a plain export, as another program may have written one.
    models = f"{tmp_path / 'vit'},{tmp_path / 'cnn' / 'model'}"
    arguments = ("--models", models, "--used", "4,12", "--passes", "2", "--radius", "60", *shared)
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
        assert [row["pictures"] for row in results["by pictures used"][name]] == [4, 12]
    html = (run / "report.html").read_text(encoding="utf-8")
    for heading in ("Numbers", "How many pictures it takes", "Transfer", "What fools"):
        assert heading in html
    # What is there is not made again, and what was lost is: the same.
    kept, lost = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    lab_commands.here("vit_transfer.attack", "--resume", run)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == lost
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
