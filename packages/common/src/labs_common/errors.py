"""Errors with which a lab stops: the input was wrong, the run went wrong, or it was interrupted; and files read so."""

import json
from pathlib import Path
from typing import Any


class LabError(Exception):
    """A fault that the user can mend: one line that names the file or option, and the remedy.

    `labs_common.cli.run_command` prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class RunStopped(LabError):
    """The input was good and the run still had to stop (a loss that became NaN, a frozen tensor that moved)."""

    exit_code = 1


class Interrupted(LabError):
    """Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP: the run was saved and can be resumed."""

    exit_code = 130


def reason_of(error: BaseException) -> str:
    """Returns the first line of what another library's error says, or its type if it says nothing.

    Where that line announces the next, as PyTorch's of tensors that do not fit do, it returns both.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()[:200]}" if first.endswith(":") and rest else first


def bytes_of(path: Path, said: str) -> bytes:
    """Reads a file that anybody may have put there; `said` names it in errors, such as `--config x.yaml`.

    Raises:
        LabError: it is missing, or no file: a pipe would be waited for, and a device never ends.
    """
    try:
        if not path.is_file():
            path.stat()  # says why it is not there
            raise LabError(f"{said}: cannot be read (is a directory, pipe or device)")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LabError(f"{said}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def text_of(path: Path, said: str) -> str:
    r"""Reads a text file in UTF-8; see `bytes_of`. Its lines end at `\n`: `str.splitlines` also cuts inside of names.

    Raises:
        LabError: it cannot be read.
    """
    try:
        return bytes_of(path, said).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise LabError(f"{said}: cannot be read (is not UTF-8)") from error


def json_of(path: Path, said: str) -> Any:
    """Reads a JSON file; see `text_of`.

    Raises:
        LabError: it cannot be read, or is something else.
    """
    text = text_of(path, said)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets in one another
        raise LabError(f"{said}: is not JSON ({reason_of(error)})") from error
