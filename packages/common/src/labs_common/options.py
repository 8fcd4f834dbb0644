"""The options that mean the same in every lab, each with its help text and default.

A lab gathers these dataclasses in its own config. Nothing here imports torch, so `--help` stays fast.
"""

import ast
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from labs_common.errors import LabError

Schedule = Literal["cosine", "linear", "constant", "steps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "none"]
OnBadData = Literal["error", "skip"]
RowPrecision = Literal["bf16", "fp16", "fp32"]


def names_in(table: str) -> tuple[str, ...]:
    """Reads the keys of the dictionary `table` ("package.module:NAME") from its module's source, without importing it.

    So a choice is registered in one place, beside its function, and `--help` lists it without importing torch.

    Raises:
        ValueError: there is no such dictionary, or it is not written out with its keys.
    """
    module, _, name = table.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{table}: no such module")
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                if not all(isinstance(key, ast.Constant) for key in node.value.keys):
                    break  # computed, or taken over from another dictionary
                return tuple(ast.literal_eval(key) for key in node.value.keys if key is not None)
    raise ValueError(f"{table}: no dictionary with its keys written out")


def one_of(table: str) -> Any:
    """Annotates an option whose choices are the keys of a table.

    ```
    Objective = Annotated[str, one_of("clip_lab.losses:OBJECTIVES")]
    ```
    """
    names = names_in(table)
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="{" + ",".join(names) + "}", choices=names, instance_from_str=lambda said: said[0],
        is_instance=lambda value: value in names, str_from_instance=lambda value: [value],
    )  # fmt: skip


@dataclass
class RunOptions:
    """The directory of a run, its seed, and what it writes."""

    output: Path | None = None
    """Directory of this run; it must not exist yet. By default a new one under runs/."""
    resume: Path | None = None
    """Directory of an unfinished run to go on with, under its own config; options that would change it are refused."""
    config: Path | None = None
    """YAML file whose values take the place of the defaults; flags win. Every run writes one that is complete."""
    seed: int = 0
    """Seed of everything random: same seed, same result."""
    track: Tracker = "tensorboard"
    """Where curves go besides the report."""
    report: bool = True
    """Write report.html at the end."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""


@dataclass
class CommandOptions:
    """The options of every command that makes no run."""

    config: Path | None = None
    """YAML file whose values take the place of the defaults; flags win."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""


@dataclass
class ComparisonOptions:
    """The options of every command that compares several runs."""

    seeds: int = 1
    """Runs of each, with seeds from --seed on: the table then has mean and spread."""
    seed: int = 0
    """Seed of the first run of each."""
    launch: Path | None = None
    """Accelerate configuration with which each run is launched, for several GPUs."""
    output: Path | None = None
    """Directory of the comparison; by default one under runs/ that the options name, so that the same command finds it
    again."""
    config: Path | None = None
    """YAML file whose values take the place of the defaults; flags win."""
    debug: bool = False
    """Show the traceback of an error instead of one line."""


@dataclass
class PageOptions:
    """The address of a page for the browser."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""


@dataclass
class TrainingOptions:
    """The optimization: steps, learning rate, precision, evaluations, checkpoints."""

    epochs: int = 3
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever --epochs says."""
    batch_size: int = 32
    """Samples per optimizer step, over all processes together: the result does not depend on how many there are."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up: cosine or linear to zero, not at all, or in steps to a tenth after
    two thirds and a hundredth after eleven twelfths of all steps."""
    warmup: float = 0.03
    """Share of all steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward. auto is bf16 on a GPU that computes in it, fp16 on older GPUs (T4, V100), and
    fp32 on a CPU; fp32 on a GPU multiplies matrices in TF32."""
    compile: bool = False
    """Compile the network (torch.compile): for long runs on a GPU with batches of one shape."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations; 0 means once per epoch. There is always one at the end."""
    patience: int = 0
    """Stop after this many evaluations without improvement and go back to the best weights; 0 never does."""
    save_every: int = 200
    """Optimizer steps between checkpoints. Ctrl-C writes one as well."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 1
    """Optimizer steps between looks at the loss, for which a GPU has to be waited for. Every step is logged; a loss
    that is no number, and Ctrl-C, are noticed up to so many steps later, and always before anything is saved."""


@dataclass
class PlanOptions:
    """The memory that a training would need."""

    plan: bool = False
    """Print what the training needs of memory and arithmetic and what fits, and stop; no weights are loaded."""
    gpu_memory: float = 0.0
    """--plan for a GPU of this many GB, such as 24; 0 is the machine that is here."""
    gpus: int = 0
    """--plan for so many GPUs; 0 takes the number of --plan-launch, or of the launch under way."""
    plan_launch: Path | None = None
    """--plan under this Accelerate configuration, such as launch/fsdp.yaml; no process is started."""


@dataclass
class CacheOptions:
    """The cache of what the frozen part computes."""

    cache: bool = True
    """Compute what the frozen part makes of each sample once and keep it on disk; --no-cache computes it in every
    epoch."""
    boundary_precision: RowPrecision = "bf16"
    """Precision in which the frozen part hands over its output, cached or not."""


@dataclass
class CaptionDataOptions:
    """The pictures with captions."""

    data: str | None = None
    """Flickr8k or a directory like it: pictures with captions.txt (image,caption) or Flickr8k.token.txt. Without it,
    drawn scenes with captions."""
    splits: Path | None = None
    """Directory with the official lists Flickr_8k.trainImages.txt, …devImages.txt and …testImages.txt; else splits are
    drawn by picture, 80/10/10."""
    limit: int = 0
    """Take at most this many training pictures, and an eighth of that for validation and test each; 0 takes all."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures and captions that cannot be used: stop and name them, or leave them out and count
    them."""


@dataclass
class ClassDataOptions:
    """The pictures with classes."""

    data: str | None = None
    """CIFAR-10 (python batches or binary), a directory per class, .parquet files, or a Hugging Face id. Without it,
    drawn scenes."""
    validation_fraction: float = 0.1
    """Share of the training pictures of every class set aside for validation, unless the data has its own; a test split
    is not looked at before the end."""
    test_fraction: float = 0.1
    """Share set aside for the test if the data has no test split."""
    limit: int = 0
    """Take at most this many pictures of every split, evenly over the classes; 0 takes all."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures that cannot be used: stop and name them, or leave them out and count them."""


# A resumed run may change these; every other option would make it another run.
RESUME_MAY_CHANGE = frozenset(
    {"output", "resume", "config", "track", "report", "debug", "save_every", "keep", "log_every"}
)

# The least and the most of each number of a training; None stands for no limit.
RANGES: dict[str, tuple[float, float | None]] = {
    "epochs": (1, None),
    "max_steps": (1, None),
    "batch_size": (1, None),
    "learning_rate": (0, None),
    "warmup": (0, 1),
    "weight_decay": (0, None),
    "clip_norm": (0, None),
    "evaluate_every": (0, None),
    "patience": (0, None),
    "save_every": (1, None),
    "keep": (1, None),
    "log_every": (1, None),
}


def check_training_options(options: TrainingOptions) -> None:
    """Makes sure that each number can be worked with.

    Raises:
        LabError: one is out of its range, or is no number; the message names the option.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(options, name)
        if value is None:  # --max-steps, which is not asked for
            continue
        if not (math.isfinite(value) and least <= value and (most is None or value <= most)):
            said = f"at least {least}" if most is None else f"between {least} and {most}"
            raise LabError(f"--{name.replace('_', '-')} {value}: must be {said}")
