"""The catalogue on the screen: `python -m vit_transfer.models`."""

from vit_transfer import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.models()

import sys

import torch
from rich.console import Console
from rich.table import Table

from labs_common.errors import LabError
from vit_transfer.catalogue import FAMILIES, block_of, classifiers, family
from vit_transfer.config import TINY, ModelOptions, ModelsConfig
from vit_transfer.model import create, input_size, unfreeze


def models(config: ModelsConfig) -> None:
    """Prints the table, and the names of the parameters if networks were named.

    Raises:
        LabError: timm has no such network.
    """
    if config.names is None:
        names = [name for members in FAMILIES.values() for name in members.networks] + list(TINY)
    else:
        names = [name.strip() for name in config.names.split(",") if name.strip()]
    if not names:
        raise LabError("--names: is empty; name some networks, such as resnet50,deit_small_patch16_224")
    table = Table("family", "network", "trains from", "trained without head, M", "all, M", "side")
    details = {}
    for name in names:
        with torch.device("meta"):  # sizes without weights
            network = create(ModelOptions(model=name, pretrained=False), 1000)
        sizes = {key: parameter.numel() for key, parameter in network.named_parameters()}
        try:
            unfreeze(network, "block", None)
            block, *_ = block_of(network, None)
            heads = tuple(f"{head}." for head in classifiers(network))
            free = [key for key, parameter in network.named_parameters() if parameter.requires_grad]
            inside = [key for key in free if not key.startswith(heads)]
            details[f"{name}, trained by --unfreeze block:"] = inside
        except LabError:
            block, inside = "name one with --block", []
            details[f"{name}, its parts:"] = [part for part, _ in network.named_children()]
        millions = [f"{sum(sizes[key] for key in keys) / 1e6:.2f}" for keys in (inside, sizes)]
        table.add_row(family(name) or "–", name, block, *millions, str(input_size(network)))
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width of its own
    console.print(table)
    if config.names is None:
        console.print("M: million parameters. --model NAME takes one; any other timm network goes with --block.")
    else:
        for title, keys in details.items():
            console.print(title, *keys, sep="\n  ")
