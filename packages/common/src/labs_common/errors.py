"""Errors with which a lab stops: the input was wrong, the run went wrong, or it was interrupted."""


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
