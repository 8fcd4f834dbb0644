"""A run is a directory: what was asked, on what machine, what was measured, and what came out."""

import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import broadcast_object_list

from labs_common.cli import begun, chosen, config_to_yaml, flat_options, to_plain
from labs_common.errors import LabError, bytes_of, json_of, reason_of
from labs_common.lock import check_new, check_writable, locked, new_directory
from labs_common.options import RESUME_MAY_CHANGE, RunOptions

ESCAPED = "backslashreplace"  # half a character of a file's name that is not UTF-8: as JSON itself writes it
GIVE_BACK = "bring the file back, or begin a new run"  # the remedy for a run's file that somebody changed
MACHINE = ("git_commit", "python", "platform", "cpu_count", "gpus")  # of environment.json, for tables


class Run:
    """A run's directory and the files in it. Only the main process writes.

    ```
    config.yaml       every option; `--config config.yaml` runs it again
    environment.json  the run's own name, versions, git commit, hardware, command
    metrics.jsonl     one line per logged step; the same bytes again for the same seed, resumed or not
    timing.jsonl      seconds, throughput and memory by step: what no two runs share
    checkpoints/      see labs_common.checkpoint
    figures/          the report's figures as SVG
    results.json      final numbers
    report.html
    .lock             held by the process that trains, see `lock`
    ```

    Attributes:
        options: what was asked, by option, but for what a resumed run may change.
        data: what tells the data from others, where splits.json does not.
    """

    def __init__(self, path: Path, is_main: bool = True, resumed: bool = False) -> None:
        self.path = path
        self.is_main = is_main
        self.resumed = resumed
        self.options: dict[str, Any] = {}
        self.data: int | None = None
        self._open: dict[str, BinaryIO] = {}  # by the name of the file that lines are added to

    @classmethod
    def start(cls, config: Any, options: RunOptions, name: str, accelerator: Accelerator) -> "Run":
        """Makes the directory of a new run, or opens that of the run to resume, in all processes.

        Raises:
            LabError: the directory exists already, or cannot be written.
        """
        if options.resume is not None:
            run = cls(options.resume, accelerator.is_main_process, resumed=True)
            about = run.load_json("environment.json", *MACHINE, "packages", "command")
            if about is None:
                run.save_json("environment.json", environment())
            elif [type(about.get(key, [])) for key in ("packages", "command", "chosen")] != [dict, str, list]:
                raise LabError(f"{run.path / 'environment.json'}: is no file of this run; {GIVE_BACK}")
        else:
            made = _make_directory(options.output, name, config) if accelerator.is_main_process else None
            path, message = broadcast_object_list([made])[0]
            if message is not None:
                raise LabError(message)
            run = cls(Path(path), accelerator.is_main_process)
        every = flat_options(config)
        run.options = to_plain({name: value for name, value in every.items() if name not in RESUME_MAY_CHANGE})
        if "resume" in every:  # not of commands that write a directory and cannot go on with it
            begun(run.path)
        if options.track != "none":
            accelerator.project_configuration.set_directories(str(run.path))
            accelerator.log_with = filter_trackers([options.track], str(run.path))
            scalars = {key: one if isinstance(one, (int, float, str)) else str(one) for key, one in every.items()}
            accelerator.init_trackers("tracking", config=scalars)
        return run

    @property
    def id(self) -> str | None:
        """The run's own name, which no other has, not even of the same options; None in runs of earlier versions."""
        return (self.load_json("environment.json") or {}).get("run")

    def append(self, file: str, line: dict[str, Any]) -> None:
        """Adds one JSON line to `file` (metrics.jsonl, timing.jsonl or a lab's own); it has a `step`."""
        if self.is_main:
            if file not in self._open:  # unbuffered: whoever kills or reads finds every line
                self._open[file] = (self.path / file).open("ab", buffering=0)
            content = (json.dumps(line, ensure_ascii=False) + "\n").encode(errors=ESCAPED)
            while content:  # a full disk takes a part first
                content = content[self._open[file].write(content) :]

    def lines(self, file: str) -> Iterator[dict[str, Any]]:
        """Yields the JSON lines of `file`; nothing if it does not exist. A last line cut by a kill is left out.

        Raises:
            LabError: a line is not what `append` writes, or its step is before the last one's; it is named.
        """
        path, last = self.path / file, -1
        if path.exists():
            for number, line in enumerate(bytes_of(path, str(path)).split(b"\n")[:-1], 1):
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                step = found.get("step") if isinstance(found, dict) else None
                if type(step) is not int or step < last:
                    raise LabError(f"{path}:{number}: is no line of a run, or not in its place; {GIVE_BACK}")
                last = step
                yield found

    def sum_of(self, file: str, size: int | None = None) -> list[int]:
        """Returns the length and the check sum of `file`, or of its first `size` bytes; a missing one is empty."""
        path = self.path / file
        content = bytes_of(path, str(path))[:size] if path.exists() else b""
        return [len(content), zlib.crc32(content)]

    def check_records(self, step: int, wrote: list[int] | None) -> None:
        """Compares the lines that were written until `step` with the length and sum that its checkpoint has of them.

        Raises:
            LabError: lines are missing, or are others.
        """
        for file in ("metrics.jsonl", "timing.jsonl"):
            if all(line["step"] != step for line in self.lines(file)):
                raise LabError(f"{self.path / file}: ends before step {step}, from which the run goes on; {GIVE_BACK}")
        if wrote and self.sum_of("metrics.jsonl", wrote[0]) != wrote:
            raise LabError(f"{self.path / 'metrics.jsonl'}: was changed since step {step}, from which the run goes on; "
                           f"{GIVE_BACK}")  # fmt: skip

    def curve(self, name: str) -> tuple[list[int], list[Any]]:
        """Reads a metric from metrics.jsonl: optimizer steps and values."""
        lines = [line for line in self.lines("metrics.jsonl") if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`: they belong to steps that a killed process did and that come again."""
        if self.is_main:
            while self._open:  # the files are written anew
                self._open.popitem()[1].close()
            for file in sorted(path.name for path in self.path.glob("*.jsonl")):
                kept = [line for line in self.lines(file) if line["step"] <= step]
                write_atomically(
                    self.path / file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
                )

    def save_json(self, name: str, value: Any) -> Path:
        """Writes `value` to the file `name` in one move; readers see the old file or the new one."""
        path = self.path / name
        if self.is_main:
            write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
        return path

    def load_json(self, name: str, *keys: str) -> Any:
        """Reads what `save_json` wrote, or None; with `keys`, a dictionary that has at least these.

        Raises:
            LabError: the file holds something else.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            found = json_of(path, str(path))
        except LabError as error:
            raise LabError(f"{error}; {GIVE_BACK}") from error
        if found is None:  # no run writes that, and it would be taken for a file that is missing
            raise LabError(f"{path}: holds nothing; {GIVE_BACK}")
        if keys and not (isinstance(found, dict) and found.keys() >= set(keys)):
            raise LabError(f"{path}: is no file of this run (lacks {', '.join(keys)}); {GIVE_BACK}")
        return found


def keep(run: Run, file: str, now: dict[str, Any], what: str) -> None:
    """Writes what a run depends on besides its data to `file`; of a resumed run, makes sure that it is still so.

    What only one of both has, as another version may have another option, is let pass.

    Raises:
        LabError: the run is being resumed, and it was otherwise; `what` names it.
    """
    now = to_plain(now)
    before = run.load_json(file) if run.resumed else None
    if before is None:
        run.save_json(file, now)
    elif not isinstance(before, dict) or any(before[name] != now[name] for name in before.keys() & now.keys()):
        raise LabError(f"--resume {run.path}: {what} changed since the run began; undo that, or begin a new run")


def cost_of(run: Run, unit: str) -> dict[str, Any]:
    """Adds up what all steps of a run took, from timing.jsonl: seconds, steps, `unit`s and their rate, bytes."""
    timing = list(run.lines("timing.jsonl"))
    try:
        seconds, count = (sum(line[key] for line in timing) for key in ("seconds", unit))
        memory = max((line["peak_memory"] + 0 for line in timing), default=0)
    except (KeyError, TypeError, OverflowError) as error:
        raise LabError(
            f"{run.path / 'timing.jsonl'}: lacks what a step took ({reason_of(error)}); {GIVE_BACK}"
        ) from error
    return {
        "seconds": seconds,
        "steps": len(timing),
        unit: count,
        f"{unit} per second": count / seconds if seconds else 0.0,
        "peak memory": memory,
    }


def training_means(run: Run, unit: str, names: Sequence[str]) -> dict[str, float]:
    """Averages metrics of the steps since the last evaluation, weighted by their `unit`s, from metrics.jsonl.

    Returns {"training/NAME": mean}; nothing in other processes than the main one, or if there was no step.
    """
    counts: list[float] = []
    values: list[list[float]] = []
    before = 0
    for line in run.lines("metrics.jsonl") if run.is_main else ():
        if "loss" not in line:
            counts, values = [], []
        else:
            try:
                counts.append(line[unit] - before)
                values.append([line[name] + 0 for name in names])
            except (KeyError, TypeError, OverflowError) as error:
                raise LabError(f"{run.path / 'metrics.jsonl'}: lacks figures of step {line['step']} "
                               f"({reason_of(error)}); {GIVE_BACK}") from error  # fmt: skip
            before = line[unit]
    if not sum(counts):
        return {}
    columns = zip(names, zip(*values, strict=True), strict=True)
    return {
        f"training/{name}": sum(count * value for count, value in zip(counts, column, strict=True)) / sum(counts)
        for name, column in columns
    }


def machine_of(run: Run, packages: Sequence[str]) -> dict[str, Any]:
    """Reads commit, machine and the versions of some packages from environment.json."""
    environment = run.load_json("environment.json", *MACHINE, "packages")
    kept = {key: environment[key] for key in MACHINE}
    return kept | {"packages": {name: environment["packages"].get(name) for name in packages}}


def seconds_between(clock: Mapping[str, float]) -> dict[str, float]:
    """Says how long each part took, by its name, from moments in the order in which the parts ended."""
    return {name: now - before for (_, before), (name, now) in itertools.pairwise(clock.items())}


def check_run_options(options: RunOptions) -> None:
    """Refuses options that a run cannot start with, before any work is done and without leaving a trace.

    Raises:
        LabError: the output directory exists and is not empty, or cannot be made; the tracker is not installed.
    """
    if options.track == "wandb" and importlib.util.find_spec("wandb") is None:
        raise LabError("--track wandb: is not installed; add the extra [wandb] to the package, or take tensorboard")
    if options.resume is not None:
        if not os.access(options.resume, os.W_OK):
            raise LabError(f"--resume {options.resume}: the directory cannot be written")
        return
    check_new(options.output)
    check_writable(options.output or Path("runs"))


def check_file(path: Path) -> None:
    """Makes sure that a file may stand at `path`.

    Raises:
        LabError: it is a directory, a device or the like, which would be replaced by a file.
    """
    if not path.name or (path.exists() and not path.is_file()):
        raise LabError(f"{path}: is no file that could be written; name one")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file `path` by one that holds a text or bytes, or leaves it as it was.

    Raises:
        LabError: see `check_file`.
    """
    check_file(path)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(content if isinstance(content, bytes) else content.encode("utf-8", ESCAPED))
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a new directory that takes the place of `folder` when everything is in it."""
    part = folder.with_name(f".{folder.name}.part")
    if part.is_file():  # some file systems leave one after a crash
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def environment() -> dict[str, Any]:
    """Records what a reader needs to judge or repeat a run: command, commit, versions, hardware."""
    gpu = torch.cuda.is_available()
    return {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if gpu else [],
        "packages": _installed(),
    }


@functools.cache  # reading them takes half a second, and a process may begin several runs
def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for one in distributions():
        with contextlib.suppress(ValueError, OSError):  # what a broken installation left describes nothing
            said = one.metadata
            if said["Name"] and said["Version"]:  # the first is the one that is imported
                found.setdefault(said["Name"].lower(), said["Version"])
    return dict(sorted(found.items()))


def command_line() -> str:
    """Writes the command that started this process as a user would type it."""
    if sys.argv[0].startswith("python -m "):  # a run of a comparison, which forked this process
        return " ".join(sys.argv)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {spec.name}" if spec is not None and spec.name != "__main__" else Path(sys.argv[0]).name
    return " ".join([start, *sys.argv[1:]])


def _make_directory(output: Path | None, name: str, config: Any) -> tuple[str, str | None]:
    """Makes `--output`, or a directory under runs/, and begins the run in it; returns it and what is in the way."""
    path = output or Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        if output is None:
            path = new_directory(path)
        (path / "figures").mkdir(parents=True, exist_ok=True)
        if trouble := locked(path):
            return str(path), trouble
        check_new(path)  # again: another process may have begun and ended there since
        about = {"run": uuid.uuid4().hex} | environment() | {"chosen": chosen(config)}
        write_atomically(path / "environment.json", json.dumps(about, indent=1) + "\n")
        write_atomically(path / "config.yaml", config_to_yaml(config))
    except OSError as error:
        return str(path), f"--output {path}: cannot be written ({error.strerror})"
    except LabError as error:
        return str(path), str(error)
    return str(path), None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):  # a run does not depend on what git says
        return None
    return found.stdout.strip() or None


def newest_run(file: str, command: str) -> Path:
    """Finds the finished run under runs/ whose `model/FILE` was written last.

    Raises:
        LabError: there is none; `command` is the module that would make one.
    """
    finished = sorted(Path("runs").glob(f"*/model/{file}"), key=lambda found: -found.stat().st_mtime)
    if not finished:
        raise LabError(f"--checkpoint: no finished run under runs/; train one with python -m {command}, or name one")
    return finished[0].parent.parent
