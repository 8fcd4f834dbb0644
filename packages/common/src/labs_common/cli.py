"""Command lines: tyro over dataclasses, a YAML file beneath the flags, errors in one line."""

import contextlib
import dataclasses
import errno
import glob
import importlib
import inspect
import io
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import tyro
import yaml

from labs_common.cache import check_cache, check_variables
from labs_common.errors import LabError, reason_of, text_of
from labs_common.options import RESUME_MAY_CHANGE

Config = TypeVar("Config")
GLOSSARY = "Words of the field are explained in the project's docs/glossary.md."
# What asks a training to save and stop: Ctrl-C; `timeout`, a queue or another process; a scheduler's warning before its
# time limit; a terminal that is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
MOST_NESTED = 20  # aliases of a config, or levels: a few more may stand for a billion values
LONGEST_NAME = 255  # bytes, of a file in every usual file system
FAILING = {errno.ENOSPC: "is full", errno.EDQUOT: "is full", errno.EFBIG: "takes no file of that size",
           errno.EIO: "fails", errno.ESTALE: "fails"}  # fmt: skip
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # a byte of the command line, as Python reads it
_given: Any = None  # the config of the command line, before anything is chosen for it
_run: Path | None = None  # that this process works on
_command = ""  # as it is typed
held = contextlib.ExitStack()  # what this process gives back when its command ends: its run's lock


class _Outlet(io.FileIO):
    """Writes to a pipe or terminal while somebody reads it, then to nowhere: `| head -1` must not stop a training."""

    def write(self, content: Any) -> int:
        """Writes bytes as `io.FileIO` does; says that all were written once nobody reads them."""
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            _to_nowhere(self.fileno())
            return len(content)


@contextlib.contextmanager
def _outlets() -> Iterator[None]:
    """Lets stdout and stderr take any text, whatever their encoding, and a reader that leaves or never was there.

    Streams that somebody else put in their place, and those of a thread of a program, stay as they are.
    """
    before = sys.stdout, sys.stderr
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed: the next file that is opened would get its number, and what is said
            _to_nowhere(number)
        if stream is None or (_number_of(stream) == number and threading.current_thread() is threading.main_thread()):
            encoding, errors = ("utf-8", "strict") if stream is None else (stream.encoding, stream.errors)
            outlet = io.TextIOWrapper(
                io.BufferedWriter(_Outlet(number, "w", closefd=False)), encoding,
                "backslashreplace" if errors == "strict" else errors,
                line_buffering=stream is None or stream.line_buffering or stream.write_through,
            )  # fmt: skip
            setattr(sys, name, outlet)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _number_of(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


@_outlets()
def run_command(
    target: str, config_type: type[Config], module: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """Parses the command line into `config_type` and runs the function `target` ("package.module:function") on it.

    The module of `target` is imported after parsing, so that `--help` and faulty options answer at once although its
    own imports of torch stand at its top. `module` is what the user types after `python -m`, if it is another one.

    Exit codes: 0 done, 1 the run failed (see `RunStopped`), 2 the input was wrong, 130 interrupted.
    """
    home, _, function = target.partition(":")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    begun(None)
    try:
        with _warnings_interrupt():
            global _given, _command
            _command = f"python -m {module or home}"
            config = _given = parse(config_type, _command, arguments)
            check_cache()
            check_variables()
            getattr(importlib.import_module(home), function)(config)
            sys.stdout.flush()  # here a full disk is still one line
    except LabError as error:
        _exit(error.exit_code, f"error: {error}", debug)
    except KeyboardInterrupt as interrupt:
        saved = f" since the last checkpoint{_how_to_go_on()}" if _run else ""
        _exit(130, f"{str(interrupt) or 'interrupted'}: nothing was saved{saved}", debug)
    except Exception as error:
        if debug:
            raise
        if trouble := _failing(error):
            _exit(1, f"error: {trouble}: make room, or mend it{_how_to_go_on()}")
        if isinstance(error, OSError) and error.filename is not None:
            _exit(2, f"error: {os.fsdecode(error.filename)}: {error.strerror or reason_of(error)}{_how_to_go_on()}")
        if isinstance(error, FileNotFoundError):  # without a name: of os.getcwd
            _exit(2, "error: the directory in which this was started is gone; change to another")
        raise
    finally:
        held.close()


def is_ignored(number: int) -> bool:
    """Says whether a hangup was ignored before this process began, as `nohup` does: then it must not stop it."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


@contextlib.contextmanager
def _warnings_interrupt() -> Iterator[None]:
    """Lets the other signals do as Ctrl-C does, wherever no loop saves something first; they would end it silently.

    Of several processes SIGTERM goes on ending each at once, even if it hangs waiting for another.
    """
    if threading.current_thread() is not threading.main_thread():  # of a program that calls a command; it has none
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    others = [number for number in STOPPING[1:] if alone or number != signal.SIGTERM]
    before = {number: signal.signal(number, interrupt) for number in others if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_of(module: str) -> Callable[[], None]:
    """Returns the command that `python -m MODULE` runs: an entry of its package's `commands`."""
    package, _, name = module.rpartition(".")
    return getattr(importlib.import_module(f"{package}.commands"), name)


def begun(run: Path | None) -> None:
    """Notes that this process works on a run, so that whatever stops it can say how to go on."""
    global _run
    _run = run


def parse(config_type: type[Config], prog: str, arguments: Sequence[str], default: Config | None = None) -> Config:
    """Returns the config: `default`, then `--config FILE` or the config of `--resume RUN`, then the flags.

    Raises:
        LabError: an unknown option or a bad value, in one line; a config file that does not fit; flags
            that would turn a resumed run into another run.
    """
    resume = _value_of("--resume", arguments)
    file = _value_of("--config", arguments)
    if resume is not None and file is not None:
        raise LabError("--resume brings its own config: drop --config, or start a new run without --resume")
    if resume is not None:
        file = str(Path(resume) / "config.yaml")
        if not Path(file).is_file():
            raise LabError(f"--resume {resume}: no run is there (config.yaml is missing)")
    if file is not None:
        default = config_from_yaml(config_type, Path(file))
        if flat_options(default).get("resume") is not None:
            raise LabError(
                f"--config {file}: says resume, which the command line does: drop it there, add --resume RUN"
            )
    elif default is None:
        default = config_type()
    config = _parse_flags(config_type, default, prog, arguments)
    usual = flat_options(config_type())
    for name, value in flat_options(config).items():
        option = f"--{name.replace('_', '-')}"
        if value == "" and usual[name] is None:  # --data "$DATA" of a variable that is not set
            raise LabError(f"{option}: is empty; name something, or drop the option")
        # A text may be a sentence; these name a place, or what may be one.
        texts = value if isinstance(value, (list, tuple)) else [value]
        named = [one for one in texts if isinstance(one, Path) or (isinstance(one, str) and name == "checkpoint")]
        if any(len(os.fsencode(part)) > LONGEST_NAME for one in named for part in Path(one).parts):
            raise LabError(f"{option}: has a name of more than {LONGEST_NAME} bytes; take a shorter one")
        if any(NOT_UTF8.search(str(one)) for one in named):
            raise LabError(f"{option}: has a name that is not UTF-8, in which no weights can be kept; take another")
        if any(isinstance(one, str) and NOT_UTF8.search(one) and not glob.glob(one) for one in texts):
            raise LabError(f"{option}: holds a byte that is not UTF-8, and names nothing that is there; mend it")
    if resume is not None:
        _refuse_other_run(default, config, resume)
    return config


def config_from_yaml(config_type: type[Config], path: Path) -> Config:
    """Reads a config that `config_to_yaml` wrote, or a part of one; what it leaves out keeps its default.

    Raises:
        LabError: the file is missing or is not YAML, or has an option that does not exist or a bad value.
    """
    text = text_of(path, f"--config {path}")
    try:
        _check_size(text)
        values = yaml.safe_load(text)
        if not isinstance(values, dict) or not values:
            raise LabError("expected options as 'name: value'")
        return _parse_flags(config_type, config_type(), f"--config {path}", _flags_of(values))
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date or number that there is not
        raise LabError(f"--config {path}: cannot be read ({reason_of(error)})") from error
    except LabError as error:
        raise LabError(f"--config {path}: {error}") from None


def _check_size(text: str) -> None:
    """Refuses YAML that is small as text and huge, or endless to read, as values."""
    aliases = depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > MOST_NESTED or depth > MOST_NESTED:
            raise LabError(f"more than {MOST_NESTED} aliases (*name), or brackets in one another; write the values out")


def config_to_yaml(config: Any) -> str:
    """Writes every option of `config` as YAML that `--config` reads back to an equal config."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def to_plain(value: Any) -> Any:
    """Turns dataclasses, paths and tuples into the dictionaries, strings and lists that YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flat_options(config: Any) -> dict[str, Any]:
    """Returns a nested config's options by their flag names, without the groups: `{"learning_rate": 0.001, ...}`."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        options.update(flat_options(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return options


def chosen(config: Any) -> list[str]:
    """Lists the options of which `config` has another value than the command line and its config file gave."""
    before = flat_options(_given if type(_given) is type(config) else config)
    return [name for name, value in flat_options(config).items() if value != before[name]]


def given(config: Any) -> set[str]:
    """Names the options that the command line says, also at their usual value; none of a config that a program made."""
    flags = [part.partition("=")[0] for part in sys.argv if part.startswith("--")] if config is _given else []
    return {flag[2:].replace("-", "_").removeprefix("no_") for flag in flags}


def _parse_flags(config_type: type[Config], default: Config, prog: str, arguments: Sequence[str]) -> Config:
    said = io.StringIO()
    recipes = getattr(config_type, "recipes", {})  # sets of flags by name, below those that are given
    arguments = [*recipes.get(_value_of("--recipe", arguments), ()), *arguments]
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_type, prog=prog, default=default, args=arguments, config=(tyro.conf.OmitArgPrefixes,),
                description=f"{inspect.getdoc(config_type) or ''}\n\n{GLOSSARY}",
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):  # --help was printed
            raise
        raise LabError(_one_line(said.getvalue())) from None


def _flags_of(values: dict[str, Any]) -> list[str]:
    """Returns the flags that say what a YAML config says; groups only sort its options, they do not name them."""
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + str(name).replace("_", "-")
        if flag == "--help" or flag.startswith("--tyro-"):  # one of tyro's own writes to any file
            raise LabError(f"{name} is no option of a file")
        if isinstance(value, dict):
            flags += _flags_of(value)
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words = list(map(str, value))
            if further := [word for word in words if word.startswith("--") or word == "-h"]:
                raise LabError(f"{name} cannot be {further[0]}, which is an option")
            flags += [flag, *words]
        else:
            flags.append(f"{flag}={value}")
    return flags


def _one_line(box: str) -> str:
    """Takes the message out of the frame, of lines or of plain characters, that tyro draws around an error.

    The message goes up to the frame's first rule; what tyro suggests below is added.
    """
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).rstrip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:
        if set(line.strip()) <= set("─╰╯-+"):
            parts.append([])
        else:
            parts[-1].append(line.strip())
    parts = [part for part in parts if part] or [[]]
    message = " ".join(parts[0]).strip().rstrip(" .").removeprefix("Error parsing ")
    message = message or "the command line could not be read"
    if len(parts) > 1 and parts[1][:1] == ["Perhaps you meant:"]:
        flags = [line.split()[0].rstrip(",") for line in parts[1][1:] if line.startswith("--")]
        message += f"; perhaps you meant {' or '.join(flags)}"
    return message


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    found = None  # of several the last one counts, as it does for tyro
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == flag:
            found = following
        elif argument.startswith(flag + "="):
            found = argument.removeprefix(flag + "=")
    return found


def _refuse_other_run(saved: Any, asked: Any, resume: str) -> None:
    old, new = flat_options(saved), flat_options(asked)
    if changed := [name for name in old if old[name] != new[name] and name not in RESUME_MAY_CHANGE]:
        name = changed[0]
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise LabError(
            f"--resume {resume}: that run was started with another {flags} "
            f"({old[name]!r}, not {new[name]!r}); drop the option, or start a new run without --resume"
        )


def _how_to_go_on() -> str:
    return "" if _run is None else f"; go on with --resume {_run}"


def making_again() -> str:
    """Says by which command a report is made that is missing, although all else is there."""
    if _run is None:
        return "the same command with another --output makes it again"
    start = _command if os.environ.get("WORLD_SIZE", "1") == "1" else f"launched as before, {_command}"
    return f"{start} --resume {shlex.quote(str(_run))} --report makes it again, without training"


def _failing(error: BaseException | None) -> str | None:
    """Says what is wrong with the disk, if this error, or one that led to it, is of that."""
    while error is not None:
        for number, what in FAILING.items():  # safetensors has an error of its own
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return f"the disk {what} ({reason_of(error)})"
        error = error.__cause__ or error.__context__
    return None


def _exit(code: int, line: str, debug: bool = False) -> None:
    if debug:
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    print(line if rank == "0" else f"[process {rank}] {line}", file=sys.stderr, flush=True)
    sys.exit(code)
