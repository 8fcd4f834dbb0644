"""The network: any timm model with a new head, and what of it trains."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg

from labs_common.cut import Cut
from labs_common.errors import LabError
from labs_common.freezing import train_only
from vit_transfer.catalogue import block_of, classifiers
from vit_transfer.config import TINY, ModelOptions
from vit_transfer.first_tokens import FirstTokens, can_be_shortened, read_tokens


class MlpHead(torch.nn.Sequential):
    """width -> hidden -> classes with a ReLU between."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


@register_model
def with_mlp_head(
    pretrained: bool = False, pretrained_cfg: Any = None, base: str = "", hidden: int = 512, **others: Any
) -> torch.nn.Module:
    """Timm entry point of a model whose classifiers are MLPs: what an export of `--head mlp` names.

    timm knows it after `import vit_transfer.model`. `base` is built without weights of its own: they would be
    replaced, and might have to be downloaded.
    """
    shown = resolve_pretrained_cfg("with_mlp_head", pretrained_cfg=pretrained_cfg).to_dict() if pretrained_cfg else {}
    own = {name: shown[name] for name in ("num_classes",) if name in shown}
    own |= {name: value for name, value in others.items() if value is not None}
    model: Any = _with_mlp(timm.create_model(base, pretrained=False, **own), hidden)
    if shown:
        model.pretrained_cfg = shown
    if pretrained:
        load_pretrained(model, num_classes=model.num_classes)
    return model


def create(options: ModelOptions, classes: int) -> torch.nn.Module:
    """The network with a fresh head for `classes` classes; take the seed first.

    Raises:
        LabError: timm has no such model, or its weights cannot be had.
    """
    if options.model in TINY:
        from vit_transfer.tiny import tiny_model

        model = tiny_model(options.model, classes, options.pretrained and options.weights is None, options.image_size)
    else:
        model = _from_timm(options, classes)
    if options.weights is not None:
        _load(model, options.weights)
    return _with_mlp(model, options.head_width) if options.head == "mlp" else model


def _from_timm(options: ModelOptions, classes: int) -> torch.nn.Module:
    name = options.model
    if not timm.is_model(name.removeprefix("timm/").split(".")[0]):
        like = difflib.get_close_matches(name, timm.list_models(), 4)
        hint = f"; like it are {', '.join(like)}" if like else ""
        raise LabError(f"--model {name}: timm has no such model{hint}; python -m vit_transfer.models lists some")
    known = timm.get_pretrained_cfg(name.removeprefix("timm/"), allow_unregistered=True)
    fixed = known is not None and known.fixed_input_size
    size: dict[str, Any] = {"img_size": options.image_size} if options.image_size and fixed else {}
    pretrained = options.pretrained and options.weights is None
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **size)
    except Exception as error:  # downloads fail in many ways; everything else about the name has been checked
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LabError(f"--model {name}: cannot be made ({reason}); check the network, or give --weights FILE or "
                       "--no-pretrained") from error  # fmt: skip


def _load(model: torch.nn.Module, file: Path) -> None:
    """Loads everything but the head.

    Raises:
        LabError: the file is broken or of another architecture.
    """
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise LabError(f"--weights {file}: cannot be read ({str(error).splitlines()[0]})") from error
    heads = tuple(f"{name}." for name in classifiers(model))
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    given = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    for name in own.keys() | given.keys():
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise LabError(f"--weights {file}: is of another architecture or image size (first difference: {name})")
    if not next(model.parameters()).is_meta:  # else it is only being checked
        model.load_state_dict(given, strict=False)


def _with_mlp(model: torch.nn.Module, hidden: int) -> torch.nn.Module:
    for name in classifiers(model):
        head = model.get_submodule(name)
        if not isinstance(head, torch.nn.Linear):
            raise LabError(f"--head mlp: the head of this model is a {type(head).__name__}; take --head linear")
        model.set_submodule(name, MlpHead(head.in_features, hidden, head.out_features))
    return model


def unfreeze(model: torch.nn.Module, options: ModelOptions) -> tuple[str, ...]:
    """Makes exactly the wanted part trainable; returns the prefixes of its parameters ("" for everything).

    Raises:
        LabError: there is no such block.
    """
    if options.unfreeze == "all":
        train_only(model, lambda name: True)
        return ("",)
    block = block_of(model, options.block) if options.unfreeze == "block" else ()
    prefixes = (*block, *classifiers(model))
    train_only(model, lambda name: name.startswith(tuple(f"{prefix}." for prefix in prefixes)))
    return prefixes


class Transfer(torch.nn.Module):
    """A network of which a part trains; it takes rows of the frozen front's output where there is a cut.

    The frozen part is always in evaluation mode, so that no batch-norm statistic of it moves.
    """

    def __init__(
        self, name: str, model: torch.nn.Module, trained: Sequence[str], cut: Cut | None, by_head: bool = False
    ) -> None:
        super().__init__()
        self.name, self.model, self.trained, self.by_head = name, model, trained, by_head
        self._cut = (cut,)  # not a submodule: its modules are the model's
        self.eval()

    @property
    def cut(self) -> Cut | None:
        """The cut, if there is one."""
        return self._cut[0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rows, or pictures where there is no cut, to logits (batch, classes); `by_head`, in training, to two of them.

        Else the mean of the class head and the distillation head is taken.
        """
        logits = self.model(inputs) if self.cut is None else self.cut.back(inputs.float())
        return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) and not self.training else logits

    def train(self, mode: bool = True) -> "Transfer":
        """Sets the trained part to training mode."""
        super().train(False)
        self.training = mode
        if self.by_head:
            self.model.training = mode  # its own flag alone: it then gives what both heads say
        for prefix in self.trained:
            self.model.get_submodule(prefix).train(mode)
        return self


def transfer(
    model: Any,
    options: ModelOptions,
    size: int,
    cached: bool,
    whole: bool = False,
    by_head: bool = False,
    together: bool = False,
) -> Transfer:
    """Freezes the model's front and cuts it off; the model is on its device already.

    `whole` is for weights that will be sharded: every block is called as a whole then, and without a cache the
    network is not cut. Without a cache, one that cannot be cut is not cut either. `together` lets the trained batch
    normalisations take their statistics over all processes.

    Raises:
        LabError: there is no such block; the network cannot be cut and should be `cached`; or it has no distillation
            token and should train `by_head`.
    """
    trained = unfreeze(model, options)
    if together:
        for prefix in trained:
            part = convert_sync_batchnorm(model.get_submodule(prefix))
            if prefix:
                model.set_submodule(prefix, part)
    model.eval()
    if by_head:
        if not hasattr(model, "head_dist"):
            raise LabError(f"--model {options.model}: has no distillation token; take one that has, such as "
                           "deit_tiny_distilled_patch16_224")  # fmt: skip
        model.set_distilled_training(True)
        model.training = True  # for the cut, which records what the forward does now
    cut = None
    if trained != ("",) and (cached or not whole):
        try:
            cut = Cut(model, trained, torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
        except LabError:
            if cached:
                raise
    if cut is not None and not whole:
        shorten_last_block(model, cut)
    return Transfer(options.model, model, trained, cut, by_head)


def shorten_last_block(model: Any, cut: Cut) -> None:
    """Computes the last block of a vision transformer only for the tokens that its head reads, where that is exact."""
    count = read_tokens(model)
    if not count:
        return
    name = f"blocks.{len(model.blocks) - 1}"
    block: Any = model.get_submodule(name)
    if can_be_shortened(block) and cut.calls(name):
        cut.replace(name, FirstTokens(block, count))


def input_size(model: torch.nn.Module, options: ModelOptions) -> int:
    """Side in pixels of the pictures that the network sees."""
    return options.image_size or int(resolve_model_data_config(model)["input_size"][-1])


def has_batch_norm(model: torch.nn.Module, trained: Sequence[str]) -> bool:
    """Whether a trained part normalises by the statistics of its batch."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(layer, kinds) for prefix in trained for layer in model.get_submodule(prefix).modules())
