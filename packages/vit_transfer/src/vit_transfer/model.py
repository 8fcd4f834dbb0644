"""The network: any timm model with a new head, and what of it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from timm.models.vgg import VGG

from labs_common.checkpoint import SHARDED
from labs_common.errors import LabError, reason_of
from labs_common.fitting import share_batch_norms
from labs_common.frozen.audit import train_only
from labs_common.frozen.cut import Cut
from labs_common.saved import read_weights, timm_arguments
from vit_transfer.catalogue import block_of, classifiers
from vit_transfer.config import TINY, ModelOptions
from vit_transfer.first_tokens import FirstTokens, can_be_shortened, read_tokens
from vit_transfer.tiny import tiny_model


class MlpHead(torch.nn.Sequential):
    """width -> hidden -> classes with a ReLU between."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


class PaperHead(torch.nn.Sequential):
    """The head of arXiv 2110.05270, section 3.5: flatten, width -> hidden, ELU, dropout, hidden -> classes.

    The paper prints a dropout of "0.5%"; notebooks of its second author have 0.5.
    """

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        layers = torch.nn.Linear(width, hidden), torch.nn.ELU(), torch.nn.Dropout(0.5), torch.nn.Linear(hidden, classes)
        super().__init__(torch.nn.Flatten(), *layers)


# `--head`: makes a head of (width, --head-width, classes); None keeps the linear one that timm makes.
HEADS: dict[str, Callable[[int, int, int], torch.nn.Module] | None] = {
    "linear": None,
    "mlp": MlpHead,
    "paper": PaperHead,
}


def create(options: ModelOptions, classes: int) -> torch.nn.Module:
    """Makes the network with a fresh head for `classes` classes; take the seed first.

    Raises:
        LabError: timm has no such model, or its weights cannot be had.
    """
    pretrained = options.pretrained and options.weights is None
    if options.model in TINY:
        model = tiny_model(options.model, classes, pretrained, options.image_size)
    else:
        model = _from_timm(options.model, classes, pretrained, options.image_size)
    if options.weights is not None:
        _load(model, options.weights)
    return _with_head(model, options.head, options.head_width)


def _from_timm(name: str, classes: int, pretrained: bool, image_size: int) -> torch.nn.Module:
    try:
        size = timm_arguments(name, image_size, "--model")
    except LabError as error:
        raise LabError(f"{error}; python -m vit_transfer.models lists some") from None
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **size)
    except Exception as error:  # downloads fail in many ways; everything else about the name has been checked
        raise LabError(
            f"--model {name}: cannot be made ({reason_of(error)}); check the network, or give --weights FILE or "
            "--no-pretrained"
        ) from error


def _load(model: torch.nn.Module, file: Path) -> None:
    """Loads everything but the head.

    Raises:
        LabError: the file is broken or of another architecture.
    """
    heads = tuple(f"{name}." for name in classifiers(model))
    own, given = (
        {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
        for state in (model.state_dict(), read_weights(file, "--weights"))
    )
    for name in own.keys() | given.keys():
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise LabError(f"--weights {file}: is of another architecture or image size (first difference: {name})")
    if not next(model.parameters()).is_meta:  # else it is only being checked
        model.load_state_dict(given, strict=False)


def _with_head(model: Any, head: str, hidden: int) -> torch.nn.Module:
    """Replaces the linear heads of a model; a VGG's two wide layers before its head are a part of it.

    Raises:
        LabError: its head is not linear.
    """
    made = HEADS[head]
    if made is None:
        return model
    for name in classifiers(model):
        own = model.get_submodule(name)
        # As a convolution of 1 x 1 it gets (batch, width, 1, 1), which only the paper's head makes flat.
        if not isinstance(own, torch.nn.Linear) and not (made is PaperHead and isinstance(own, torch.nn.Conv2d)):
            raise LabError(f"--head {head}: the head of this model is a {type(own).__name__}; take --head linear")
        width, classes = own.weight.shape[1], own.weight.shape[0]
        if made is PaperHead and isinstance(model, VGG):  # the paper's VGG ends with its convolutions
            model.set_submodule("pre_logits", torch.nn.Identity())
            width = model.num_features
        model.set_submodule(name, made(width, hidden, classes))
    return model


def _register(head: str) -> None:
    """Lets timm build a network with this head under the name that its saved config.json has, such as with_mlp_head.

    timm knows it after `import vit_transfer.model`. `base` is built without weights of its own: they would be
    replaced, and might have to be downloaded.
    """

    def with_head(
        pretrained: bool = False, pretrained_cfg: Any = None, base: str = "", hidden: int = 512, **others: Any
    ) -> torch.nn.Module:
        given = resolve_pretrained_cfg(architecture(head), pretrained_cfg=pretrained_cfg) if pretrained_cfg else None
        shown = given.to_dict() if given else {}
        own = {name: shown[name] for name in ("num_classes",) if name in shown}
        own |= {name: value for name, value in others.items() if value is not None}
        model: Any = _with_head(timm.create_model(base, pretrained=False, **own), head, hidden)
        if shown:
            model.pretrained_cfg = shown
        if pretrained:
            load_pretrained(model, num_classes=model.num_classes)
        return model

    with_head.__name__ = architecture(head)
    register_model(with_head)


def architecture(head: str) -> str:
    """Returns timm's name of a network with one of our heads."""
    return f"with_{head}_head"


for _name, _made in HEADS.items():
    if _made is not None:
        _register(_name)


class Transfer(torch.nn.Module):
    """A network of which a part trains; it takes rows of the frozen front's output where there is a cut.

    The frozen part is always in evaluation mode, so that no batch-norm statistic of it moves.

    Attributes:
        name: of the network, as --model has it.
        size: side in pixels of the pictures that it sees.
        trained: prefixes of the names of the parameters that train, "" for all.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        size: int,
        trained: Sequence[str],
        cut: Cut | None,
        by_head: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.model, self.size, self.trained, self.by_head = name, model, size, trained, by_head
        self._cut = (cut,)  # not a submodule: its modules are the model's
        self.eval()

    @property
    def cut(self) -> Cut | None:
        """The cut, if there is one."""
        return self._cut[0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Turns rows, or pictures where there is no cut, into logits (batch, classes).

        With `by_head`, training gets those of the class head and of the distillation head; else their mean is taken.
        """
        logits = self.model(inputs) if self.cut is None else self.cut.back(inputs.float())
        return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) and not self.training else logits

    def train(self, mode: bool = True) -> "Transfer":
        """Sets the trained part to training mode."""
        super().train(False)
        self.training = mode
        if self.by_head:
            self.model.training = mode  # its own flag alone: it then gives the logits of both heads
        for prefix in self.trained:
            self.model.get_submodule(prefix).train(mode)
        return self


def transfer(
    model: Any, options: ModelOptions, cached: bool, accelerator: Accelerator | None = None, by_head: bool = False
) -> Transfer:
    """Freezes the model's front and cuts it off; the model is on its device already.

    Without a cache, one that cannot be cut is left whole, and so is one whose weights the accelerator shards, as every
    block has to be called as a whole then. Trained batch norms take their statistics over the accelerator's GPUs.
    `by_head` gives the logits of both heads of a network with a distillation token in training.

    Raises:
        LabError: there is no such block; the network cannot be cut and should be `cached`; or it has no distillation
            token and should train `by_head`; or it takes no pictures of that size.
    """
    trained = unfreeze(model, options.unfreeze, options.block)
    sharded = accelerator is not None and accelerator.distributed_type in SHARDED
    if accelerator is not None:
        parts: Any = share_batch_norms(torch.nn.ModuleList(map(model.get_submodule, trained)), accelerator)
        for prefix, part in zip(trained, parts, strict=True):
            if prefix:
                model.set_submodule(prefix, part)
    model.eval()
    if by_head:
        if not hasattr(model, "head_dist"):
            raise LabError(
                f"--model {options.model}: has no distillation token; take one that has, such as "
                "deit_tiny_distilled_patch16_224"
            )
        model.set_distilled_training(True)
        model.training = True  # for the cut, which records what the forward does now
    cut, size = None, input_size(model, options.image_size)
    if next(model.parameters()).is_meta:  # it is only being checked, before a run begins
        try:
            model(torch.zeros(2, 3, size, size, device="meta"))
        except (AssertionError, RuntimeError) as error:
            said = f"{options.model} takes no such pictures ({reason_of(error)})"
            raise LabError(f"--image-size {size}: {said}") from error
    if trained != ("",) and (cached or not sharded):
        try:
            cut = Cut(model, trained, torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
        except LabError:
            if cached:
                raise
    if cut is not None and not sharded:
        _shorten_last_block(model, cut)
    return Transfer(options.model, model, size, trained, cut, by_head)


def unfreeze(model: torch.nn.Module, part: str, block: str | None) -> tuple[str, ...]:
    """Makes exactly the wanted part trainable; returns the prefixes of its parameters ("" for everything).

    Raises:
        LabError: there is no such block.
    """
    if part == "all":
        train_only(model, lambda name: True)
        return ("",)
    inside = block_of(model, block) if part == "block" else ()
    prefixes = (*inside, *(name for name in classifiers(model) if not f"{name}.".startswith(_under(inside))))
    # By the parameters and not by their names: one that several modules share has only the first one's.
    ours = {id(own) for prefix in prefixes for own in model.get_submodule(prefix).parameters()}
    names = {name for name, own in model.named_parameters() if id(own) in ours}
    train_only(model, names.__contains__)
    return prefixes


def _under(prefixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}." for prefix in prefixes)


def input_size(model: torch.nn.Module, image_size: int = 0) -> int:
    """Returns the side in pixels of the pictures that the network sees: `image_size`, or with 0 the network's own."""
    return image_size or int(resolve_model_data_config(model)["input_size"][-1])


def _shorten_last_block(model: Any, cut: Cut) -> None:
    """Computes the last block of a vision transformer only for the tokens that its head reads, where that is exact."""
    count = read_tokens(model)
    if not count:
        return
    name = f"blocks.{len(model.blocks) - 1}"
    block: Any = model.get_submodule(name)
    if can_be_shortened(block) and cut.calls(name):
        cut.replace(name, FirstTokens(block, count))
