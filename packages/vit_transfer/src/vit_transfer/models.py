"""The catalogue on the screen: `python -m vit_transfer.models`."""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.models()

import sys
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from labs_common.errors import LabError
from vit_transfer.catalogue import FAMILIES, block_of, family
from vit_transfer.config import TINY, ModelOptions, ModelsConfig
from vit_transfer.model import create, input_size


def models(config: ModelsConfig) -> None:
    """Prints the table, and the names of the parameters if networks were named."""
    if config.names is None:
        names = [name for members in FAMILIES.values() for name in members.networks] + list(TINY)
    else:
        names = [name.strip() for name in config.names.split(",") if name.strip()]
    if not names:
        raise LabError("--names: is empty; name some networks, such as resnet50,deit_small_patch16_224")
    table = Table("family", "network", "last block", "of it, M", "all, M", "side")
    found = {name: listed(name) for name in names}
    for name, row in found.items():
        numbers = (f"{row.in_block / 1e6:.2f}", f"{row.parameters / 1e6:.2f}", str(row.side))
        table.add_row(family(name) or "–", name, ", ".join(row.block) or "name one with --block", *numbers)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width of its own
    console.print(table)
    if config.names is None:
        console.print("M: million parameters. --model NAME takes one; any other timm network goes with --block.")
        return
    for name, row in found.items():
        parts = row.names if row.block else row.parts
        console.print(f"{name}, {'trained by --unfreeze block' if row.block else 'its parts'}:", *parts, sep="\n  ")


@dataclass(frozen=True)
class Listed:
    """A network in numbers.

    Attributes:
        block: prefixes of the parameters of its last block; empty if the catalogue does not know its class.
        in_block: parameters of the block, without the head.
        names: of those parameters.
        parameters: of the whole network, with its own head.
        side: of its pictures, in pixels.
        parts: its children by name.
    """

    block: tuple[str, ...]
    in_block: int
    names: list[str]
    parameters: int
    side: int
    parts: list[str]


def listed(name: str) -> Listed:
    """Finds the network's numbers, without making its weights.

    Raises:
        LabError: timm has no such network.
    """
    with torch.device("meta"):
        network: Any = create(ModelOptions(model=name, pretrained=False), 1000)
    try:
        block = block_of(network, None)
    except LabError:
        block = ()
    inside = tuple(f"{prefix}." for prefix in block)
    own = {key: value.numel() for key, value in network.named_parameters() if inside and key.startswith(inside)}
    return Listed(
        block,
        sum(own.values()),
        list(own),
        sum(value.numel() for value in network.parameters()),
        input_size(network),
        [part for part, _ in network.named_children()],
    )
