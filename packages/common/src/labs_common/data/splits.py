"""Splits: recorded with a run, so that a resumed one has the same; and what was left out of them."""

from collections.abc import Mapping

from labs_common.data.images import Pictures
from labs_common.errors import LabError
from labs_common.progress import console
from labs_common.run import Run

Splits = Mapping[str, Pictures]


def record_splits(run: Run, splits: Splits) -> None:
    """Writes which picture is in which split to splits.json.

    Raises:
        LabError: the run is being resumed, and its pictures were others.
    """
    now = {name: {"fingerprint": part.fingerprint(), "pictures": list(part.names)} for name, part in splits.items()}
    before = run.load_json("splits.json") if run.resumed else None
    if before is None:
        run.save_json("splits.json", now)
    elif before != now:
        changed = next(name for name in splits if before[name] != now[name])
        raise LabError(
            f"--resume {run.path}: the {changed} pictures have changed since the run began; bring them back or start a "
            "new run"
        )


def print_left_out(splits: Splits) -> None:
    """Prints what was left out of each source: how much by reason, and the first few by name."""
    for source, pictures in {part.source: part for part in splits.values() if part.left_out}.items():
        for reason, count in pictures.left_out.most_common():
            console.print(f"{source}: left out {count} × {reason}")
        for example in pictures.examples:
            console.print(f"  {example}")
