"""One process at a time works on a run."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

from accelerate.utils import broadcast_object_list

from labs_common.cli import held
from labs_common.errors import LabError

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
