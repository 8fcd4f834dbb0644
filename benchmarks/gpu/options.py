"""The options of `python -m benchmarks.gpu`. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Options:
    """Measures everything that needs a GPU, most valuable first, and says before what it will do.

    What is done is not done again: the same command goes on where it was stopped. Then `--rows benchmarks/results/gpu`
    writes the table of docs/performance.md. Without a GPU all sizes are tiny: that shows that it works, not how fast.
    """

    output: Path = Path("benchmarks/results/gpu")
    """Directory of the rows: a file for each measurement."""
    only: tuple[str, ...] = ()
    """Parts by number or name, or single measurements as part/measurement, such as traces/clip_lab.train."""
    again: bool = False
    """Do again what is done."""
    minutes: float = 10.0
    """Longest time of each part: what runs then is stopped, and keeps what it has."""
    cifar: Path | None = None
    """CIFAR-10 in any published form; without it, random pictures of its size."""
    long: bool = False
    """Also SimCLR's whole 200 epochs, which go on with every start of this command."""
    tiny: bool = False
    """Tiny sizes, also where there is a GPU."""
    rows: tuple[Path, ...] = ()
    """Measure nothing: make the table of docs/performance.md from these files or directories of rows."""
    plan: bool = False
    """Only say what would be done."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""
