"""A page on which a person rates pairs of answers: `python -m llm_peft_fa.rate to_rate.csv`; and who won in the end."""

from llm_peft_fa import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.rate()

import csv
import io
import json
import math
import os
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlparse

from jinja2 import Environment, PackageLoader

from labs_common.errors import LabError, json_of, reason_of, text_of
from labs_common.progress import console
from labs_common.run import write_atomically
from llm_peft_fa.config import RateConfig

COLUMNS = ("number", "prompt", "answer A", "answer B", "better (A, B or =)")
CHOICES = ("A", "=", "B")
HOST = "127.0.0.1"  # of this machine alone: prompts may be private, and anybody could rate
Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def rate(config: RateConfig) -> None:
    """Serves the page until Ctrl-C; or prints, and writes to FILE.ratings.json, what the ratings say."""
    if config.read_ratings:
        found = read_ratings(config.file)
        write_atomically(config.file.with_name(f"{config.file.name}.ratings.json"), json.dumps(found, indent=1) + "\n")
        print(ratings_text(found))
        return
    Table.read(config.file)
    try:
        server = page_of(config.file, config.port)
    except OSError as error:
        raise LabError(f"--port {config.port}: cannot be listened on ({reason_of(error)}); name another") from error
    with server:
        console.print(f"rate on http://{HOST}:{server.server_port}; Ctrl-C ends, every choice is kept at once")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print(f"{Table.read(config.file).rated} of {len(Table.read(config.file).rows)} pairs are rated")


def check_judge_file(file: Path) -> None:
    """Refuses a file that cannot be written or that somebody may have begun to fill in.

    Raises:
        LabError: it exists, or its directory does not or cannot be written.
    """
    if file.exists() or key_of(file).exists():  # a table that was sent away cannot be read without its key
        raise LabError(f"--judge-file {file}: exists already and may hold ratings, or its key does; name another")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise LabError(f"--judge-file {file}: its directory does not exist or cannot be written")


def write_judge_file(file: Path, prompts: Sequence[str], said: Mapping[str, Sequence[str]], seed: int) -> None:
    """Writes a CSV table for people to rate, A and B in random order by row, and FILE.key.json with the true names.

    `said` are the answers of two models to the prompts, by name.
    """
    draw = random.Random(f"judges {seed}")
    rows, key = [], []
    for number, (prompt, *answers) in enumerate(zip(prompts, *said.values(), strict=True), 1):
        sides = list(zip(said, answers, strict=True))
        draw.shuffle(sides)
        rows.append([str(number), *map(_no_formula, (prompt, sides[0][1], sides[1][1])), ""])
        key.append({"number": number, "A": sides[0][0], "B": sides[1][0]})
    Table(file, rows).write()
    write_atomically(key_of(file), json.dumps(key, indent=1) + "\n")


def key_of(file: Path) -> Path:
    """Names the file that knows which answers are whose."""
    return file.with_name(f"{file.name}.key.json")


def _no_formula(text: str) -> str:
    """Puts a space before what a spreadsheet would compute: a text from anywhere may be a command."""
    return f" {text}" if text.startswith(tuple("=+-@\t\r\n＝＋－＠")) else text


class Table:
    """The pairs of a CSV table and their ratings, as `write_judge_file` made it or a spreadsheet saved it."""

    def __init__(self, file: Path, rows: list[list[str]], delimiter: str = ",") -> None:
        self.file, self.rows, self.delimiter = file, rows, delimiter

    @classmethod
    def read(cls, file: Path) -> "Table":
        """Reads a table.

        Raises:
            LabError: it cannot be read, is another table, or holds a rating that is none.
        """
        text = text_of(file, str(file)).removeprefix("\ufeff")
        delimiter = ";" if text.startswith(";".join(COLUMNS[:2])) else ","  # a spreadsheet in Persian writes ;
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
        if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            raise LabError(f"{file}: is not a table to rate; name what llm_peft_fa.evaluate --judge-file wrote")
        for row in rows[1:]:
            row[4] = row[4].strip().upper()
            if row[4] not in ("", *CHOICES):
                raise LabError(f"{file}: pair {row[0]} is rated {row[4]!r}; write A, B or =, or leave it empty")
        return cls(file, rows[1:], delimiter)

    @property
    def rated(self) -> int:
        """The number of pairs with a rating."""
        return sum(row[4] != "" for row in self.rows)

    def write(self) -> None:
        """Writes the table whole or not at all; the byte-order mark makes spreadsheets read it as UTF-8."""
        stream = io.StringIO()
        csv.writer(stream, delimiter=self.delimiter).writerows([COLUMNS, *self.rows])
        write_atomically(self.file, "\ufeff" + stream.getvalue())


def page_of(file: Path, port: int) -> ThreadingHTTPServer:
    """Makes the server of the page; 0 takes any free port."""
    lock = threading.Lock()

    class Page(BaseHTTPRequestHandler):
        """Shows a pair, and keeps what was chosen; the table is read anew each time, so that nothing is overwritten."""

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the browser was closed
                self.close_connection = True
            except (LabError, OSError, ValueError) as error:  # of the table, the disk, a number
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))

        def do_GET(self) -> None:
            if not self.local():
                return
            table = Table.read(file)
            asked = parse_qs(urlparse(self.path).query).get("row", [""])[0]
            place = int(asked) if asked.isdecimal() and int(asked) < len(table.rows) else first_unrated(table)
            body = page_text(table, place).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Frame-Options", "DENY")  # another site could have its visitors click in it
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            if not self.local():
                return
            size = max(0, min(int(self.headers.get("Content-Length") or 0), 1000))
            given = parse_qs(self.rfile.read(size).decode("utf-8", "replace"))
            row, better = given.get("row", [""])[0], given.get("better", [""])[0]
            with lock:
                table = Table.read(file)
                if better not in CHOICES or not row.isdecimal() or int(row) >= len(table.rows):
                    self.send_error(HTTPStatus.BAD_REQUEST)
                    return
                table.rows[int(row)][4] = better
                table.write()
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", "/")
            self.end_headers()

        def local(self) -> bool:
            """Refuses what another site makes a browser ask: its own name, or a form that stands elsewhere."""
            names = {f"{name}:{cast(ThreadingHTTPServer, self.server).server_port}" for name in (HOST, "localhost")}
            origin = self.headers.get("Origin")
            if self.headers.get("Host") in names and (origin is None or urlparse(origin).netloc in names):
                return True
            self.send_error(HTTPStatus.FORBIDDEN)
            return False

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the terminal quiet."""

    return ThreadingHTTPServer((HOST, port), Page)


def first_unrated(table: Table) -> int | None:
    """Finds the first pair without a rating; None if there is none."""
    return next((place for place, row in enumerate(table.rows) if not row[4]), None)


def page_text(table: Table, place: int | None) -> str:
    """Writes the page of a pair, which does not say whose answers they are; None is the end."""
    template = Environment(loader=PackageLoader("llm_peft_fa", ""), autoescape=True).get_template("rate.html")
    row = None if place is None else table.rows[place]
    return template.render(place=place, row=row, rated=table.rated, count=len(table.rows))


def read_ratings(file: Path) -> dict[str, Any]:
    """Counts whose answers were better, with the win rate of the pairs that were decided and what it is worth.

    The interval is Wilson's of 95 % (1927), the test the two-sided sign test: exact, ties left out.

    Raises:
        LabError: the table or its key cannot be read or do not fit, or nothing is rated.
    """
    table, where = Table.read(file), key_of(file)
    try:
        key = {str(row["number"]): row for row in json_of(where, str(where))}
        better = [key[row[0]][row[4]] if row[4] != "=" else "=" for row in table.rows if row[4]]
        base, tuned = sorted({row[side] for row in key.values() for side in "AB"}, key=lambda name: name != "base")
        if sorted(key) != sorted(row[0] for row in table.rows):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{where}: is not the key of {file}, which was written beside it, or pairs of that are missing "
                       "or twice; leave those that you do not rate empty") from error  # fmt: skip
    if not better:
        raise LabError(f"{file}: nothing is rated yet; python -m llm_peft_fa.rate {file} shows the pairs")
    counts = Counter(better)
    won, decided = counts[tuned], counts[tuned] + counts[base]
    low, high = wilson(won, decided)
    return {
        "pairs": len(table.rows), "rated": len(better), "compared": tuned, "with": base, "won": won,
        "lost": counts[base], "equal": counts["="], "win rate": won / decided if decided else None,
        "interval": [low, high], "p": sign_test(won, decided),
        "A chosen": sum(row[4] == "A" for row in table.rows),
    }  # fmt: skip


def ratings_text(found: Mapping[str, Any]) -> str:
    """Says in words what `read_ratings` found."""
    said = f"{found['rated']} of {found['pairs']} pairs rated: {found['compared']} better {found['won']} times, "
    said += f"{found['with']} {found['lost']} times, equal {found['equal']} times"
    if found["win rate"] is None:
        return f"{said}. None was decided."
    low, high = found["interval"]
    told = "differ" if found["p"] < 0.05 else "cannot be told apart"
    return (
        f"{said}.\nWin rate of {found['compared']} where one was better: {found['win rate']:.2f} (95 % interval "
        f"{low:.2f} to {high:.2f}); sign test p = {found['p']:.3g}: the two {told}. A was chosen "
        f"{found['A chosen']} times."
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Computes Wilson's 95 % interval of a share (1927); 0 to 1 without trials."""
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, Z_95**2 / trials
    middle = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + square / trials / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(successes: int, trials: int) -> float:
    """Computes the two-sided exact p of as many successes or more, if both outcomes are equally likely."""
    tail = sum(math.comb(trials, count) for count in range(max(successes, trials - successes), trials + 1))
    return min(1.0, 2 * tail / 2**trials)
