"""What measurements on a GPU leave behind: rows in JSON files, and the table that docs/performance.md has of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.gpu.parts import PARTS, Measurement

from labs_common.errors import LabError, reason_of
from labs_common.run import write_atomically

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "rows.json"  # the rows behind the table, in the repository
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks.gpu --rows -->", "<!-- end of what was measured on a GPU -->"
NOTHING = "Nothing of this has been run on a GPU: not measured on a GPU."
# done: all of it; stopped: its time was up; skipped: this machine lacks something; failed: with a message.
State = Literal["running", "done", "stopped", "skipped", "failed"]


@dataclass
class Row:
    """One figure.

    Attributes:
        value: None where it could not be measured; `note` then says why.
        peer, peer_value: what it is compared with, if anything, and that one's figure in the same unit.
        ratio: `value` to `peer_value`.
        seconds: from the start of the measurement until this row was there.
        device, versions, commit: where and by what it was measured.
    """

    name: str
    unit: str
    value: float | None
    peer: str = ""
    peer_value: float | None = None
    note: str = ""
    seconds: float = 0.0
    device: str = ""
    commit: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is None and self.value is not None and self.peer_value:
            self.ratio = self.value / self.peer_value


@dataclass
class Record:
    """A measurement's file: its rows so far, and how far it came."""

    part: str
    measurement: str
    state: State = "running"
    message: str = ""
    device: str = ""
    tiny: bool = False
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Replaces the file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def file_of(output: Path, part: str, measurement: Measurement) -> Path:
    """Returns where a measurement's rows are."""
    return output / part / f"{measurement.name.replace(' ', '-').replace('/', '-')}.json"


def read(file: Path) -> Record:
    """Reads a measurement's file.

    Raises:
        LabError: it is not there, or no such file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in values.pop("rows")]
        return Record(**values, rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabError(f"{file}: is no file of rows of python -m benchmarks.gpu ({reason_of(error)})") from error


def kept() -> list[Record]:
    """Returns the records behind the table in the documents; none as long as no GPU was there."""
    if not KEPT.exists():
        return []
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    return [Record(**{**record, "rows": [Row(**row) for row in record["rows"]]}) for record in found]


def keep(files: Sequence[Path]) -> None:
    """Makes the rows of these files (or of all files in a directory) those of the table, and writes the table.

    Raises:
        LabError: a file has no rows, or was measured on a CPU or with tiny sizes.
    """
    every = [
        found
        for file in files
        for found in (sorted([*file.glob("*.json"), *file.glob("*/*.json")]) if file.is_dir() else [file])
    ]
    records = []
    for file in every:
        record = read(file)
        if record.tiny or record.device.startswith("CPU"):
            raise LabError(f"{file}: was measured with tiny sizes or on a CPU; the table is of GPUs and real sizes")
        records.append(record)
    if not records:
        raise LabError(f"--rows {' '.join(map(str, files))}: no file of rows is there")
    records.sort(key=lambda record: (list(PARTS).index(record.part), record.measurement))
    write_atomically(KEPT, json.dumps([asdict(record) for record in records], indent=1, ensure_ascii=False) + "\n")
    write_section(DOCUMENT, records)


def write_section(document: Path, records: Iterable[Record]) -> None:
    """Puts the table between its marks in a document."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(document, f"{before}{BEGIN}\n{section(records)}\n{END}{after}")


def section(records: Iterable[Record]) -> str:
    """Writes rows as Markdown: a table for each part, with what did not work in it; one sentence if there are none."""
    records = list(records)
    if not records:
        return NOTHING
    lines: list[str] = []
    made: dict[str, None] = {}  # in order, each once
    for record in records:
        for row in record.rows:
            versions = ", ".join(f"{name} {value}" for name, value in row.versions.items() if value)
            made[f"{row.device}; commit {(row.commit or 'unknown')[:10]}; {versions}."] = None
    lines += [*made, ""]
    for number, (name, part) in enumerate(PARTS.items(), 1):
        mine = [record for record in records if record.part == name]
        if not mine:
            continue
        lines += [f"**{number}. {part.title}**", "", "| | unit | ours | beside it | | ratio | s |", f"|{'---|' * 7}"]
        for record in mine:
            lines += [f"| {' | '.join(cells(row))} |" for row in record.rows]
            if record.state != "done":
                lines.append(f"| {record.measurement}: {record.state}: {plain(record.message)} | | | | | | |")
        lines.append("")
    return "\n".join(lines).rstrip()


def cells(row: Row) -> list[str]:
    """Returns a row of the table."""
    note = f" ({plain(row.note)})" if row.note else ""
    return [
        f"{plain(row.name)}{note}", row.unit, figure(row.value), plain(row.peer), figure(row.peer_value),
        "" if row.ratio is None else f"{row.ratio:.2f} ×", f"{row.seconds:.0f}",
    ]  # fmt: skip


def figure(value: float | None) -> str:
    """Writes a figure with three digits; nothing if there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(text: str) -> str:
    """Takes out what would break a table's row."""
    return " ".join(text.replace("|", "/").split())
