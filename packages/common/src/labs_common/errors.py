"""The two ways in which a lab stops: the input was wrong, or the run went wrong."""


class LabError(Exception):
    """A fault that the user can mend: one line that names the file or option, and the remedy.

    `labs_common.cli.run_command` prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class RunStopped(LabError):
    """The input was good and the run still had to stop (a loss that became NaN, a frozen tensor that moved)."""

    exit_code = 1


class Interrupted(LabError):
    """Ctrl-C or SIGTERM: the run was saved and can be resumed."""

    exit_code = 130
