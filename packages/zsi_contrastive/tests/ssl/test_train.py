"""`pretrain` as it is run, and what is around its loop."""

import copy
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from labs_testing import commands as lab_commands
from labs_testing.commands import in_two_processes, losses, real_data
from labs_testing.pretended_runs import Budget
from labs_testing.promises import TrainingPromises
from labs_testing.trainings import Training
from PIL import Image
from safetensors.torch import load_file

from labs_common.errors import LabError
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.ssl.compare import LIBRARIES
from zsi_contrastive.ssl.config import PretrainConfig
from zsi_contrastive.ssl.methods import METHODS, complete
from zsi_contrastive.ssl.saved import load_encoder
from zsi_contrastive.ssl.train import cosine, make_network, make_optimizer

SMALL = ("--side", "16", "--batch-size", "32", "--epochs", "1", "--hidden", "16", "--outputs", "12", "--queue", "64",
         "--track", "none")  # fmt: skip

BUDGETS = {
    "moco": Budget(operators=800, syncs=2, copies=3),
    "dino": Budget(operators=1480, syncs=2, copies=3),
}


def here(*arguments: object, code: int = 0) -> lab_commands.Done:
    return lab_commands.here("zsi_contrastive.pretrain", *arguments, code=code)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(looks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method: one epoch of three steps."""
    runs = {}
    for method in METHODS:
        runs[method] = tmp_path_factory.mktemp("runs") / method
        report = () if method in ("simclr", "dino") else ("--no-report",)
        here("--method", method, "--data", looks, *SMALL, "--map", "pca", *report, "--output", runs[method])
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_an_encoder_and_its_measures(method: str, finished: dict[str, Path]) -> None:
    run = finished[method]
    results = json.loads((run / "results.json").read_text())
    assert results["cost"]["steps"] == 3
    assert results["cost"]["pictures"] == 96
    test = results["test"]
    assert 0 <= test["knn"] <= 1
    assert 0 <= test["probe"] <= 1
    assert test["spread"] > 0
    assert test["effective rank"] > 1
    measured = [line for line in lines(run) if "test/knn" in line]
    assert [line["step"] for line in measured] == [0, 1, 2, 3]
    assert measured[0]["test/knn"] == test["knn before"]
    encoder = load_encoder(run)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    state = load_file(run / "model" / "encoder.safetensors")
    if method not in ("gim", "cpc"):
        body = make_backbone("tiny", False, run / "model" / "encoder.safetensors", 0, 8).body
        assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())


def test_the_report_shows_what_was_learnt(finished: dict[str, Path]) -> None:
    page = (finished["dino"] / "report.html").read_text()
    for said in ("kNN, test, random weights", "effective rank", "Nearest neighbours", "Map of the features",
                 "small view", "The teacher&#39;s", "--backbone-weights", "linear probe"):  # fmt: skip
        assert said in page, said
    assert (finished["simclr"] / "figures" / "knn.svg").exists()


@pytest.mark.alone
def test_same_seed_same_bytes(looks: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    here("--method", "gim", "--data", looks, *SMALL, "--no-report", "--output", tmp_path / "again")
    one, two = (run / "model" / "encoder.safetensors" for run in (finished["gim"], tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()
    assert losses(finished["gim"]) == losses(tmp_path / "again")


class TestPromises(TrainingPromises):
    """Teacher, queue and centre are as they were; the encoder's outputs do not depend on the batch."""

    @pytest.fixture(scope="class", params=["moco", "dino"])
    def training(
        self, request: pytest.FixtureRequest, looks: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Training:
        method = request.param
        options = ("--method", method, "--data", looks, *SMALL, "--backbone", "test_vit", "--side", "32", "--head-norm",
                   "layer", "--no-probe", "--batch-size", "16")  # fmt: skip
        whole = tmp_path_factory.mktemp("runs") / method
        here(*options, "--no-report", "--output", whole)
        return Training(
            "zsi_contrastive.pretrain",
            LIBRARIES,
            options,
            whole,
            "model/encoder.safetensors",
            frozen=None,
            planned=True,
            gpu=BUDGETS[method],
        )


@pytest.mark.alone
@pytest.mark.parametrize("method", ["simclr", "moco", "dino"])
def test_two_processes_equal_one(method: str, looks: Path, tmp_path: Path) -> None:
    """With an encoder and heads whose outputs do not depend on the batch."""
    options = ("--method", method, "--data", looks, *SMALL, "--backbone", "test_vit", "--side", "32", "--head-norm",
               "layer", "--no-report", "--no-probe", "--max-steps", "2", "--evaluate-every", "2")  # fmt: skip
    here(*options, "--output", tmp_path / "one")
    in_two_processes(
        "zsi_contrastive.pretrain", LIBRARIES, *options, "--output", tmp_path / "two",
        XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=0.03)  # of 24 pictures one may be between two classes
    one, two = (load_file(tmp_path / name / "model" / "encoder.safetensors") for name in ("one", "two"))
    moved = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved < 2e-4  # AdamW's first steps are as long as the learning rate, whatever the slope


@pytest.mark.alone
def test_pictures_without_classes(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(30):
        levels = generator.integers(0, 255, (20, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    said = here("--data", folder, *SMALL, "--output", tmp_path / "run", code=2)
    assert said.errors == [line for line in said.errors if "broken.jpg" in line]
    said = here("--data", folder, *SMALL, "--batch-size", "8", "--on-bad-data", "skip", "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "knn" not in results["test"]
    assert results["test"]["spread"] > 0
    assert (tmp_path / "run" / "report.html").exists()
    said = here("--data", folder, *SMALL, "--batch-size", "8", "--on-bad-data", "skip", "--patience", "2", code=2)
    assert "nothing to watch" in said.errors[0]


def test_labels_can_be_learnt_from_and_features_probed_as_in_papers(looks: Path, tmp_path: Path) -> None:
    here("--data", looks, *SMALL, "--loss", "supervised", "--max-steps", "2", "--probe-epochs", "1", "--projected",
         "--knn-temperature", "0.07", "--no-report", "--output", tmp_path / "run")  # fmt: skip
    test = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert 0 <= test["probe by sgd"] <= 1
    assert 0 <= test["knn projected"] <= 1
    assert test["knn projected"] != test["knn"]


def test_all_training_pictures_can_be_trained_on(looks: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for file in looks.glob("*.parquet"):
        if not file.name.startswith("validation"):
            shutil.copy(file, tmp_path / "data")
    options = ("--data", tmp_path / "data", *SMALL, "--validation-fraction", "0", "--map", "none")
    here(*options, "--loss", "nce", "--output", tmp_path / "run")
    test = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    curve = [line["test/knn"] for line in lines(tmp_path / "run") if "test/knn" in line]
    assert test["knn max"] == max(curve)
    assert test["knn"] == curve[-1]
    assert "knn validation" not in test
    assert "probe" in test
    assert "best of all evaluations" in (tmp_path / "run" / "report.html").read_text()
    for option in (("--patience", "1"), ("--probe-epochs", "2"), ("--schedule", "plateau")):
        assert "validation pictures" in here(*options, *option, code=2).errors[0]


@pytest.mark.parametrize(("arguments", "said"), [
    (("--drop-path", "0.1"), "--drop-path: tiny has no stochastic depth"),
    (("--measured", "teacher"), "--measured teacher: simclr has none"),
    (("--batch-size", "500"), "only 96 training pictures"),
    (("--backbone", "vit_huge_typo"), "timm has no such model"),
    (("--backbone", "test_vit", "--side", "20", "--method", "dino"), "does not take pictures of"),
    (("--data", "/nowhere/at/all"), "--data"),
    (("--crop-scale", "0.5", "0.1"), "--crop-scale"),
])  # fmt: skip
def test_wrong_input_is_one_line(arguments: tuple[str, ...], said: str, looks: Path, tmp_path: Path) -> None:
    done = here("--data", looks, *SMALL, *arguments, "--output", tmp_path / "run", code=2)
    assert len(done.errors) == 1
    assert said in done.errors[0]


def test_a_wrong_batch_leaves_no_run(looks: Path, tmp_path: Path) -> None:
    here("--data", looks, *SMALL, "--batch-size", "500", "--output", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_broken_encoders_are_refused(finished: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no trained model"):
        load_encoder(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pretrained.json").write_text((finished["simclr"] / "model" / "pretrained.json").read_text())
    (tmp_path / "model" / "encoder.safetensors").write_bytes(b"")
    with pytest.raises(LabError, match="cannot be read"):
        load_encoder(tmp_path)


@pytest.mark.alone
@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_weights_start_the_same_network_of_timm_or_torchvision(name: str, looks: Path, tmp_path: Path) -> None:
    """As the detector, vit_transfer and clip_lab load them: by timm's names, or torchvision's for its ResNets."""
    import timm

    from labs_common.saved import load_exactly, read_weights

    here("--data", looks, *SMALL, "--backbone", name, "--side", "32", "--max-steps", "1", "--no-report", "--no-probe",
         "--map", "none", "--output", tmp_path / "run")  # fmt: skip
    file = tmp_path / "run" / "model" / "encoder.safetensors"
    size = {"img_size": 32} if name == "test_vit" else {}
    network = timm.create_model(name, num_classes=0, **size)
    load_exactly(network, read_weights(file, "--weights"), "--weights")
    if name != "test_vit":
        backbone = make_backbone(name, False, file, 0, 16)
        of_detector, own = {
            "resnet18": ("body.layer3.0.conv1.weight", "layer3.0.conv1.weight"),
            "test_convnext": ("body.stages_2.blocks.0.conv_dw.weight", "stages.2.blocks.0.conv_dw.weight"),
        }[name]
        assert torch.equal(backbone.get_parameter(of_detector), network.get_parameter(own))


@pytest.mark.alone
def test_greedy_modules_start_the_detectors_head(finished: dict[str, Path], scenes: Path, tmp_path: Path) -> None:
    options = ("--split", "scenes", "--data", scenes, "--min-side", "48", "--max-side", "64", "--batch-size", "4",
               "--max-steps", "2", "--controls", "0", "--track", "none", "--no-report", "--greedy-weights",
               finished["gim"] / "model" / "encoder.safetensors")  # fmt: skip
    done = lab_commands.here("zsi_contrastive.train", *options, "--output", tmp_path / "none", code=2)
    assert "--greedy-infomax" in done.errors[0]
    run = tmp_path / "run"
    lab_commands.here("zsi_contrastive.train", *options, "--greedy-infomax", "--patch-infonce", "--output", run)
    line = [line for line in lines(run) if "loss" in line][-1]
    assert line["greedy_infomax_loss"] > 0
    assert line["patch_infonce_loss"] > 0
    before = load_file(finished["gim"] / "model" / "encoder.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    name = "parts.0.0.weight"
    moved = (after[f"greedy.isolated.{name}"] - before[name]).abs().max()
    assert 0 < moved < 0.05, "they started there, and learnt"
    assert (run / "results.json").exists(), "the written model was read back and tested"


def test_timms_lars_is_lightlys() -> None:
    peer = pytest.importorskip("lightly.utils.lars", reason="lightly is the independent peer").LARS
    given = complete(PretrainConfig("simclr"))
    given.training.optimizer, given.training.learning_rate, given.training.weight_decay = "lars", 0.3, 1e-2
    networks = [METHODS["simclr"].network(given)] * 2
    networks[1] = copy.deepcopy(networks[0])
    ours = make_optimizer(given.training, networks[0])
    decayed = [p for p in networks[1].parameters() if p.ndim > 1]
    rest = [p for p in networks[1].parameters() if p.ndim <= 1]
    theirs = peer([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.3, momentum=0.9, weight_decay=1e-2)
    for seed in range(3):
        for network in networks:
            for number, parameter in enumerate(network.parameters()):
                generator = torch.Generator().manual_seed(100 * seed + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        ours.step()
        theirs.step()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_schedules() -> None:
    assert cosine(0, 10, 0.99, 1.0) == pytest.approx(0.99)
    assert cosine(10, 10, 0.99, 1.0) == pytest.approx(1.0)
    assert cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    schedule = pytest.importorskip("lightly.utils.scheduler", reason="lightly is the independent peer").cosine_schedule
    assert cosine(3, 10, 0.9, 1.0) == pytest.approx(schedule(3, 11, 0.9, 1.0), abs=1e-9)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharded_weights_are_refused(kind: str) -> None:
    launched = types.SimpleNamespace(num_processes=2, distributed_type=DistributedType[kind])
    with pytest.raises(LabError, match="multi_gpu"):
        make_network(complete(PretrainConfig("byol")), launched)
    with pytest.raises(LabError, match="multiple of the 3 processes"):
        make_network(complete(PretrainConfig("byol")), types.SimpleNamespace(num_processes=3))


@pytest.mark.long
def test_neighbours_get_better_on_real_pictures(tmp_path: Path) -> None:
    data = real_data("cifar10-mini")
    here("--data", data, "--limit", "1500", "--epochs", "4", "--track", "none", "--no-probe", "--map", "none",
         "--output", tmp_path / "run")  # fmt: skip
    test = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert test["knn"] > test["knn before"] + 0.02
