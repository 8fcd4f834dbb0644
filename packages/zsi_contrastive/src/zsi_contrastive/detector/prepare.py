"""Writes zero-shot parts of COCO: `python -m zsi_contrastive.prepare --data coco --split 48_17`."""

import dataclasses
import json
from pathlib import Path

from labs_common.errors import LabError
from labs_common.lock import check_writable
from labs_common.run import write_atomically, written_whole
from zsi_contrastive.detector.annotations import RULES, Instances, read_split
from zsi_contrastive.detector.config import PrepareConfig
from zsi_contrastive.detector.data import read_parts
from zsi_contrastive.detector.defaults import complete_data

NAMES = {"train": "train_seen.json", "unseen": "test_unseen.json", "both": "test_both.json"}


def prepare(config: PrepareConfig) -> None:
    """Writes the three files and the counts, and prints these.

    Raises:
        LabError: the data cannot be read, or the directory exists.
    """
    data = complete_data(config.data)
    split = read_split(data.split)
    output = config.output or Path(f"zero-shot-{split.name}")
    if output.exists():
        raise LabError(f"--output {output}: exists already; name another directory")
    check_writable(output)
    parts, _ = read_parts(data, split)
    with written_whole(output) as folder:
        for name, file in NAMES.items():
            write_part(getattr(parts, name), folder / file)
        counts = {
            name: {"pictures": pictures, "objects": objects, "crowds": crowds}
            for name, pictures, objects, crowds in parts.counts()
        }
        left_out = {"training": dict(parts.train.left_out), "test": dict(parts.both.left_out)}
        kept = {"split": dataclasses.asdict(split), "counts": counts, "left out": left_out}
        write_atomically(folder / "counts.json", json.dumps(kept, indent=1) + "\n")
    for name, pictures, objects, crowds in parts.counts():
        print(f"{name}: {pictures:,} pictures, {objects:,} objects, {crowds:,} crowds")
    for name, reasons in left_out.items():
        for reason, count in reasons.items():
            print(f"{name}: left out {count} × {reason}")
    print(f"checked: {RULES[data.protocol]}")
    print(f"written: {', '.join(str(output / file) for file in NAMES.values())}")


def write_part(part: Instances, file: Path) -> None:
    """Writes a part as COCO's JSON, a row after the other: they need not be in memory together."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(f'{{"images": {json.dumps(part.images)}, "annotations": [')
        for place, text in enumerate(part.rows.texts()):
            stream.write(f", {text}" if place else text)
        stream.write(f'], "categories": {json.dumps(part.categories)}}}')


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.prepare")
