"""Plans a comparison: entries of a list with options after colons, one run each, in a directory of its own."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from labs_common.cache import recipe_key
from labs_common.cli import config_from_yaml, config_to_yaml, flat_options, to_plain
from labs_common.errors import LabError
from labs_common.lock import check_writable
from labs_common.options import ComparisonOptions
from labs_common.run import write_atomically

Config = TypeVar("Config")
ANYWAY = ("output", "debug", "launch", "config")  # these do not make it another comparison


def plan_runs(
    options: ComparisonOptions,
    option: str,
    text: str,
    what: str,
    make: Callable[[str, list[str]], Config],
    known: Sequence[str] | None = None,
) -> dict[str, Config]:
    """Makes the config of each run out of the comma-separated entries of `option`, by entry: `lora,lora:rank=64`.

    `make` gets an entry's name and the flags that follow it; `what` says what the names are of, and `known` lists them
    if only those will do.

    Raises:
        LabError: the comparison cannot start, or an entry is wrong; the entry is named.
    """
    check_compared(what, options)
    planned = {}
    for spec in entries_of(option, text):
        name, flags = name_and_flags(spec)
        try:
            if known is not None and name not in known:
                raise LabError(f"no such {what}; there are {', '.join(known)}")
            planned[spec] = make(name, flags)
        except LabError as error:
            raise LabError(f"{option} {spec}: {error}") from None
    return planned


def entries_of(option: str, text: str) -> list[str]:
    """Splits the comma-separated entries of `option`.

    Raises:
        LabError: there is none, or one occurs twice.
    """
    found = [spec.strip() for spec in text.split(",") if spec.strip()]
    if not found:
        raise LabError(f"{option}: is empty; name some, as in --help")
    twice = [spec for spec in found if found.count(spec) > 1]
    if twice:
        raise LabError(f"{option}: {twice[0]} occurs twice; give it other options, as in {twice[0]}:learning_rate=1e-4")
    return found


def name_and_flags(spec: str) -> tuple[str, list[str]]:
    """Splits an entry into its name and flags: `lora:rank=8:no-bias` into ("lora", ["--rank=8", "--no-bias"])."""
    name, *options = spec.split(":")
    parts = [option.partition("=") for option in options]
    return name, [f"--{key.replace('_', '-')}" + (f"={value}" if value else "") for key, _, value in parts]


def slug(spec: str) -> str:
    """Makes an entry the name of a directory: `lora:rank=8` gives lora-rank=8."""
    return spec.replace(":", "-").replace("/", "-")


def comparison_folder(name: str, config: Any, files: Sequence[str | Path | None]) -> Path:
    """Returns `--output`, or the directory under runs/ that the same options and files always give.

    `config` has its `ComparisonOptions` under `comparison`.

    Raises:
        LabError: it cannot be written, or holds something else.
    """
    usual = flat_options(type(config)())  # left out, so that an option that a later version adds changes nothing
    given = {key: value for key, value in flat_options(config).items() if value != usual[key]}
    options = {key: to_plain(value) for key, value in given.items() if key not in ANYWAY}
    there = [Path(file) for file in files if file and Path(file).exists()]
    key = recipe_key({**options, "files": [[str(file), file.stat().st_mtime] for file in there]})
    folder: Path = config.comparison.output or Path("runs") / f"{name}-{key}"
    check_writable(folder)
    check_comparison(folder, config)
    return folder


def check_compared(what: str, options: ComparisonOptions) -> None:
    """Refuses a comparison that cannot start; `what` names one of the things that are compared.

    Raises:
        LabError: it was launched for several processes, or there is no --launch file.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LabError(f"compare starts one process per {what} itself: run it with python -m, and name the Accelerate "
                       "configuration of several GPUs with --launch FILE")  # fmt: skip
    if options.launch is not None and not options.launch.is_file():
        raise LabError(f"--launch {options.launch}: no such file; name an Accelerate configuration")


def seeds_of(options: ComparisonOptions) -> range:
    """Returns the seeds with which each entry is run."""
    return range(options.seed, options.seed + options.seeds)


def seeds_text(options: ComparisonOptions) -> str:
    """Says with how many seeds each entry is run."""
    return "one seed" if options.seeds == 1 else f"{options.seeds} seeds"


def check_comparison(folder: Path, config: object) -> None:
    """Makes sure that a directory is new, or of this comparison.

    Raises:
        LabError: it is of another comparison, or of something else.
    """
    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise LabError(f"--output {folder}: is not empty and holds no comparison; name another directory")
        return
    there = flat_options(config_from_yaml(type(config), file))
    changed = [name for name, value in flat_options(config).items() if there[name] != value and name not in ANYWAY]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise LabError(f"--output {folder}: holds a comparison with another {flags}; name another directory")


def claim(folder: Path, config: object) -> None:
    """Makes the directory of this comparison, unless it is there.

    Raises:
        LabError: it is of another comparison, or of something else.
    """
    check_comparison(folder, config)
    if not (folder / "config.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", config_to_yaml(config))
