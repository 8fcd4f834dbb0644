"""A network as a stack of its parts, input first: what is in each, and how much of it trains."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from labs_common.report.figures import Cell, Row


@dataclass(frozen=True)
class Structure:
    """What a network is made of, in numbers of parameters."""

    name: str
    rows: list[Row]
    parameters: int
    trainable: int


def structure_of(model: torch.nn.Module) -> Structure:
    """The parts of a network from its input to its head, equal ones in a row taken together."""
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
