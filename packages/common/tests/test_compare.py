"""The frame of a comparison: its plan, what runs left, the rules, and the report."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_checkpoint import locked
from toy.training import ToyConfig

from labs_common.cli import held
from labs_common.compare import processes
from labs_common.compare.collect import (
    Entry,
    cell,
    check_same_data,
    collect,
    mean_and_spread,
    pareto,
    recommend,
    rows_of,
    within_one_error,
)
from labs_common.compare.plan import claim, comparison_folder, entries_of, name_and_flags, plan_runs
from labs_common.compare.processes import compare_runs
from labs_common.compare.report import (
    Findings,
    budget_section,
    curves_of,
    notes_on,
    pareto_section,
    recommendation_section,
    table_of,
    write_comparison,
)
from labs_common.errors import LabError, RunStopped
from labs_common.options import ComparisonOptions
from labs_common.run import Run

pytestmark = pytest.mark.quick


@dataclass
class Config:
    """Compares."""

    methods: str = "a,b"
    comparison: ComparisonOptions = field(default_factory=ComparisonOptions)


def plan(text: str, **options: int) -> dict[str, tuple[str, list[str]]]:
    known = ["a", "b"]
    return plan_runs(ComparisonOptions(**options), "--methods", text, "method", lambda *made: made, known)


def test_entries_are_planned_and_wrong_ones_named() -> None:
    assert plan("a, b:rank=8:no-bias") == {"a": ("a", []), "b:rank=8:no-bias": ("b", ["--rank=8", "--no-bias"])}
    assert name_and_flags("x:learning_rate=1e-4") == ("x", ["--learning-rate=1e-4"])
    for text, said in (("a,a", "a occurs twice"), (" ,", "is empty"), ("a,c:x=1", "--methods c:x=1: no such method; ")):
        with pytest.raises(LabError, match=said):
            plan(text)
    assert entries_of("--methods", "a,b,") == ["a", "b"]

    def refusing(name: str, flags: list[str]) -> None:
        raise LabError("no such option")

    with pytest.raises(LabError, match="--methods a:x=1: no such option"):
        plan_runs(ComparisonOptions(), "--methods", "a:x=1", "method", refusing)


def test_runs_of_a_seed_have_the_same_data(tmp_path: Path) -> None:
    """Data that were changed between two runs of a comparison; those of another seed are others."""
    runs = {name: Run(tmp_path / name) for name in ("one", "two", "other")}
    for name, run in runs.items():
        checkpoint = run.path / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        run.save_json("splits.json", {"train": name == "other"})
        (checkpoint / "position.json").write_text(json.dumps({"data": 1}))
    entries = {"a": Entry("a", {0: runs["one"], 1: runs["other"]}, {}), "b": Entry("b", {0: runs["two"]}, {})}
    check_same_data(entries)
    (runs["two"].path / "checkpoints" / "step-00000001" / "position.json").write_text("{}")  # of an earlier version
    check_same_data(entries)
    (runs["two"].path / "checkpoints" / "step-00000001" / "position.json").write_text('{"data": 2}')
    with pytest.raises(LabError, match=r"two: had other data than .*one"):
        check_same_data(entries)


def test_the_same_options_find_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config()
    folder = comparison_folder("compare", config, [None])
    assert comparison_folder("compare", dataclasses.replace(config), []) == folder
    assert comparison_folder("compare", Config(methods="a"), []) != folder
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(LabError, match="is not empty and holds no comparison"):
        comparison_folder("compare", Config(comparison=ComparisonOptions(output=tmp_path / "full")), [])


def finished(folder: Path, name: str, seed: int, accuracy: float, trainable: int, key: str = "trainable") -> None:
    run = Run(folder / name / f"seed-{seed}")
    run.path.mkdir(parents=True)
    cost = {key: trainable, "parameters": 100, "steps": 4, "pictures": 32, "seconds": 2.0 + seed}
    machine = {"python": "3", "packages": {"torch": "2"}}
    run.save_json("results.json", {"test": {"accuracy": accuracy}, "cost": cost, "environment": machine})
    run.save_json("said.json", [name, seed])
    for step in range(4):
        run.append("metrics.jsonl", {"step": step, "epoch": step / 2, "loss": 1.0 / (1 + step)})


@pytest.fixture
def entries(tmp_path: Path) -> dict[str, Entry]:
    for seed in (0, 1):
        finished(tmp_path, "large", seed, 0.90 + seed / 100, 50)
        finished(tmp_path, "small", seed, 0.89 + seed / 100, 5, key="trained")  # as before version 0.2
    finished(tmp_path, "bad", 1, 0.5, 1)
    (tmp_path / "broken" / "seed-0").mkdir(parents=True)
    return collect(tmp_path, ["large", "small", "bad", "broken"], range(2))


def test_what_finished_is_collected(entries: dict[str, Entry]) -> None:
    assert list(entries) == ["large", "small", "bad"]
    large = entries["large"]
    assert large.values("test", "accuracy") == [0.90, 0.91]
    assert large.values("test", "nothing", "there") == []
    assert large.mean("test", "accuracy") == pytest.approx(0.905)
    assert large.cost("seconds", 2) == [1.0, 1.5]
    assert entries["small"].cost("trainable") == [5, 5]
    assert large.read("said.json") == {0: ["large", 0], 1: ["large", 1]}
    assert large.curve("loss") == ([0, 1, 2, 3], [1.0, 1 / 2, 1 / 3, 1 / 4])
    assert large.epochs("loss")[0] == [0, 0.5, 1, 1.5]
    assert list(entries["bad"].results) == [1]


def test_a_comparison_in_which_nothing_finished_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "finished_runs", lambda *_: {"a, seed 0": 1})
    with pytest.raises(RunStopped, match="no run finished"):
        compare_runs(tmp_path / "all", Config(), "toy.training", {"a": None}, lambda *_: pytest.fail("a report"))


def test_a_comparison_that_another_process_works_on_is_refused(tmp_path: Path) -> None:
    """So is one of which a run outlived its own comparison; nothing of it is taken away, and nobody waits."""
    run = tmp_path / "all" / "a" / "seed-0"
    planned = {"a": ToyConfig()}
    for busy in (tmp_path / "all", run):
        busy.mkdir(parents=True, exist_ok=True)
        claim(tmp_path / "all", Config())
        (busy / "half").touch()
        with (
            held,
            locked(busy),
            pytest.raises(LabError, match=f"^{busy}: process 1 on another-machine is at work there"),
        ):
            compare_runs(tmp_path / "all", Config(), "toy.training", planned, lambda *_: pytest.fail("a report"))
        assert (busy / "half").exists()
        (busy / "half").unlink()


def test_rows_have_means_and_spreads(entries: dict[str, Entry]) -> None:
    measures = {"accuracy": lambda entry: entry.values("test", "accuracy")}
    rows = rows_of("network", entries.values(), measures)
    assert rows[0] == {
        "network": "large",
        "accuracy": pytest.approx(0.905),
        "accuracy ±": pytest.approx(0.0070711, rel=1e-4),
    }
    assert rows[2] == {"network": "bad", "accuracy": 0.5}
    assert cell(rows[0], "accuracy") == "0.905 ± 0.00707"
    assert cell(rows[0], "nothing") is None
    assert mean_and_spread("x", []) == {}
    table = table_of(rows, ("network", "accuracy"), "said")
    assert [list(row) for row in table.rows][:1] == [["large", "0.905 ± 0.00707"]]


def test_the_smallest_within_noise_of_the_best_is_recommended(entries: dict[str, Entry]) -> None:
    def quality(entry: Entry) -> float:
        return entry.mean("test", "accuracy")

    best, equal = recommend(
        entries, quality, lambda best, other: best.mean("cost", "trainable") > 2 < quality(other), "trainable"
    )
    assert (best.name, [entry.name for entry in equal]) == ("large", ["large"])
    best, equal = recommend(entries, quality, lambda best, other: quality(best) - quality(other) < 0.02, "trainable")
    assert (best.name, [entry.name for entry in equal]) == ("small", ["large", "small"])
    # Breiman's one standard error: 0.05 ± 0.065 is within, 0.5 ± 0.058 is not.
    assert within_one_error([-0.1, 0.2, 0.0, 0.1])
    assert not within_one_error([0.4, 0.6, 0.4, 0.6])


def test_pareto_front() -> None:
    points = {"cheap": (1.0, 1.0), "dear": (9.0, 3.0), "same": (9.0, 3.0), "middle": (4.0, 2.0), "beaten": (5.0, 2.0)}
    assert pareto(points) == ["cheap", "dear", "same", "middle"]


def test_the_report_is_made_of_what_all_labs_show(
    entries: dict[str, Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = Run(tmp_path), Config(comparison=ComparisonOptions(seeds=2))

    def quality(entry: Entry) -> float:
        return entry.mean("test", "accuracy")

    rows = rows_of("network", entries.values(), {"accuracy": lambda entry: entry.values("test", "accuracy")})
    large, small = entries["large"], entries["small"]
    both = {"large": large, "small": small}
    sections = [
        recommendation_section("network", large, small, [large, small], quality, "accuracy", "pictures", "trainable"),
        pareto_section(run, both, quality, "accuracy", {"trained parameters": (lambda e: e.cost("trainable"), True)}),
        budget_section("network", both, "pictures", "All had the same pictures."),
    ]
    sections[0].blocks += notes_on(config.comparison, {"broken, seed 0": 1})
    curves = {name: entry.curve("loss") for name, entry in entries.items()}
    sections[1].blocks.append(curves_of(run, curves, "optimizer step", "training loss", "Losses."))
    found = Findings("Networks compared", "One is best.", rows, sections, ("accuracy",), "small")
    write_comparison(run, config, found, {"broken, seed 0": 1})
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert (kept["recommended"], kept["failed"], kept["rows"][0]["network"]) == (
        "small",
        {"broken, seed 0": 1},
        "large",
    )
    page = (tmp_path / "report.html").read_text()
    for said in (
        "small trains the fewest parameters (5): recommended", "Mean ± standard deviation over 2 seeds",
        "broken, seed 0 (exit code 1)", "All had the same pictures", "What was asked", "Accuracy against trained",
    ):  # fmt: skip
        assert said in page
    assert (tmp_path / "figures" / "training-loss.svg").exists()
    said = capsys.readouterr()
    assert f"report: {tmp_path / 'report.html'}" in said.out
    assert "large: accuracy 0.905" in said.err
