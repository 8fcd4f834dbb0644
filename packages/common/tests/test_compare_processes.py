"""What stops a comparison stops the run under way as well, and no other is begun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labs_testing.trainings import newest, step_of

HERE = Path(__file__).parent


@pytest.mark.kills
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGHUP, 1)]
)
def test_a_stopped_group_saves_its_run_and_begins_no_other(tmp_path: Path, number: int, step: int) -> None:
    """As a terminal, `timeout` or a queue does it: every process of the group gets the signal."""
    folder = tmp_path / "comparison"
    first = folder / "first" / "seed-0"
    process = subprocess.Popen(
        [sys.executable, "-m", "toy.comparison", "--output", str(folder)], env=os.environ | {"PYTHONPATH": str(HERE)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(6000):
        if (first / "config.yaml").exists() and step_of(first) >= step:
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"stopped in {first}; the same command goes on" in said.splitlines()[-1]
    assert step == 0 or newest(first), "waited for until it is saved"
    assert not (folder / "second").exists()
