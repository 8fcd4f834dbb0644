"""One process at a time works on a run; how a new directory is found, made and locked."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import socket
import sys
from pathlib import Path

from accelerate.utils import broadcast_object_list

from labs_common.cli import held
from labs_common.errors import LabError, json_of

LOCK = ".lock"


def lock(folder: Path, is_main: bool) -> None:
    """Keeps every other process out of a run's directory until this command ends, in whatever way.

    Called by all processes of a launch together; the main one holds it for all. It is a record lock of POSIX: the
    system gives it back when the process is gone, processes that this one forks do not have it, and on a network file
    system that has locks it holds between machines.

    Raises:
        LabError: another process works there.
    """
    trouble = [locked(folder) if is_main else None]
    if (message := broadcast_object_list(trouble)[0]) is not None:
        raise LabError(message)


def locked(folder: Path, until: contextlib.ExitStack = held) -> str | None:
    """Takes the lock of a directory for this process, until this command, or `until`, ends; says what is in its way."""
    try:
        if (folder / LOCK).is_symlink():
            return f"{folder / LOCK}: is a link, and what it leads to would be emptied; delete it"
        file = until.enter_context((folder / LOCK).open("a+", errors="replace"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read().strip() or "another process"
                return f"{folder}: {who} is at work there; wait for its end, or stop it first"
            print(f"{folder}: its file system has no locks ({error.strerror}): make sure that nothing else works there",
                  file=sys.stderr, flush=True)  # fmt: skip
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        return f"{folder / LOCK}: cannot be written ({error.strerror or 'is no file'})"
    return None


def in_use(folder: Path) -> str | None:
    """Says who works in a directory; nothing if nobody does, or if it is not there."""
    with contextlib.ExitStack() as moment:
        return locked(folder, moment) if (folder / LOCK).exists() else None


def check_new(output: Path | None) -> None:
    """Refuses an `--output` that holds something already.

    Raises:
        LabError: the directory is not empty, or it is a file.
    """
    if output is None or not output.exists():
        return
    if not output.is_dir():
        raise LabError(f"--output {output}: is a file; name a directory")
    # What a kill leaves of a run before its config.yaml is written holds nothing that could be lost.
    if not all(map(_left_by_a_kill, output.iterdir())):
        unfinished = f", or go on with it by --resume {output}" if (output / "checkpoints").exists() else ""
        raise LabError(f"--output {output}: is not empty; name another{unfinished}")


def _left_by_a_kill(file: Path) -> bool:
    if file.name == "figures" and file.is_dir():
        return not any(file.iterdir())
    if file.name == "environment.json":  # others have files of that name too
        try:
            found = json_of(file, str(file))
        except LabError:
            return False
        return isinstance(found, dict) and {"run", "command"} <= found.keys()
    return file.name == LOCK or file.suffix == ".part"


def new_folder(output: Path | None, default: Path) -> Path:
    """Makes and locks `--output`, or `default`, or the first of default-2, default-3, … that is not there yet.

    If nothing is written there it goes again. Processes beside the main one make nothing and write nothing.

    Raises:
        LabError: `--output` holds something, another process works there, or the directory cannot be written.
    """
    check_new(output)
    folder = output or default
    check_writable(folder)
    if os.environ.get("RANK", "0") == "0":
        there = output is not None and output.exists()
        if output is None:
            folder = new_directory(default)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        if not there:
            held.callback(_remove_unused, folder)
        if trouble := locked(folder):
            raise LabError(trouble)
    return folder


def _remove_unused(folder: Path) -> None:
    if folder.is_dir() and all(map(_left_by_a_kill, folder.iterdir())):
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Refuses an `--output` that cannot be made or written, without making it.

    Raises:
        LabError: the user may not write there, or a file stands where a directory should.
    """
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise LabError(f"--output {path}: cannot be written (no permission in {parent})")


def new_directory(default: Path) -> Path:
    """Makes `default`, or the first of default-2, default-3, … that nobody else has made, in one move."""
    for number in itertools.count(1):
        path = default if number == 1 else default.with_name(f"{default.name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            if not os.path.lexists(path):  # what is in the way is above: a link to nowhere
                raise
    return path
