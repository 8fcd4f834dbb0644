"""What every training command promises: one suite that each lab's tests run on a small training of its own.

```
class TestPromises(TrainingPromises):
    @pytest.fixture(scope="class")
    def training(self, finished: Path, options: tuple[object, ...]) -> Training:
        return Training("vit_transfer.train", LIBRARIES, options, finished, "model/model.safetensors",
                        gpu=Budget(operators=170, syncs=5, copies=2))
```
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labs_common.checkpoint import checkpoints
from labs_common.frozen.audit import FrozenAudit, frozen_tensors
from labs_common.run import Run
from labs_common.training import Loop
from labs_testing.bad_inputs import rows_of, write_bad_files
from labs_testing.commands import (
    Done,
    in_two_processes,
    launch_values,
    losses,
    two_processes,
    with_deepspeed,
)
from labs_testing.pretended_runs import Asked, assert_within, on_pretended_gpu
from labs_testing.sharded import fsdp_variables
from labs_testing.trainings import Training, killed_and_resumed, newest, reaches, step_of

# How often a lab's run is killed before it may end; `LABS_KILLS=20 pytest -m kills` tries harder. What all labs share is
# killed more often in the core's own tests, where a run begins at once.
KILLS = int(os.environ.get("LABS_KILLS", "1"))

TRIED: set[str] = set()  # commands whose bad inputs this process has tried


@pytest.mark.alone
class TrainingPromises:
    """The tests; a lab's subclass has a fixture `training`."""

    killed_sharded = False

    @pytest.mark.kills
    def test_killed_at_any_moment_it_resumes_to_the_same_bytes(self, training: Training, tmp_path: Path) -> None:
        training.assert_same(killed_and_resumed(training, tmp_path, KILLS))

    @pytest.mark.kills
    def test_sharded_over_two_processes(self, training: Training, tmp_path: Path) -> None:
        """FSDP2: each process has a part of the frozen weights too, and hashes of its own to compare with.

        Where `killed_sharded` says so it is killed and resumed; that it goes on to the same bytes is for the core's tests.
        """
        if training.sharded is None or training.launch is None:
            pytest.skip("not said to be sharded")
        run, variables = tmp_path / "run", fsdp_variables(training.launch / "fsdp.yaml")
        options = (*training.options, *training.sharded.options, "--save-every", 2, "--output", run, "--no-report")
        if self.killed_sharded:
            both = two_processes(training.module, training.libraries, *options, **variables)
            assert reaches(both[0], run, 3)
            for process in both:
                process.kill()
                process.join()
            assert newest(run) is not None
            before = (run / "frozen.json").read_text()
            in_two_processes(training.module, training.libraries, "--resume", run, **variables)
            assert (run / "frozen.json").read_text() == before
        else:
            in_two_processes(training.module, training.libraries, *options, **variables)
        training.assert_near(run, training.sharded)
        kept = json.loads((run / "frozen.json").read_text())
        if kept:  # something is frozen
            assert [type(hashes) for hashes in kept] == [dict, dict], "the processes have other parts"

    @pytest.fixture(scope="class")
    def bad_files(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_bad_files(tmp_path_factory.mktemp("bad"))

    def test_bad_inputs_are_refused_in_one_line_before_any_work(
        self, training: Training, bad_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every row of the table; nothing is written to the output, nor to a run that is there."""
        if training.module in TRIED:
            pytest.skip("with another training of this command")
        TRIED.add(training.module)
        monkeypatch.chdir(tmp_path)
        before = {path: path.stat().st_mtime_ns for path in training.whole.rglob("*")}
        rows, failed = rows_of(training.module), []
        for row, names in rows.items():
            with monkeypatch.context() as patch:
                done = run_row(training, row.format(files=bad_files, whole=training.whole), tmp_path / "out", patch)
            named = len(done.errors) == 1 and names.format(files=bad_files, whole=training.whole) in done.errors[0]
            if done.code != 2 or not named or "Traceback" in done.stderr or (tmp_path / "out").exists():
                failed.append(f"{row}\n    {done.code}: {done.stderr.strip()[-600:]}")
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert not failed, "\n".join(failed)
        assert len(rows) >= 60
        assert {path: path.stat().st_mtime_ns for path in training.whole.rglob("*")} == before

    def test_the_saved_config_runs_it_again(self, training: Training, tmp_path: Path) -> None:
        training.here("--config", training.whole / "config.yaml", "--output", tmp_path / "again", "--no-report")
        training.assert_same(tmp_path / "again")
        assert not (tmp_path / "again" / "report.html").exists()

    @pytest.mark.long
    def test_two_processes(self, training: Training, tmp_path: Path) -> None:
        run = tmp_path / "two"
        more = (*training.two.options, "--output", run, "--no-report")
        in_two_processes(
            training.module, training.libraries, *training.options, *more, XDG_CACHE_HOME=str(tmp_path / "cache")
        )
        training.assert_near(run, training.two)

    def test_what_is_frozen_is_audited(
        self, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Something frozen moves during the training: the run is not done, and the tensor is named."""
        if training.frozen is None:
            pytest.skip("this command freezes nothing")
        check, moved = FrozenAudit.check, []

        def moving(audit: FrozenAudit, start: dict[str, str] | None = None) -> None:
            name, tensor = next(
                (name, tensor) for name, tensor in frozen_tensors(audit.model) if tensor.is_floating_point()
            )
            moved.append(name)
            with torch.no_grad():
                tensor.add_(1)
            check(audit, start)

        monkeypatch.setattr(FrozenAudit, "check", moving)
        run = tmp_path / "moved"
        done = training.here(*training.options, *training.frozen, "--max-steps", 1, "--output", run, code=1)
        assert len(done.errors) == 1
        assert moved[0] in done.errors[0]
        assert not (run / "results.json").exists()

    def test_a_loss_that_is_no_number_stops_it(
        self, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last good checkpoint stays, and the run goes on from it to the same bytes."""
        run, step, at = tmp_path / "nan", Loop.step, step_of(training.whole) - 1

        def breaking(loop: Loop, loss: torch.Tensor, count: int, **metrics: float) -> None:
            step(loop, loss * float("nan") if loop.step_number == at else loss, count, **metrics)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "step", breaking)
            done = training.here(*training.options, "--save-every", 2, "--output", run, code=1)
        assert len(done.errors) == 1
        assert f"at step {at + 1}" in done.errors[0]
        kept = newest(run)
        assert kept is not None
        assert str(kept) in done.errors[0]
        assert all(tensor.isfinite().all() for tensor in load_file(kept / "trainable.safetensors").values())
        training.here("--resume", run, "--no-report")
        training.assert_same(run)

    def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(self, training: Training, tmp_path: Path) -> None:
        run = shutil.copytree(training.whole, tmp_path / "damaged")
        newest_one, *_ = reversed(checkpoints(run / "checkpoints"))
        file = newest_one / random.choice(["trainable.safetensors", "optimizer.pt"])
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        done = training.here("--resume", run, code=2)
        assert len(done.errors) == 1
        assert str(newest_one) in done.errors[0]
        assert "delete" in done.errors[0]
        shutil.rmtree(newest_one)
        shutil.rmtree((run / training.weights).parent)
        training.here("--resume", run, "--no-report")
        training.assert_same(run)

    def test_a_damaged_cache_is_mended_or_named(
        self, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The largest file of each directory in the cache, cut in half and with other bytes in its middle."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        short = (*training.options, "--max-steps", 2, "--no-report", "--output")
        training.here(*short, tmp_path / "first")
        if not largest_files(tmp_path / "cache" / "foundation-labs"):
            pytest.skip("this training keeps nothing in the cache")
        expected = losses(tmp_path / "first")
        for number, file in enumerate(largest_files(tmp_path / "cache" / "foundation-labs")):
            whole, half = file.read_bytes(), file.stat().st_size // 2
            for kind, damaged in {
                "cut": whole[:half],
                "other": whole[:half] + b"\xff" * 64 + whole[half + 64 :],
            }.items():
                file.write_bytes(damaged)
                done = training.here(*short, tmp_path / f"{kind}-{number}", code=None)
                if done.code == 0:
                    assert losses(tmp_path / f"{kind}-{number}") == expected, f"{file}: {kind}"
                else:
                    assert (done.code, len(done.errors)) == (2, 1), done.stderr
                    assert str(file.parent) in done.errors[0]
                    assert "delete" in done.errors[0]
                file.write_bytes(whole)

    def test_output_that_exists_or_cannot_be_written_is_refused(self, training: Training, tmp_path: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in training.whole.rglob("*")}
        done = training.here(*training.options, "--output", training.whole, code=2)
        assert "--output" in done.errors[0]
        assert f"--resume {training.whole}" in done.errors[0]
        assert {path: path.stat().st_mtime_ns for path in training.whole.rglob("*")} == before
        for place in (Path("/proc/run"), training.whole / "config.yaml"):
            assert len(training.here(*training.options, "--output", place, code=2).errors) == 1
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        if not os.access(closed, os.W_OK):  # root may write anywhere
            assert len(training.here(*training.options, "--output", closed / "run", code=2).errors) == 1

    def test_a_full_disk_stops_it_and_it_goes_on(self, training: Training, tmp_path: Path) -> None:
        """A checkpoint after the first finds no room; with room the run goes on to the same bytes."""
        one = sum(path.stat().st_size for path in (checkpoints(training.whole / "checkpoints")[-1]).iterdir())
        with small_disk(tmp_path / "disk", 200_000 + one * 3 // 2) as (disk, enlarge):
            run = disk / "run"
            done = training.here(*training.options, "--save-every", 2, "--output", run, code=1)
            assert len(done.errors) == 1
            assert "disk is full" in done.errors[0]
            assert f"--resume {run}" in done.errors[0]
            kept = newest(run)
            assert kept is not None
            assert step_of(kept) < step_of(training.whole)
            enlarge()
            training.here("--resume", run, "--no-report")
            training.assert_same(run)

    @pytest.mark.pretended
    def test_on_a_pretended_gpu(self, training: Training, tmp_path: Path) -> None:
        """In bf16: every tensor is where it must be, and steps keep to their budget.

        Where a method remembers more than weights and optimizer, a resumed run has the same bytes; the core's own
        training shows it for those, as all labs' loops are the core's.
        """
        run, again = tmp_path / "run", tmp_path / "again"
        short = ("--precision", "bf16", "--max-steps", 5, "--evaluate-every", 5, "--save-every", 3, "--output", run)
        asked = Asked(training.module, (*training.options, *short))
        (ran,) = on_pretended_gpu(training.libraries, tmp_path / "said", asked)
        assert_within(ran, training.gpu)
        assert losses(run)[0] == pytest.approx(losses(training.whole)[0], rel=0.1), "on a CPU, in float32"
        if training.planned:  # without a weight, within 15 % of what the training held at most
            said = training.here(*training.options, "--precision", "bf16", "--plan", "--gpu-memory", 80).stdout
            (peak,) = re.findall(r"peak ([\d.]+) GB", said)
            real = max(line["peak_memory"] for line in Run(run).lines("timing.jsonl"))
            assert float(peak) * 1e9 == pytest.approx(real, rel=0.15), said
        if not list(run.glob("checkpoints/*/also.pt")):
            return
        shutil.copytree(run, again)
        shutil.rmtree((again / training.weights).parent)
        for checkpoint in checkpoints(again / "checkpoints"):
            if step_of(checkpoint) > 3:
                shutil.rmtree(checkpoint)
        on_pretended_gpu(
            training.libraries, tmp_path / "resumed", Asked(training.module, ("--resume", again, "--no-report"))
        )
        for name in ("metrics.jsonl", training.weights, *training.same):
            assert (again / name).read_bytes() == (run / name).read_bytes(), name

    @pytest.mark.long
    def test_launch_configurations(self, training: Training, tmp_path: Path) -> None:
        """Each is one that Accelerate knows; a ZeRO one takes the whole road, with one process on a CPU."""
        if training.launch is None:
            pytest.skip("the lab's other command has them")
        files = sorted(training.launch.glob("*.yaml"))
        assert [file.stem for file in files] == [
            "cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp", "gpu", "multi_gpu", "multi_node",
        ]  # fmt: skip
        for file in files:
            launch_values(file)
        if training.zero is None:
            return
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
        run = tmp_path / "run"
        with_deepspeed(
            training.launch / f"deepspeed_zero{training.zero_stage}.yaml",
            tmp_path, training.module, training.libraries,
            *training.options, "--save-every", 4, "--no-report", "--output", run, *training.zero,
            "--precision", "bf16",
        )  # fmt: skip
        assert list(run.glob("checkpoints/*/sharded")), "DeepSpeed took part"
        # In bf16, which DeepSpeed does in a way of its own; that it is exact otherwise is for the core's tests.
        first, expected = losses(run)[0], losses(training.whole)[0]
        assert first != expected
        assert first == pytest.approx(expected, rel=0.01)
        assert step_of(run) > 1


def run_row(training: Training, row: str, output: Path, patch: pytest.MonkeyPatch) -> Done:
    """Types a row after the training's own options, with variables of the environment that stand before it."""
    words = shlex.split(row)
    while words and "=" in words[0] and not words[0].startswith("-"):
        patch.setenv(*words.pop(0).split("=", 1))
    if "--resume" not in words:
        words = [*map(str, training.options), "--output", str(output), *words]
    try:
        return training.here(*words, code=None)
    except Exception:
        return Done("", traceback.format_exc(), 1)


def largest_files(folder: Path) -> list[Path]:
    """The largest file of each directory in the cache."""
    found = [max((path for path in part.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
             for part in sorted(folder.iterdir()) if part.is_dir()]  # fmt: skip
    return [path for path in found if path.stat().st_size > 128]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A file system of `size` bytes in memory, and what makes it large; skips where it may not be made."""
    folder.mkdir()
    become = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*become, "mount", "-t", "tmpfs", "-o", f"size={size},uid={os.geteuid()}", "tmpfs", str(folder)]
    try:
        allowed = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("a small disk cannot be made here (needs root, or sudo without a password)")
    try:
        larger = [*become, "mount", "-o", "remount,size=1g", str(folder)]
        yield folder, partial(subprocess.run, larger, check=True)
    finally:
        subprocess.run([*become, "umount", "--lazy", str(folder)], check=True)
