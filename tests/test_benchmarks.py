"""Benchmarks are run by hand; here, that each can be imported and that its options, as written anywhere, exist."""

import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import tyro
from test_entry_points import ROOT

SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name not in ("__main__.py", "memory.py"))
SHOWN = re.compile(r"python benchmarks/(\w+\.py)((?:[ ]+[\w./'-]+)*)")
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *SCRIPTS]


def test_no_script_hides_a_module_of_python() -> None:
    """A script's directory comes first where modules are looked for."""
    assert not {path.stem for path in SCRIPTS} & sys.stdlib_module_names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_its_options_exist(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    options = imported(script, monkeypatch).Options
    rounds = imported(script.parent / "__main__.py", monkeypatch)
    asked = [shlex.split(benchmark.arguments) for benchmark in rounds.BENCHMARKS if benchmark.script == script.name]
    assert asked, "the rounds of all benchmarks have it"
    for text in TEXTS:
        for name, arguments in SHOWN.findall(text.read_text(encoding="utf-8")):
            if name == script.name:
                asked.append(arguments.split())
    for arguments in asked:
        tyro.cli(options, args=arguments)


def imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, under a name that hides no other."""
    name = f"benchmark_{script.stem.strip('_')}"
    spec = spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
