"""What is said and refused of processes, GPUs and precision; the GPUs are pretended by patching what counts them."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from labs_testing.commands import free_port
from test_training import OPTIONS, finish
from torch.distributed.elastic.multiprocessing import SignalException
from toy import commands

from labs_common.compare.processes import launcher
from labs_common.device import mixed_precision
from labs_common.errors import Interrupted, LabError
from labs_common.launch import check_launch
from labs_common.options import Precision, TrainingOptions
from labs_common.training import make_accelerator

LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with eight GPUs, as far as counting goes, and nothing set by a launcher."""
    for name in (*LAUNCHED, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    # torch reads CUDA_VISIBLE_DEVICES itself and picks from what the driver counts.
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "device_count", torch.cuda._device_count_nvml)
    return monkeypatch


def said_of(precision: str, monkeypatch: pytest.MonkeyPatch, said: pytest.CaptureFixture[str], **more: str) -> str:
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    check_launch(precision)
    return said.readouterr().err


def test_idle_gpus_are_said_once(eight: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    said = said_of("bf16", eight, capsys)
    assert said.startswith("1 of 8 GPUs is used")
    assert said.count("\n") == 1
    assert said_of("bf16", eight, capsys, **two).startswith("2 of 8 GPUs")
    assert said_of("bf16", eight, capsys, RANK="1") == ""
    chosen = said_of("bf16", eight, capsys, RANK="0", CUDA_VISIBLE_DEVICES="1,4,6")
    assert "2 of 3 GPUs (CUDA_VISIBLE_DEVICES=1,4,6)" in chosen
    assert "as many processes on each machine (--num_processes)" in chosen
    assert said_of("bf16", eight, capsys, CUDA_VISIBLE_DEVICES="1,4") == "", "a scheduler gave just these"
    assert said_of("bf16", eight, capsys, CUDA_VISIBLE_DEVICES="1,4,6", ACCELERATE_USE_CPU="true") == ""


def test_a_launcher_that_does_not_count_is_left_alone(
    eight: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `srun` with a task for each GPU: how many are on this machine is not known."""
    assert said_of("bf16", eight, capsys, WORLD_SIZE="16", RANK="0") == ""


def test_a_gpu_that_a_scheduler_bound_to_each_process_is_enough(
    eight: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `srun --gpus-per-task=1` in a script that counts; the processes of torchrun see the same one."""
    bound = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}
    assert said_of("bf16", eight, capsys, **bound) == ""
    with pytest.raises(LabError, match="4 processes on a machine with 1 GPU"):
        said_of("bf16", eight, capsys, TORCHELASTIC_RUN_ID="none")


def test_deepspeed_without_a_launcher_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LabError, match="unset it, or start with accelerate launch"):
        check_launch("no")
    monkeypatch.setenv("RANK", "0")
    check_launch("no")


def test_no_precision_of_a_gpu_where_the_cpu_is_asked_for(eight: pytest.MonkeyPatch) -> None:
    eight.setattr(torch.cuda, "is_available", lambda: True)
    eight.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert mixed_precision("auto") == "fp16"
    eight.setenv("ACCELERATE_USE_CPU", "true")
    assert mixed_precision("auto") == "no"


def test_a_precision_that_the_launch_configuration_names_in_vain_is_said(
    eight: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eight.setenv("ACCELERATE_USE_CPU", "true")
    for asked, given, words in (("fp16", "bf16", "gives bf16"), ("bf16", "no", "gives fp32")):
        said = said_of(given, eight, capsys, ACCELERATE_MIXED_PRECISION=asked)
        assert said.count("\n") == 1
        assert f"mixed_precision {asked}" in said
        assert words in said
    for asked in ("no", "bf16"):  # "no" is also what Accelerate says for nothing
        assert said_of("bf16", eight, capsys, ACCELERATE_MIXED_PRECISION=asked) == ""


@pytest.mark.parametrize(("asked", "option", "used"), [("bf16", "fp32", "no"), ("no", "bf16", "bf16")])
def test_the_option_decides_on_precision(
    monkeypatch: pytest.MonkeyPatch, asked: str, option: Precision, used: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert make_accelerator(TrainingOptions(precision=option)).mixed_precision == used
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def in_a_fork(rank: int, visible: str, arguments: list[str], said: Path) -> None:
    """The toy as one of two processes that a launcher started on a machine whose driver counts two GPUs."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": visible, "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    os.environ.pop("ACCELERATE_USE_CPU", None)
    torch.cuda._raw_device_count_nvml = lambda: 2
    torch.accelerator.device_count = torch.cuda._device_count_nvml
    with said.open("w") as sys.stderr:
        commands.training(arguments=arguments)


@pytest.mark.parametrize("visible", ["1", ""])
@pytest.mark.parametrize("resumed", [False, True])
def test_fewer_gpus_than_processes_stop_all_of_them(tmp_path: Path, visible: str, resumed: bool) -> None:
    """None waits for another: they have not met yet."""
    run = tmp_path / "run"
    options = ("--precision", "fp32", *OPTIONS)  # auto would ask the GPU, which is there for counting only
    if resumed:
        finish("--output", run, "--max-steps", 1, *options)
    before = sorted(run.rglob("*"))
    arguments = ["--resume", str(run)] if resumed else ["--output", str(run), *options]
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=in_a_fork, args=(rank, visible, arguments, tmp_path / f"said-{rank}"))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        process.kill()
    assert [process.exitcode for process in both] == [2, 2]
    for rank, begin in enumerate(("error: ", "[process 1] error: ")):
        (line,) = (tmp_path / f"said-{rank}").read_text().splitlines()
        assert line.startswith(f"{begin}2 processes on a machine with {len(visible)} GPU")
        assert f"(CUDA_VISIBLE_DEVICES={visible})" in line
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("several", [False, True])
def test_a_launched_run_that_fails_says_its_own_line_alone(
    several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not a traceback of Accelerate's after it; and the exit code is the run's, also of one that a signal killed."""
    run, launch, kind = tmp_path / "run.py", tmp_path / "launch.yaml", "MULTI_GPU" if several else "NO"
    launch.write_text(
        f"compute_environment: LOCAL_MACHINE\ndistributed_type: '{kind}'\n"
        f"mixed_precision: 'no'\nnum_machines: 1\nnum_processes: {1 + several}\nuse_cpu: {not several}\n"
        f"dynamo_backend: 'NO'\nmain_process_port: {free_port()}\n"
    )
    # The number of threads is not in the file, where Accelerate would not know it.
    monkeypatch.setattr(
        "sys.argv", ["-c", "--config_file", str(launch), "--num_cpu_threads_per_process", "1", str(run)]
    )

    def end(code: int | str) -> None:
        raise SystemExit(code)

    # One process takes the launcher's place, which here is this test's own; so is who dies of a signal.
    monkeypatch.setattr(
        "os.execvpe", lambda _, command, environment: end(subprocess.run(command, env=environment).returncode)
    )
    monkeypatch.setattr("os.kill", lambda process, number: end(f"own {number}" if process == os.getpid() else 0))
    for code, last in ((2, "sys.exit(2)"), ("own 9" if several else -9, "os.kill(os.getpid(), 9)")):
        run.write_text("import os, sys\nif os.environ.get('RANK', '0') == '0':\n"
                       f"    print('error: --data x: no such file', file=sys.stderr, flush=True)\n{last}\n")  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            launcher()
        assert stop.value.code == code
        assert capfd.readouterr().err == "error: --data x: no such file\n"
    launch.write_text("")
    with pytest.raises(SystemExit) as stop:
        launcher()
    assert (stop.value.code, capfd.readouterr().err.count("\n")) == (2, 1)


def test_a_stopped_launch_of_several_is_no_unusable_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(args: object) -> None:  # as torch's elastic agent ends once it has passed SIGTERM on
        raise SignalException("Process 7 got signal: 15", sigval=signal.SIGTERM)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", stopped)
    monkeypatch.setattr("sys.argv", ["-c", "--config_file", "two.yaml", "run.py"])
    with pytest.raises(SystemExit) as stop:
        launcher()
    assert (stop.value.code, capfd.readouterr().err) == (Interrupted.exit_code, "")
