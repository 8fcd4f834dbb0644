"""Runs each training of a comparison in a process of its own: its peak memory is its own, nothing else dies with it.

Processes are forked from a server that has imported the libraries once and done nothing else; with an Accelerate
configuration they are launched by Accelerate instead.
"""

import argparse
import dataclasses
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from labs_common.cli import STOPPING, command_of, config_to_yaml, is_ignored
from labs_common.compare.collect import Entry, check_same_data, collect
from labs_common.compare.plan import claim, seeds_of, slug
from labs_common.compare.report import Findings, write_comparison
from labs_common.errors import Interrupted, LabError, RunStopped, reason_of
from labs_common.lock import in_use, locked
from labs_common.options import ComparisonOptions, RunOptions
from labs_common.progress import console
from labs_common.report.page import making_report
from labs_common.run import Run


def compare_runs(
    folder: Path,
    config: Any,
    module: str,
    planned: Mapping[str, Any],
    report: Callable[[Run, dict[str, Entry], dict[str, int]], Findings],
    prepare: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> None:
    """Does the planned runs that are missing, collects all that finished, and writes the report in `folder`.

    `module` has the runs' command (`llm_peft_fa.train`). `config` has its `ComparisonOptions` under `comparison`, each
    of `planned` its `RunOptions` under `run`. `prepare` gets the directory, once nobody else works in it, and may
    change the plan; `report` gets the comparison as a run, what was collected, and the exit codes of failed runs.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run under way was saved, and the same command goes on from there.
        LabError: the directory is of something else, another process works there, a run says that its input is
            wrong, or the data changed between two runs.
        RunStopped: no run finished.
    """
    options: ComparisonOptions = config.comparison
    claim(folder, config)
    if trouble := locked(folder):
        raise LabError(trouble)
    if prepare is not None:
        planned = prepare(folder, planned)
    failed = finished_runs(module, planned, folder, options)
    entries = collect(folder, planned, seeds_of(options))
    if not entries:
        raise RunStopped("no run finished: there is nothing to report; the lines above say why")
    check_same_data(entries)
    run = Run(folder)
    with making_report(f"start the same command again; delete runs in {folder} that are of something else"):
        write_comparison(run, config, report(run, entries, failed), failed)


def start_server(launch: Path | None, libraries: Sequence[str]) -> None:
    """Lets the server import `libraries` while this process does, unless Accelerate will launch the runs.

    The server outlives Ctrl-C and a SIGTERM to the whole group, so that a run that then saves itself is waited for;
    what it forks calls `stop_as_usual`.
    """
    if launch is None:
        multiprocessing.get_context("forkserver").set_forkserver_preload([*libraries])
        resource_tracker.ensure_running()  # the server's starts it otherwise, and that lets the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_as_usual() -> None:
    """Lets the signals `STOPPING` reach this process, which the server forked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def finished_run(module: str, config: object, path: Path, launch: Path | None = None) -> int:
    """Does the run that `config` describes, or the rest of it, unless it is there; returns the exit code.

    `module` has the command (`llm_peft_fa.train`), `path` is the --output that `config` names.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run was saved.
        LabError: the run says that its input is wrong, or it outlived a comparison that was killed, and goes on.
    """
    if (path / "results.json").exists():
        return 0
    if trouble := in_use(path):
        raise LabError(trouble)
    if (path / "config.yaml").exists():
        arguments = ["--resume", str(path)]
    else:
        shutil.rmtree(path, ignore_errors=True)
        asked = path.with_suffix(".yaml")
        asked.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text(config_to_yaml(config), encoding="utf-8")
        arguments = ["--config", str(asked)]
    code = _forked(module, arguments) if launch is None else _launched(module, arguments, launch)
    if code == Interrupted.exit_code:
        raise Interrupted(f"stopped in {path}; the same command goes on from there")
    if code == LabError.exit_code:
        raise LabError(f"{path}: could not be run, see the line above; mend it and start the same command again")
    return code


def finished_runs(module: str, planned: Mapping[str, Any], folder: Path, options: ComparisonOptions) -> dict[str, int]:
    """Does each planned run with each seed, in FOLDER/NAME/seed-SEED, unless it is there.

    Returns the exit codes of those that failed. Configs have their `RunOptions` under `run`.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the run under way was saved.
        LabError: a run says that its input is wrong.
    """
    failed = {}
    jobs = [(name, seed) for seed in seeds_of(options) for name in planned]
    for number, (name, seed) in enumerate(jobs, 1):
        path = folder / slug(name) / f"seed-{seed}"
        there = ": there already" if (path / "results.json").exists() else ""
        console.print(f"[{number}/{len(jobs)}] {name}, seed {seed}{there}")
        wanted = dataclasses.replace(planned[name], run=RunOptions(output=path, seed=seed, track="none"))
        code = finished_run(module, wanted, path, options.launch)
        if code:
            failed[f"{name}, seed {seed}"] = code
            console.print(f"{name}, seed {seed}: stopped with exit code {code}; the others go on")
    return failed


def _forked(module: str, arguments: list[str]) -> int:
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(module, arguments))
    process.start()
    with _stopping(process) as stopped:
        process.join()
    assert process.exitcode is not None
    return Interrupted.exit_code if stopped else process.exitcode


def _run(module: str, arguments: list[str]) -> None:
    """Runs the command in the forked process."""
    gc.freeze()  # to collect what the server imported would take a second, and copy its memory
    stop_as_usual()
    sys.argv = [f"python -m {module}", *arguments]
    with Path(os.devnull).open("w") as nothing:
        sys.stdout = nothing
        command_of(module)()


def _launched(module: str, arguments: list[str], launch: Path) -> int:
    start = [sys.executable, "-c", f"from {__name__} import launcher; launcher()", "--config_file", str(launch)]
    process = subprocess.Popen([*start, "-m", module, *arguments], stdout=subprocess.DEVNULL)
    with _stopping(process) as stopped:
        code = process.wait()
    return Interrupted.exit_code if stopped else code


def launcher() -> None:
    """Runs `accelerate launch` with the arguments of this process, and ends as the run did, which said why.

    Accelerate itself would end with 1, and with a traceback and a summary of its own around that line.
    """
    from accelerate.commands import launch  # these three of the launching process alone
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launch.simple_launcher = _become_the_run
    try:
        launch.launch_command(launch.launch_command_parser().parse_args())
    except subprocess.CalledProcessError as error:
        _end_with(error.returncode)
    except ChildFailedError as error:
        _end_with(error.get_first_failure()[1].exitcode)
    except SignalException:  # the processes got it too, and saved their run
        sys.exit(Interrupted.exit_code)
    except Exception as error:  # of a configuration that cannot be read, or that contradicts itself
        print(f"error: --launch {sys.argv[2]}: cannot be used ({reason_of(error)})", file=sys.stderr)
        sys.exit(LabError.exit_code)


def _become_the_run(args: argparse.Namespace) -> None:
    """Lets a run of one process take the place of this one, so that signals reach it and its exit code is this one's.

    Accelerate would start it beside, pass no signal on and not wait for it.
    """
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env  # as above

    command, environment = prepare_simple_launcher_cmd_env(args)
    os.execvpe(command[0], command, environment)


def _end_with(code: int) -> None:
    """Ends with an exit code; of a run that a signal killed (-9), as it did, since `exit` would make 247 of it."""
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


@contextmanager
def _stopping(process: "BaseProcess | subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Passes signals on to the run as SIGTERM, but for Ctrl-C, which reaches it by itself.

    The run saves itself and ends first.

    Yields the numbers of the signals that came: whatever the run then exits with, no other is started.
    """
    stopped: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        if number != signal.SIGINT:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in STOPPING if not is_ignored(number)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
