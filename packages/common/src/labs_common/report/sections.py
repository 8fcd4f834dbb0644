"""The sections that every lab's report has: what was asked, what trained, curves, cost, how to run it again.

Also a network as a stack of its parts, for the figure of its architecture.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from labs_common.cli import chosen, flat_options, to_plain
from labs_common.frozen.audit import FrozenAudit
from labs_common.report.figures import Cell, Row, architecture_figure, curve_figure, loss_figure
from labs_common.report.page import Code, Figure, Section, Table, Text, save_figure
from labs_common.run import Run, cost_of


def asked_section(config: Any) -> Section:
    """Lists the options that differ from their defaults, apart what was chosen for them, and all behind a fold."""
    usual, options = flat_options(type(config)()), flat_options(config)
    # A resumed run has read what was chosen from its config, as if it had been asked for.
    ours = chosen(config)
    if resumed := options.get("resume"):
        before = Run(resumed).load_json("environment.json") or {}
        ours = [name for name in before.get("chosen", []) if name in options]
    every = {name: ("--" + name.replace("_", "-"), _said(value)) for name, value in options.items()}
    asked = [every[name] for name, value in options.items() if value != usual[name] and name not in ours]
    shown = Table(("option", "value"), asked) if asked else Text("All options had their defaults.")
    more = [Table(("option", "value"), [every[name] for name in ours], "chosen for it")] if ours else []
    whole = Table(("option", "value"), [*every.values()], "every option", folded=True)
    return Section("What was asked", [shown, *more, whole])


def trained_section(audit: FrozenAudit) -> Section:
    """Lists what trained and what was frozen, with the audit's verdict; call after `audit.check`."""
    rows = audit.table()
    trained, frozen = (sum(int(row[key]) for row in rows) for key in ("trained", "frozen"))
    verdict = (
        f"{trained:,} values trained ({trained / max(1, trained + frozen):.2%}); {frozen:,} were frozen. "
        f"{len(audit.before)} frozen tensors were hashed before and after training: all are unchanged."
    )
    body = [(row["module"], row["trained"], row["frozen"], row["verified"]) for row in rows]
    return Section("What trained", [Text(verdict), Table(("module", "trained", "frozen", "verified tensors"), body)])


def drawn_section(run: Run, audit: FrozenAudit, rows: Sequence[Row], caption: str) -> Section:
    """Lists the same, and draws the network from the `rows` of its parts (see `structure_of`)."""
    section = trained_section(audit)
    section.blocks.insert(1, Figure(save_figure(run, "architecture", architecture_figure(rows)), caption))
    return section


def curves_section(run: Run, evaluations: Sequence[str] = ("validation/loss",)) -> Section:
    """Draws loss and learning rate by step; `evaluations` are drawn into the figure of the loss."""
    found = {name.replace("/", " "): curve for name in evaluations if (curve := run.curve(name))[0]}
    loss = save_figure(run, "loss", loss_figure(run.curve("loss"), found))
    said = "Loss by step; faint behind it that of every step, some of which may lie above the figure."
    said += " A ring marks the lowest evaluation." if found else ""
    rates = {"learning rate": run.curve("learning_rate")}
    rate = save_figure(run, "learning_rate", curve_figure(rates, "optimizer step", "learning rate"))
    return Section("Curves", [Figure(loss, said), Figure(rate, "Learning rate by step.")])


def evaluations_table(run: Run, keys: Sequence[str] = ()) -> Table:
    """Lists `keys` of every evaluation behind a fold; without any, all that the last one has."""
    lines = [line for line in run.lines("metrics.jsonl") if "validation/loss" in line]
    keys = keys or [key for key in (lines[-1] if lines else ()) if key != "step"]
    columns = [key.replace("/", " ").replace("_", " ") for key in ("step", *keys)]
    rows = [[line.get(key) for key in ("step", *keys)] for line in lines]
    return Table(columns, rows, "every evaluation", folded=True)


def cost_section(run: Run, unit: str, seconds: Mapping[str, float]) -> Section:
    """Lists time, throughput and memory, from timing.jsonl; `seconds` are the parts of this start of the run."""
    cost = cost_of(run, unit)
    rows: list[tuple[str, Any]] = [(f"seconds: {part}", value) for part, value in seconds.items()]
    rows += [
        ("seconds: all optimizer steps", cost["seconds"]),
        ("optimizer steps", cost["steps"]),
        (f"{unit} trained on", cost[unit]),
        (f"{unit} per second in training", cost[f"{unit} per second"]),
        ("peak memory, MiB", cost["peak memory"] / 2**20),
    ]
    return Section("Cost", [Table(("", ""), rows)])


def rerun_section(run: Run) -> Section:
    """Gives the exact command, the machine and the versions."""
    environment = run.load_json("environment.json")
    environment.pop("chosen", None)  # see `asked_section`
    packages = list(environment.pop("packages").items())
    rows = [(name.replace("_", " "), _said(value)) for name, value in environment.items()]
    versions = Table(("package", "version"), packages, "versions", folded=True)
    return Section("How to run it again", [Code(environment["command"]), Table(("", ""), rows), versions])


def _said(value: Any) -> str:
    plain = to_plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


@dataclass(frozen=True)
class Structure:
    """A network's parts from its input on, and its numbers of parameters."""

    name: str
    rows: list[Row]
    parameters: int
    trainable: int


def structure_of(model: torch.nn.Module) -> Structure:
    """Lists the parts of a network from its input to its head, equal ones in a row taken together."""
    rows = []
    for cells, group in itertools.groupby(_parts(model), key=lambda part: part[1]):
        names = [name for name, _ in group]
        rows.append(Row(names[0] if len(names) == 1 else f"{names[0]} – {names[-1]}", cells, len(names)))
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Structure(type(model).__name__, rows, sum(parameter.numel() for parameter in parameters), trainable)


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, list[Cell]]]:
    own = [parameter for _, parameter in model.named_parameters(recurse=False)]
    if own:
        yield "tokens and positions", [_cell("", own)]
    for name, child in model.named_children():
        inner = [(place, part) for place, part in child.named_children() if any(True for _ in part.parameters())]
        if isinstance(child, (torch.nn.Sequential, torch.nn.ModuleList)) and len(inner) > 1:
            for place, part in inner:
                yield f"{name}.{place}", _cells(part)
        elif any(True for _ in child.parameters()):
            yield name, _cells(child)


def _cells(part: torch.nn.Module) -> list[Cell]:
    found = [(name, list(child.parameters())) for name, child in part.named_children()]
    cells = [_cell(name, parameters) for name, parameters in found if parameters]
    return cells if 0 < len(cells) <= 6 else [_cell("", list(part.parameters()))]


def _cell(name: str, parameters: list[torch.nn.Parameter]) -> Cell:
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Cell(name, trained, sum(parameter.numel() for parameter in parameters) - trained)
