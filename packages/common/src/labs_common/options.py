"""The options that mean the same in every lab, each with its help text and default.

A lab gathers these dataclasses in its own config. Nothing here imports torch, so `--help` stays fast.
"""

import ast
import importlib.util
import math
import operator
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

Schedule = Literal["cosine", "linear", "constant", "steps", "plateau"]
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


# The ends of an interval: in words, as a sign, and the comparison.
ENDS = {"[": ("at least", "<=", operator.le), "(": ("above", "<", operator.lt),
        "]": ("at most", "<=", operator.le), ")": ("below", "<", operator.lt)}  # fmt: skip
# Stands for infinity. Whole numbers: C's int holds no more, and NumPy's seeds little more. Others: no rate, weight or
# temperature is larger, and the product of four stays finite in float32.
LARGEST: dict[type, float] = {int: 2**31 - 1, float: 1e9}


def number(kind: type[int] | type[float], interval: str, *also: int | None, count: int = 1) -> Any:
    """Annotates a number with its bounds: `--help` shows them, the command line and `--config` are held to them.

    ```
    Share = Annotated[float, number(float, "[0, 1]")]
    ```

    `interval` is written as in mathematics: "(0, inf)" is above 0. `also` are further values: None, or a -1 that takes
    a default. With a `count` the option is a tuple of so many.
    """
    low, high = interval[1:-1].replace(" ", "").split(",")
    limited, name = high != "inf", kind.__name__.upper()
    low_word, low_sign, above = ENDS[interval[0]]
    high_word, high_sign, below = ENDS[interval[-1] if limited else "]"]
    least, most = float(low), float(high) if limited else LARGEST[kind]
    bounds = f"a {'whole ' if kind is int else ''}number {low_word} {low} and {high_word} {most:.10g}"
    bounds = ", or ".join([bounds, *map(str, also)])
    metavar = "|".join([*map(str, also), f"{low}{low_sign}{name}" + (f"{high_sign}{high}" if limited else "")])

    def read(said: str) -> int | float | None:
        if said == "None" and None in also:
            return None
        try:
            value = math.nan if "_" in said else kind(said)  # to Python, 1_000 is a number
        except ValueError:
            value = math.nan
        if value not in also and not (above(least, value) and below(value, most)):
            raise ValueError(f"must be {bounds}, not {reprlib.repr(said)}")
        return value

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=count, metavar=" ".join([metavar] * count), is_instance=lambda value: True,
        instance_from_str=lambda said: read(said[0]) if count == 1 else tuple(map(read, said)),
        str_from_instance=lambda value: [str(part) for part in (value if count > 1 else [value])],
    )  # fmt: skip


Count = Annotated[int, number(int, "[1, inf)")]
CountOrZero = Annotated[int, number(int, "[0, inf)")]
CountOrNone = Annotated[int | None, number(int, "[1, inf)", None)]
Share = Annotated[float, number(float, "[0, 1]")]
ShareBelowOne = Annotated[float, number(float, "[0, 1)")]
Positive = Annotated[float, number(float, "(0, inf)")]
NotNegative = Annotated[float, number(float, "[0, inf)")]


@dataclass
class RunOptions:
    """The directory of a run, its seed, and what it writes."""

    output: Path | None = None
    """Directory of this run; it must not exist yet. By default a new one under runs/."""
    resume: Path | None = None
    """Directory of an unfinished run to go on with, under its own config; options that would change it are refused."""
    config: Path | None = None
    """YAML file whose values take the place of the defaults; flags win. Every run writes one that is complete."""
    seed: CountOrZero = 0
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

    seeds: Count = 1
    """Runs of each, with seeds from --seed on: the table then has mean and spread."""
    seed: CountOrZero = 0
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
    port: Annotated[int, number(int, "[0, 65535]")] = 7860
    """Port to listen on."""


@dataclass
class TrainingOptions:
    """The optimization: steps, learning rate, precision, evaluations, checkpoints."""

    epochs: Count = 3
    """Passes over the training data."""
    max_steps: CountOrNone = None
    """Stop after this many optimizer steps, whatever --epochs says."""
    batch_size: Count = 32
    """Samples per optimizer step, over all processes together: the result does not depend on how many there are."""
    learning_rate: NotNegative = 1e-3
    """Highest learning rate, reached after the warm-up."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up: cosine or linear to zero, not at all, or in steps to a tenth after
    two thirds and a hundredth after eleven twelfths of all steps; plateau: times 0.6 after an evaluation without a new
    best."""
    warmup: Share = 0.03
    """Share of all steps over which the learning rate rises from zero."""
    warmup_from: ClassVar[float] = 0.0  # of the highest rate; a lab may make it an option
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: NotNegative = 1.0
    """Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward. auto is bf16 on a GPU that computes in it, fp16 on older GPUs (T4, V100), and
    fp32 on a CPU; fp32 on a GPU multiplies matrices in TF32."""
    compile: bool = False
    """Compile the network (torch.compile): for long runs on a GPU with batches of one shape."""
    evaluate_every: CountOrZero = 0
    """Optimizer steps between evaluations; 0 means once per epoch. There is always one at the end."""
    patience: CountOrZero = 0
    """Stop after this many evaluations without improvement and go back to the best weights; 0 never does."""
    save_every: Count = 200
    """Optimizer steps between checkpoints. Ctrl-C writes one as well."""
    keep: Count = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: Count = 1
    """Optimizer steps between looks at the loss, for which a GPU has to be waited for. Every step is logged; a loss
    that is no number, and Ctrl-C, are noticed up to so many steps later, and always before anything is saved."""


@dataclass
class PlanOptions:
    """The memory that a training would need."""

    plan: bool = False
    """Print what the training needs of memory and arithmetic and what fits, and stop; no weights are loaded."""
    gpu_memory: NotNegative = 0.0
    """--plan for a GPU of this many GB, such as 24; 0 is the machine that is here."""
    gpus: CountOrZero = 0
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
    """Pictures with captions: a directory of Flickr8k, Flickr30k, COCO (captions) or like them, Karpathy's
    dataset_*.json, .parquet or .tar (WebDataset) files, or a Hugging Face id. Without it, drawn scenes."""
    splits: Path | None = None
    """Directory with the official lists Flickr_8k.trainImages.txt, …devImages.txt and …testImages.txt; else splits are
    as the data say, or drawn by picture, 80/10/10."""
    limit: CountOrZero = 0
    """Take at most this many training pictures, and an eighth of that for validation and test each; 0 takes all."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures and captions that cannot be used: stop and name them, or leave them out and count them.
    Captions without a picture, up to one in a hundred, are left out in any case."""


@dataclass
class DecodingOptions:
    """The search for a caption by a trained model."""

    beam: Count = 3
    """Captions that are followed at once; 1 takes the most probable word each time."""
    length_penalty: NotNegative = 0.7
    """Beams are ranked by log-probability / words ** this; 0 prefers short captions."""
    no_repeat: CountOrZero = 0
    """No sequence of so many words occurs twice in a caption; 0 allows it."""
    top_p: Share = 0.0
    """Sample words from the most probable ones that together have this probability (nucleus); 0 does not sample."""
    temperature: Positive = 1.0
    """Sampling is bolder above 1, more careful below."""


@dataclass
class ClassDataOptions:
    """The pictures with classes."""

    data: str | None = None
    """CIFAR-10 (python batches or binary), a directory per class, .parquet files, or a Hugging Face id. Without it,
    drawn scenes."""
    validation_fraction: Annotated[float, number(float, "(0, 0.9)")] = 0.1
    """Share of the training pictures of every class set aside for validation, unless the data has its own; a test split
    is not looked at before the end."""
    test_fraction: Annotated[float, number(float, "(0, 0.9)")] = 0.1
    """Share set aside for the test if the data has no test split."""
    limit: CountOrZero = 0
    """Take at most this many pictures of every split, evenly over the classes; 0 takes all."""
    on_bad_data: OnBadData = "error"
    """What to do with pictures that cannot be used: stop and name them, or leave them out and count them."""


# A resumed run may change these; every other option would make it another run.
RESUME_MAY_CHANGE = frozenset(
    {"output", "resume", "config", "track", "report", "debug", "save_every", "keep", "log_every"}
)
