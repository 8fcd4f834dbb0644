"""Walks every command of every lab that is installed: the same words, and the same answers to what is wrong."""

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from labs_testing.commands import here

from labs_common.cli import command_of

ROOT = Path(__file__).parents[1]
LABS = ("caption_lab", "clip_lab", "llm_peft_fa", "vit_transfer", "zsi_contrastive")
# What the help of each flag says, in every command that has it. DESIGN names them; the others came with time.
SHARED = {
    "data": r"\S",
    "model": r"\S",
    "output": r"Directory ",
    "seed": r"Seed of ",
    "epochs": r"Passes over the training ",
    "max_steps": r"Stop after this many optimizer steps, whatever --epochs says\.$",
    "batch_size": r"(\w+ per optimizer step, over all processes together|Pictures at once)",
    "learning_rate": r"Highest learning rate",
    "schedule": r"How the learning rate falls after the warm-up: cosine or linear to zero, not at all, or in steps",
    "warmup": r"Share of all steps over which the learning rate rises from zero\.$",
    "weight_decay": r"AdamW's decoupled weight decay",
    "clip_norm": r"Gradients with a larger L2 norm are scaled down to it; 0 turns clipping off",
    "precision": r"Arithmetic of forward and backward\. auto is bf16 on a GPU that computes in it, fp16 on older",
    "evaluate_every": r"Optimizer steps between evaluations; 0 m",
    "patience": r"Stop after this many evaluations without improvement and go back to the best weights; 0 never does\.$",
    "save_every": r"Optimizer steps between checkpoints\. Ctrl-C writes one as well\.( -1: once per epoch|$)",
    "keep": r"How many of the newest checkpoints stay on disk\.$",
    "resume": r"Directory of an unfinished run to go on with, under its own config; options that would change it are",
    "config": r"YAML file whose values take the place of the defaults; flags win\.",
    "report": r"Write report\.html at the end\.$",
    "debug": r"Show the traceback of an error instead of one line\.$",
    "track": r"Where curves go besides the report\.$",
    "on_bad_data": r"What to do with ",
    "limit": r"Take at most this many ",
    "seeds": r"Runs of each, with seeds from --seed on: the table then has mean and spread\.$",
    "launch": r"Accelerate configuration with which each run is launched, for several GPUs\.$",
    "host": r"Address to listen on; 0\.0\.0\.0 lets other machines in\.$",
    "port": r"Port to listen on\.$",
}
# Flags that every training command has.
TRAINING = {
    "data", "output", "seed", "epochs", "max_steps", "batch_size", "learning_rate", "precision", "resume", "config",
    "report", "debug", "track", "save_every", "keep", "patience",
}  # fmt: skip
# What no option takes for a number, nor for one of its choices.
NO_NUMBERS = ("magic", "", "nan", "inf", "-inf", "1e400", "-1e400", "1" + 30 * "0", "1_000", "0x10", "-7", "9" * 5000)
# Words that are no jargon: they stand for what the user fills in, or everybody knows them.
PLAIN = {"NAME", "NAME-1", "DIRECTORY", "SPLIT", "JSON", "YAML", "CSV", "PNG", "HTML", "CPU", "GPU", "GPUs"}
# Words of the field without capitals.
FIELD = ("logits", "beam", "adapter", "tokenizer", "zero-shot", "few-shot", "warm-up", "dropout", "checkpoint",
         "fine-tun", "soft prompt", "embedding", "backbone", "perplexity", "top-p", "kNN", "linear probe")  # fmt: skip


def modules() -> Iterator[str]:
    """Every module that is run with `python -m`."""
    for lab in LABS:
        if importlib.util.find_spec(lab) is None:
            continue
        package = importlib.import_module(lab)
        for found in pkgutil.iter_modules(package.__path__):
            source = Path(package.__path__[0], f"{found.name}.py")
            if source.exists() and 'if __name__ == "__main__"' in source.read_text(encoding="utf-8"):
                yield f"{lab}.{found.name}"


MODULES = list(modules())
every_command = pytest.mark.parametrize("module", MODULES)


def config_type(module: str) -> type:
    """The dataclass that the command's options fill."""
    kind: type = command_of(module).args[1]
    return kind


def helps(config: type) -> dict[str, str]:
    """The help text of every flag."""
    said: dict[str, str] = {}
    for origin in reversed(config.__mro__):
        if dataclasses.is_dataclass(origin):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(origin))).body
            assert isinstance(body, ast.ClassDef)
            for name, text in zip(body.body, body.body[1:], strict=False):
                if (
                    isinstance(name, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    said[ast.unparse(name.target)] = " ".join(str(text.value.value).split())
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        kind = typing.get_type_hints(config)[field.name]
        found |= helps(kind) if dataclasses.is_dataclass(kind) else {field.name: said.get(field.name, "")}
    return found


def test_all_labs_are_walked() -> None:
    if any(importlib.util.find_spec(lab) is None for lab in LABS):
        pytest.skip("a lab is not installed here")
    assert len(MODULES) >= 32
    assert {module.partition(".")[0] for module in MODULES} == set(LABS)


# Prints what `python -m MODULE --help` says for each, the CPU seconds that each took, and what was imported of the large
# libraries: in one process, as the first of a lab's commands imports what the others need.
HELP = """
import contextlib, io, json, runpy, sys, time
_, *modules = sys.argv
said, seconds, before = {}, {}, 0.0
for module in modules:
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    said[module], now = out.getvalue(), time.process_time()
    seconds[module], before = now - before, now
large = [name for name in ("torch", "transformers", "timm", "datasets", "matplotlib") if name in sys.modules]
print(json.dumps([said, seconds, large]))
"""


@pytest.mark.parametrize("lab", LABS)
def test_help_is_fast_and_teaches(lab: str) -> None:
    """Under 1.5 seconds of computing, whatever else the machine does."""
    modules = [module for module in MODULES if module.startswith(f"{lab}.")]
    if not modules:
        pytest.skip("the lab is not installed here")
    done = subprocess.run([sys.executable, "-c", HELP, *modules], capture_output=True, text=True, check=True)
    said, seconds, large = json.loads(done.stdout)
    assert max(seconds.values()) < 1.5, seconds
    assert not large, "no command loads the large libraries before it knows what to do"
    for module in modules:
        assert f"python -m {module}" in said[module]


@every_command
def test_help_says_the_same_everywhere(module: str) -> None:
    config = config_type(module)
    said = helps(config)
    assert all(said.values()), f"without help: {[name for name, text in said.items() if not text]}"
    for name, text in said.items():
        assert re.match(SHARED.get(name, ""), text), f"--{name}: {text}"
    assert {"config", "debug"} <= said.keys()
    if "resume" in said:
        assert said.keys() >= TRAINING - ({"patience"} if module.endswith(".attack") else set())


@every_command
def test_jargon_is_explained(module: str) -> None:
    """Each abbreviation and each word of the field in a help text stands in the glossary."""
    config = config_type(module)
    text = " ".join([config.__doc__ or "", *helps(config).values()])
    words = set(re.findall(r"\b[A-Za-z]*[A-Z][A-Za-z]*[A-Z][A-Za-z0-9-]*\b", text)) - PLAIN
    words |= {word for word in FIELD if word in text}
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").lower()
    missing = sorted(word for word in words if word.lower().removesuffix("s") not in glossary)
    assert not missing, "explain them in docs/glossary.md"


@every_command
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--no-such-option", "1"), "--no-such-option"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--config", "{other}"), "no-such-option"),
        (("--config",), "--config"),
    ],
)
def test_wrong_options_are_one_line(module: str, arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("no_such_option: 1\n")
    done = here(module, *(argument.format(other=other) for argument in arguments), code=2)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert named in done.stderr


def numbers(kind: typing.Any) -> bool:
    """Says whether a type is of numbers: int, float | None, tuple[float, float], with bounds or without."""
    return kind in (int, float) or any(map(numbers, typing.get_args(kind)))


@every_command
def test_every_number_has_bounds(module: str) -> None:
    """No numeric option takes what is no number or beyond all measure; each says what it takes, in --help too."""
    for name, kind in kinds(config_type(module)).items():
        if numbers(kind):
            (bounds,) = getattr(kind, "__metadata__", ("none",))
            assert not isinstance(bounds, str), f"--{name}: say what it may be, as Count of labs_common.options does"
            assert "<" in bounds.metavar
            for wrong in NO_NUMBERS:
                with pytest.raises(ValueError, match=r"must be a .*number .* and "):
                    bounds.instance_from_str([wrong] * bounds.nargs)


@pytest.mark.skipif(not MODULES, reason="no lab is installed here")
def test_wrong_values_are_one_line() -> None:
    """Every number and every choice, once for each name and type: what several commands share is one field."""
    asked = {(name, str(kind)): module for module in MODULES for name, kind in kinds(config_type(module)).items()
             if numbers(kind) or typing.get_origin(kind) in (typing.Literal, typing.Annotated)}  # fmt: skip
    wrong = itertools.cycle(NO_NUMBERS)
    for (name, kind), module in asked.items():
        flag = f"--{name.replace('_', '-')}"
        values = [next(wrong)] * (2 if "tuple[float" in kind else 1)
        done = here(module, flag, *values, code=2)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert flag in done.stderr


@every_command
def test_output_is_never_overwritten_silently(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "output" not in helps(config_type(module)):
        pytest.skip("the command has no --output")
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "output" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = here(module, "--output", mine.parent, code=2)
    assert len(done.errors) == 1
    assert "--output" in done.errors[0]
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "output"]


def kinds(config: type) -> dict[str, typing.Any]:
    """The type of every flag."""
    found: dict[str, typing.Any] = {}
    for name, kind in typing.get_type_hints(config, include_extras=True).items():
        if name in {field.name for field in dataclasses.fields(config)}:
            found |= kinds(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return found


@pytest.mark.parametrize("lab", LABS)
def test_console_scripts_are_the_commands(lab: str) -> None:
    """Every command has its script, and every script its command."""
    if importlib.util.find_spec(lab) is None:
        pytest.skip("the lab is not installed here")
    scripts = {
        script.name: script.value
        for script in importlib.metadata.distribution(lab.replace("_", "-")).entry_points
        if script.group == "console_scripts"
    }
    wanted = {
        name.replace(".", "-").replace("_", "-"): ":".join(name.rsplit(".", 1)).replace(":", ".commands:")
        for name in MODULES
        if name.startswith(f"{lab}.")
    }
    assert scripts == wanted
