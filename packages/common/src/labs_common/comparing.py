"""What every lab's `compare` needs: entries of a list with options after colons, a directory that is its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from labs_common.cache import recipe_key
from labs_common.cli import config_from_yaml, config_to_yaml, flat_options, to_plain
from labs_common.errors import LabError

ANYWAY = ("output", "debug", "launch", "config")  # these do not make it another comparison


def entries_of(option: str, text: str) -> list[str]:
    """The comma-separated entries of `option`, each once.

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
    """`lora:rank=8:no-bias` as the name and the flags that it stands for: ("lora", ["--rank=8", "--no-bias"])."""
    name, *options = spec.split(":")
    parts = [option.partition("=") for option in options]
    return name, [f"--{key.replace('_', '-')}" + (f"={value}" if value else "") for key, _, value in parts]


def slug(spec: str) -> str:
    """An entry as a part of a path."""
    return spec.replace(":", "-").replace("/", "-")


def comparison_folder(name: str, config: object, files: Sequence[str | Path | None]) -> Path:
    """The directory under runs/ that the same options and the same files always give."""
    options = {key: to_plain(value) for key, value in flat_options(config).items() if key not in ANYWAY}
    there = [Path(file) for file in files if file and Path(file).exists()]
    return Path("runs") / f"{name}-{recipe_key({**options, 'files': [[str(f), f.stat().st_mtime] for f in there]})}"


def claim(folder: Path, config: object) -> None:
    """Makes the directory of this comparison, or makes sure that the one that is there is of it.

    Raises:
        LabError: it is of another comparison, or of something else.
    """
    from labs_common.run import write_atomically

    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise LabError(f"--output {folder}: is not empty and holds no comparison; name another directory")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, config_to_yaml(config))
        return
    there = flat_options(config_from_yaml(type(config), file))
    changed = [name for name, value in flat_options(config).items() if there[name] != value and name not in ANYWAY]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise LabError(f"--output {folder}: holds a comparison with another {flags}; name another directory")


def pareto(points: Mapping[str, tuple[float, float]], higher_is_better: bool = True) -> list[str]:
    """The names of (cost, quality) that no other beats in one and equals in the other."""
    sign = 1 if higher_is_better else -1
    front = []
    for name, (cost, value) in points.items():
        beaten = any(
            other_cost <= cost and sign * other >= sign * value and (other_cost, other) != (cost, value)
            for other_cost, other in points.values()
        )
        if not beaten:
            front.append(name)
    return front
