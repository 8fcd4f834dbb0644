"""Plans and runs the measurements, each in a process of its own that is stopped when its part's time is up."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from benchmarks.gpu.measuring import Setting, machine, measure
from benchmarks.gpu.options import Options
from benchmarks.gpu.parts import PARTS, Measurement
from benchmarks.gpu.rows import Record, figure, file_of, keep, read

from labs_common.compare.processes import start_server
from labs_common.errors import Interrupted, LabError
from labs_common.lock import check_writable
from labs_common.progress import console
from labs_common.run import write_atomically

# Imported once, in the server that every measurement is forked from. None of them starts CUDA when it is imported.
LIBRARIES = (
    "deepspeed", "benchmarks.llm_training", "benchmarks.clip", "benchmarks.pretraining", "benchmarks.gpu.commands",
    "benchmarks.gpu.language", "benchmarks.gpu.pictures", "benchmarks.gpu.traces", "benchmarks.gpu.sharding",
    "trl.trainer.sft_trainer", "bitsandbytes", "open_clip", "datasets", *(f"{lab}.train" for lab in (
        "llm_peft_fa", "clip_lab", "caption_lab", "vit_transfer", "zsi_contrastive.detector", "zsi_contrastive.ssl",
    )),
)  # fmt: skip
LAST_SECONDS = 45  # after the signal: a training writes a checkpoint meanwhile
FINISHED = ("done", "skipped")
Context = ForkServerContext | SpawnContext


@dataclass
class Planned:
    """A measurement, its file, and what is there of it."""

    part: str
    measurement: Measurement
    file: Path
    there: Record | None


def run(options: Options) -> None:
    """Says what will be done, does it part by part, and shows the rows.

    Raises:
        LabError: an option names something that is not there, or no process can use the device.
        Interrupted: Ctrl-C; what was measured is kept.
    """
    if options.rows:
        keep(options.rows)
        return
    check(options)
    tiny = options.tiny or not torch.cuda.is_available()
    options.output.mkdir(parents=True, exist_ok=True)
    context, facts = first_process(options.output, forked=not options.plan)
    planned = plan(options, facts["device"], tiny)
    show_plan(planned, options, facts["device"], tiny)
    if options.plan:
        return
    work = options.output.absolute() / "work"
    setting = Setting(tiny, work, options.cifar and options.cifar.absolute(), facts)
    for number, part in enumerate(PARTS, 1):
        waiting = [one for one in planned if one.part == part and not is_finished(one)]
        # What was stopped or failed before comes last: it must not keep the others from being measured at all.
        waiting.sort(key=lambda one: one.there is not None)
        end = time.monotonic() + 60 * options.minutes
        for one in waiting:
            if time.monotonic() >= end:
                console.print(f"part {number}: its {options.minutes:g} minutes are over; the next start goes on")
                break
            measured(context, one, setting, end)
            show(one)


def check(options: Options) -> None:
    """Makes sure, before anything is imported, that all that was asked for is there.

    Raises:
        LabError: it is not; the message names the option.
    """
    check_writable(options.output)
    if options.cifar is not None and not options.cifar.exists():
        raise LabError(f"--cifar {options.cifar}: is not there")
    if not options.minutes > 0:
        raise LabError(f"--minutes {options.minutes:g}: must be more than 0")
    names = {f"{part}/{one.name}" for part, whole in PARTS.items() for one in whole.measurements}
    for asked in options.only:
        if asked not in names | set(PARTS) and asked not in map(str, range(1, len(PARTS) + 1)):
            said = ", ".join(f"{number} or {part}" for number, part in enumerate(PARTS, 1))
            raise LabError(f"--only {asked}: is no part; there are {said}, and single measurements as part/measurement")


def plan(options: Options, device: str, tiny: bool) -> list[Planned]:
    """Lists the measurements that were asked for, with what is there of each."""
    found = []
    for number, (part, whole) in enumerate(PARTS.items(), 1):
        for one in whole.measurements:
            by_part = not options.only or {str(number), part} & set(options.only)
            if f"{part}/{one.name}" in options.only or (by_part and (options.long or not one.long)):
                file = file_of(options.output, part, one)
                there = read(file) if file.exists() else None
                # Of another machine, or with other sizes: nothing is there of this one.
                if options.again or (there is not None and (there.device, there.tiny) != (device, tiny)):
                    there = None
                found.append(Planned(part, one, file, there))
    return found


def is_finished(planned: Planned) -> bool:
    """Tells whether there is nothing left to do."""
    return planned.there is not None and planned.there.state in FINISHED


def show_plan(planned: list[Planned], options: Options, device: str, tiny: bool) -> None:
    """Prints what will be done and what is there already."""
    console.print(f"{device}{'; tiny sizes: the figures say nothing about speed' if tiny else ''}")
    total = 0.0
    for number, (part, whole) in enumerate(PARTS.items(), 1):
        mine = [one for one in planned if one.part == part]
        minutes = min(options.minutes, sum(one.measurement.minutes for one in mine if not is_finished(one)))
        total += minutes
        if mine:
            about = "" if tiny or not minutes else f" (about {minutes:.0f} min)"
            console.print(f"{number}. {whole.title}{about}", highlight=False)
            for state in {state_of(one): None for one in mine}:
                names = "; ".join(one.measurement.name for one in mine if state_of(one) == state)
                console.print(f"   {state}: {names}", highlight=False)
    left = [one for one in planned if not is_finished(one)]
    about = "" if tiny else f", about {total:.0f} minutes"
    console.print(f"{len(left)} of {len(planned)} measurements to do{about}; rows in {options.output}")


def state_of(planned: Planned) -> str:
    """Says what is there of a measurement."""
    return "to do" if planned.there is None else planned.there.state


def first_process(output: Path, forked: bool) -> tuple[Context, dict[str, Any]]:
    """Starts the server that measurements are forked from, and lets the first one find out what machine this is.

    Where a library that the server imported has started CUDA, no forked process can use it: then each measurement
    imports everything anew.

    Raises:
        LabError: neither way a process can use the device.
    """
    contexts: list[Context] = [multiprocessing.get_context("spawn")]
    if forked:
        console.print("importing the libraries, once for all measurements")
        there = [name for name in LIBRARIES if importlib.util.find_spec(name.partition(".")[0]) is not None]
        start_server(None, there)
        contexts.insert(0, multiprocessing.get_context("forkserver"))
    file = output / "machine"
    for context in contexts:
        process = context.Process(target=_describe, args=(file,))
        process.start()
        process.join()
        if process.exitcode == 0:
            return context, json.loads(file.read_text(encoding="utf-8"))
        console.print(f"a process made by {context.get_start_method()} cannot use the device")
    raise LabError("no process can use the device; the lines above say why")


def _describe(file: Path) -> None:
    write_atomically(file, json.dumps(machine(), indent=1) + "\n")


def measured(context: Context, planned: Planned, setting: Setting, end: float) -> None:
    """Runs one measurement until it ends or `end` (monotonic seconds) has come, and completes its file.

    Raises:
        Interrupted: Ctrl-C.
    """
    name, began = planned.measurement.name, time.monotonic()
    console.print(f"{planned.part}: {name}")
    process = context.Process(target=measure, args=(planned.part, planned.measurement, setting, planned.file))
    process.start()
    assert process.pid is not None
    reason = ""
    with _noticing() as noticed:
        while process.is_alive() and not noticed and time.monotonic() < end:
            process.join(0.2)
        if process.is_alive():
            reason = "interrupted" if noticed else f"stopped after {(time.monotonic() - began) / 60:.1f} minutes"
            _stop(process.pid, process.join, process.is_alive)
    with contextlib.suppress(ProcessLookupError):  # what it may have left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    record = read(planned.file) if planned.file.exists() else Record(planned.part, name, device=setting.facts["device"])
    if record.state == "running":  # it could not say itself how it ended
        record.state = "stopped" if reason else "failed"
        record.message = reason or f"its process ended with code {process.exitcode}"
        record.tiny, record.seconds = setting.tiny, time.monotonic() - began
        record.write(planned.file)
    planned.there = record
    if noticed:
        raise Interrupted("stopped; what was measured is kept, and the same command goes on from there")


def _stop(pid: int, join: Callable[[float], None], alive: Callable[[], bool]) -> None:
    """Sends the process and all that it started Ctrl-C, and gives them time to save what they have."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGINT)
    end = time.monotonic() + LAST_SECONDS
    while alive() and time.monotonic() < end:
        join(0.2)


@contextlib.contextmanager
def _noticing() -> Iterator[list[int]]:
    """Yields the numbers of the signals that came to this process meanwhile."""
    noticed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noticed.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noticed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(planned: Planned) -> None:
    """Prints the rows of a measurement that has just ended, and why it ended if it is not done."""
    assert planned.there is not None
    for row in planned.there.rows:
        beside = f"; {row.peer} {figure(row.peer_value)}" if row.peer else ""
        ratio = "" if row.ratio is None else f"; ratio {row.ratio:.2f}"
        note = f" ({row.note})" if row.note else ""
        console.print(f"  {row.name}: {figure(row.value) or '-'} {row.unit}{beside}{ratio}{note}", highlight=False)
    if planned.there.state != "done":
        console.print(f"  {planned.there.state}: {planned.there.message}", highlight=False)
