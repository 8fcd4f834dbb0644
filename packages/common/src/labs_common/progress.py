"""Progress on long work: a bar where someone looks at a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0  # soon enough to see that it goes on, seldom enough for a log
console = Console(stderr=True, highlight=False, soft_wrap=True)


class ProgressLine:
    """Counts `total` steps of a named task, or as many as come (None); use as a context manager.

    On a terminal it draws a bar with the remaining time; elsewhere it prints a plain line every fifteen seconds and one
    at the end. With `shown=False` (all but the main process) it does nothing.
    """

    def __init__(self, task: str, total: int | None, done: int = 0, shown: bool = True) -> None:
        self.task, self.total, self.done, self.shown = task, total, done, shown
        self._first = done
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            columns = texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1]
            self._bar = Progress(*columns, console=console)
            self._id = self._bar.add_task(task, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressLine":
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, note: str = "") -> None:
        """Counts one more step as done; `note` says what a reader may want to see (loss, speed)."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._id, completed=self.done, note=note)
        elif self.shown:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES or self.done == self.total:
                self._last_line = now
                took, total = now - self._began, self.total or self.done
                left = took / max(1, self.done - self._first) * (total - self.done)
                remaining = f"{left:.0f} s left" if self.done < total else f"{took:.0f} s"
                of = "" if self.total is None else f"/{total}"
                print(f"{self.task} {self.done}{of}  {note}  {remaining}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_left_out(source: str, reasons: Mapping[str, int], examples: Iterable[str]) -> None:
    """Prints what was left out of a source of data: how much by reason, the most first, and the first few by place."""
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.print(f"{source}: left out {count} × {reason}")
    for example in examples:
        console.print(f"  {example}")


def tracked(items: Iterable[T], task: str, total: int, shown: bool = True) -> Iterator[T]:
    """Yields `items` and shows how far it has come."""
    with ProgressLine(task, total, shown=shown) as line:
        for item in items:
            yield item
            line.advance()
