"""`accelerate launch` as the Slurm scripts start it; test_gpu_benchmarks.py has it with DeepSpeed.

The Slurm scripts run here with stand-ins for Slurm's commands; docs/gpus.md says what was tried with Slurm itself.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from labs_testing.commands import here, losses
from test_entry_points import ROOT

SCRIPTS = sorted(ROOT.glob("packages/*/launch/slurm.sbatch"))
# What srun does here: it starts one task on each machine and passes signals on to it.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
SLURM_NODEID=0 "$@" &
task=$!
trap 'kill -USR1 "$task"' USR1
while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) [ "$*" = "show hostnames machine-[1-2]" ] && echo 127.0.0.1 && echo machine-2 ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def stand_in(tmp_path: Path, name: str, text: str) -> None:
    """Puts a program of that name where it is found first."""
    program = tmp_path / "programs" / name
    program.write_text(text)
    program.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job 7 on one machine, in which the toy's script would run."""
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", SCONTROL)
    (tmp_path / "launch").symlink_to(ROOT / "packages/clip_lab/launch")
    return os.environ | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "packages/common/tests"), os.environ.get("PYTHONPATH", "")]),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "machine-[1-2]", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1",
        "LAB_COMMAND": "toy.training", "LAB_PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip


def test_a_slurm_job_saves_when_it_is_warned_and_goes_on_when_it_is_queued_again(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    """The launcher and the training are real; the result is that of a run that nobody stopped."""
    small = ["--track", "none", "--epochs", "1", "--dropout", "0", "--save-every", "100", "--learning-rate", "0.01"]
    run = tmp_path / "runs" / "slurm-7"
    script = ["bash", str(SCRIPTS[0]), *small]
    job = subprocess.Popen([*script, "--seconds-per-step", "0.3"], cwd=tmp_path, env=slurm, stderr=PIPE, text=True)
    wait_for(job, lambda: (run / "metrics.jsonl").exists() and losses(run))
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does: to the shell alone
    _, said = job.communicate(timeout=120)
    assert (
        f"error: SIGUSR1 after step {len(losses(run))}; everything is saved: go on with --resume runs/slurm-7" in said
    )
    assert len(list(run.glob("checkpoints/step-*"))) == 1
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert not (run / "results.json").exists()

    stand_in(tmp_path, "accelerate", '#!/bin/bash\necho "$@"\n')  # to start all that again would take ten seconds
    again = subprocess.run(script, cwd=tmp_path, env=slurm, stdout=PIPE, text=True, check=True).stdout
    assert again.partition(" -m ")[2] == "toy.training --resume runs/slurm-7\n"
    here("toy.training", "--resume", run)
    here("toy.training", *small, "--output", tmp_path / "plain")
    assert losses(run) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert (tmp_path / "requeued").read_text() == "7\n", "once"


def test_a_slurm_job_that_ends_while_it_is_warned_is_not_queued_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    finishing = "#!/bin/bash\ntrap '' USR1\ntouch ready\nsleep 0.5\ntouch done"
    stand_in(tmp_path, "accelerate", finishing)
    job = subprocess.Popen(["bash", SCRIPTS[0]], cwd=tmp_path, env=slurm)
    wait_for(job, (tmp_path / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert (tmp_path / "done").exists(), "it was waited for"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("began", [False, True])
def test_a_slurm_job_that_fails_is_not_queued_again(
    tmp_path: Path, slurm: dict[str, str], began: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code is the launcher's. What a kill left before the run had begun does not stand in its way."""
    stand_in(tmp_path, "accelerate", '#!/bin/bash\necho "$@"\nenv\nexit 3\n')
    run = tmp_path / "runs" / "slurm-7"
    (run / "figures").mkdir(parents=True)
    if began:
        (run / "config.yaml").touch()
    # Two machines of four GPUs: what Slurm says counts, if nothing else is asked for.
    slurm |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "LAB_LAUNCH": "launch/fsdp.yaml"}
    del slurm["LAB_PROCESSES"]
    job = subprocess.run(
        ["bash", SCRIPTS[0], "--seed", "1"], cwd=tmp_path, env=slurm, stdout=PIPE, text=True, check=False
    )
    assert job.returncode == 3
    assert not (tmp_path / "requeued").exists()
    started, *variables = job.stdout.splitlines()
    asked, _, ours = started.partition(" -m ")
    assert ours == ("toy.training --resume" if began else "toy.training --seed 1 --output") + " runs/slurm-7"
    assert run.exists() == began
    monkeypatch.chdir(tmp_path)
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args([*shlex.split(asked)[1:], "train.py"]))
    assert (launch.use_fsdp, launch.num_machines, launch.num_processes, launch.machine_rank) == (True, 2, 8, 0)
    assert (launch.main_process_ip, launch.main_process_port) == ("127.0.0.1", 20007)
    assert "PET_SHUTDOWN_TIMEOUT=110" in variables


def wait_for(job: subprocess.Popen[str], ready: Callable[[], object]) -> None:
    """Waits until `ready`; the job must not end before."""
    for _ in range(6000):
        if ready():
            return
        assert job.poll() is None, "it ended"
        time.sleep(0.02)
    raise AssertionError("it never came so far")


def test_slurm_scripts_agree_but_for_the_command() -> None:
    assert len(SCRIPTS) == 5
    labs = [script.parents[1].name for script in SCRIPTS]
    texts = [script.read_text() for script in SCRIPTS]
    assert all(f"command=${{LAB_COMMAND:-{lab}.train}}\n" in text for lab, text in zip(labs, texts, strict=True))
    assert len({text.replace(f"{lab}.train", "") for lab, text in zip(labs, texts, strict=True)}) == 1


@pytest.mark.parametrize("file", sorted(ROOT.glob("packages/*/launch/*gpu.yaml")), ids=lambda file: file.parts[-3])
def test_launch_configurations_leave_gpus_and_precision_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler's choice of GPUs reaches the training, and no precision does: --precision decides."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    launch, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    )
    several = prepare_multi_gpu_env(launch) if launch.multi_gpu else prepare_simple_launcher_cmd_env(launch)[1]
    assert (several["CUDA_VISIBLE_DEVICES"], several["ACCELERATE_MIXED_PRECISION"]) == ("5,6", "no")
