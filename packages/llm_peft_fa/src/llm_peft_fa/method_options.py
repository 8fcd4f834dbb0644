"""The options of every fine-tuning method, what each method takes, and the values it takes by itself."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from labs_common.errors import LabError

Method = Literal[
    "prompt_tuning", "prefix_tuning", "p_tuning",
    "lora", "rslora", "dora", "pissa", "olora", "adalora", "vera", "loha", "lokr", "oft", "ia3", "qlora",
    "layers", "full",
]  # fmt: skip
PromptInit = Literal["random", "text", "vocabulary"]
Which = Literal["first", "last", "both"]

SOFT_PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")
WITHOUT_PEFT = ("layers", "full")


@dataclass
class MethodOptions:
    """What is fine-tuned. An option that is not given has the method's own default; the run's config.yaml tells it."""

    method: Method = "lora"
    """Soft prompts: prompt_tuning, prefix_tuning, p_tuning. Low-rank and other small updates: lora, rslora, dora,
    pissa, olora, adalora, vera, loha, lokr, oft, ia3, qlora (4-bit base). Without PEFT: layers, full."""
    rank: int | None = None
    """LoRA family: rank of the update; of adalora, the mean rank at the end."""
    alpha: float | None = None
    """LoRA family: the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))."""
    dropout: float | None = None
    """LoRA family and oft: dropout before the update, in training."""
    target_modules: tuple[str, ...] | None = None
    """LoRA family, oft, ia3: names of the layers to adapt, such as q_proj v_proj; all-linear is every linear layer but
    the vocabulary's."""
    block_size: int | None = None
    """oft: width of the rotated blocks; it must divide the layers' input widths."""
    virtual_tokens: int | None = None
    """Soft prompts: how many virtual tokens stand before each conversation."""
    prompt_init: PromptInit | None = None
    """prompt_tuning: random, text (the embeddings of --prompt-text) or vocabulary (of random tokens). prefix_tuning:
    random, or text (the keys and values that the base computes for --prompt-text)."""
    prompt_text: str | None = None
    """The text of --prompt-init text, repeated or cut to --virtual-tokens."""
    encoder_width: int | None = None
    """p_tuning, prefix_tuning: width of the network that makes the virtual tokens in training. 0: prefix_tuning without
    projection, p_tuning with the model's width."""
    layers: int | None = None
    """layers: how many decoder layers train at each end."""
    which: Which | None = None
    """layers: which end trains: first, last or both."""
    train_embeddings: bool = False
    """layers: train the token embeddings too."""
    train_final_norm: bool = False
    """layers: train the final norm too."""
    train_head: bool = False
    """layers: train the vocabulary projection too."""


TEXT = "تو دستیار فارسی‌زبان هستی و به هر پرسش کوتاه و درست پاسخ می‌دهی."
_LOW_RANK = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ("all-linear",)}

# What each method takes, with its defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"virtual_tokens": 20, "prompt_init": "text", "prompt_text": TEXT},
    "prefix_tuning": {"virtual_tokens": 20, "prompt_init": "text", "prompt_text": TEXT, "encoder_width": 0},
    "p_tuning": {"virtual_tokens": 20, "encoder_width": 0},
    "lora": _LOW_RANK,
    "rslora": _LOW_RANK,
    "dora": _LOW_RANK,
    "pissa": _LOW_RANK,
    "olora": _LOW_RANK,
    "adalora": _LOW_RANK,
    "vera": {"rank": 256, "dropout": 0.0, "target_modules": ("all-linear",)},
    "loha": _LOW_RANK,
    "lokr": _LOW_RANK,
    "oft": {"block_size": 32, "dropout": 0.0, "target_modules": ("all-linear",)},
    "ia3": {"target_modules": ("k_proj", "v_proj", "down_proj")},
    "qlora": _LOW_RANK,
    "layers": {
        "layers": 2, "which": "both", "train_embeddings": False, "train_final_norm": False, "train_head": False,
    },
    "full": {},
}  # fmt: skip

# Highest learning rates: with the tiny base, and with a real one of some billion parameters.
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "prompt_tuning": (3e-1, 1e-2),
    "prefix_tuning": (2e-1, 1e-2),
    "p_tuning": (2e-2, 1e-3),
    "lora": (2e-3, 2e-4),
    "rslora": (1e-3, 1e-4),
    "dora": (2e-3, 2e-4),
    "pissa": (1e-3, 1e-4),
    "olora": (1e-3, 1e-4),
    "adalora": (1e-2, 1e-3),
    "vera": (5e-2, 5e-3),
    "loha": (5e-3, 5e-4),
    "lokr": (1e-2, 1e-3),
    "oft": (3e-3, 5e-4),
    "ia3": (1e-1, 5e-3),
    "qlora": (2e-3, 2e-4),
    "layers": (1e-3, 2e-5),
    "full": (1e-3, 1e-5),
}


def resolved(options: MethodOptions) -> MethodOptions:
    """The options with the method's own defaults where none was given.

    Raises:
        LabError: an option was given that the method does not have, or options that contradict each other.
    """
    takes = DEFAULTS[options.method]
    given = {
        field.name: value
        for field in dataclasses.fields(options)
        if field.name != "method" and (value := getattr(options, field.name)) is not None and value is not False
    }
    for name in given:
        if name not in takes:
            known = ", ".join(_flag(option) for option in takes) or "none of the method options"
            has = [method for method in get_args(Method) if name in DEFAULTS[method]]
            raise LabError(f"{_flag(name)}: --method {options.method} takes {known}; it is of {', '.join(has)}")
    found = dataclasses.replace(options, **{name: given.get(name, value) for name, value in takes.items()})
    _check(found, given)
    if found.prompt_init not in (None, "text"):
        found.prompt_text = None
    return found


def _check(options: MethodOptions, given: dict[str, Any]) -> None:
    for name in ("rank", "block_size", "virtual_tokens", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise LabError(f"{_flag(name)} {value}: must be at least 1")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        raise LabError(f"--dropout {options.dropout}: must be from 0 to below 1")
    if "prompt_text" in given and options.prompt_init != "text":
        raise LabError(f"--prompt-text: is used by --prompt-init text only, not by {options.prompt_init}")
    if options.method == "prefix_tuning":
        if options.prompt_init == "vocabulary":
            raise LabError("--prompt-init vocabulary: is of prompt_tuning; prefix_tuning takes random or text")
        if options.encoder_width:
            if "prompt_init" in given and options.prompt_init == "text":
                raise LabError(
                    "--prompt-init text: the projection of --encoder-width cannot be started from a real prefix; "
                    "take --prompt-init random or --encoder-width 0"
                )
            options.prompt_init = "random"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
