"""A table for people who judge answers without knowing whose they are."""

import csv
import io
import json
import os
import random
from pathlib import Path

from labs_common.errors import LabError
from labs_common.run import write_atomically
from llm_peft_fa.answers import Comparison

COLUMNS = ("number", "prompt", "answer A", "answer B", "better (A, B or =)")


def check_judge_file(file: Path) -> None:
    """Refuses a file that cannot be written or that somebody may have begun to fill in.

    Raises:
        LabError: it exists, or its directory does not or cannot be written.
    """
    if file.exists():
        raise LabError(f"--judge-file {file}: exists already and may hold ratings; name another")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise LabError(f"--judge-file {file}: its directory does not exist or cannot be written")


def write_judge_file(file: Path, comparison: Comparison, tuned: str, seed: int) -> None:
    """Writes the CSV table, A and B in random order by row, and FILE.key.json that tells which is which.

    The byte-order mark makes spreadsheets read the Persian as UTF-8.
    """
    assert comparison.before is not None
    draw = random.Random(f"judges {seed}")
    stream = io.StringIO()
    table = csv.writer(stream)
    table.writerow(COLUMNS)
    key = []
    rows = zip(comparison.prompts, comparison.before, comparison.after, strict=True)
    for number, (prompt, before, after) in enumerate(rows, 1):
        sides = [("base", before), (tuned, after)]
        draw.shuffle(sides)
        asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
        table.writerow((number, asked if len(prompt.messages) > 1 else prompt.messages[0]["content"],
                        sides[0][1], sides[1][1], ""))  # fmt: skip
        key.append({"number": number, "A": sides[0][0], "B": sides[1][0]})
    write_atomically(file, "\ufeff" + stream.getvalue())
    write_atomically(file.with_name(f"{file.name}.key.json"), json.dumps(key, indent=1) + "\n")
