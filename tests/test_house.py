"""The numbers that the house holds: who imports whom, how much a command needs, how files and docstrings are written."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
LABS = ("caption_lab", "clip_lab", "llm_peft_fa", "vit_transfer", "zsi_contrastive")
FILES = {
    ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): file
    for source in sorted(ROOT.glob("packages/*/src"))
    for file in sorted(source.rglob("*.py"))
}
# Files of this house, without packages' own, that a training command imports.
MOST_FILES = {
    "caption_lab.train": 51, "clip_lab.train": 50, "llm_peft_fa.train": 52, "vit_transfer.train": 42,
    "zsi_contrastive.detector.train": 52, "zsi_contrastive.ssl.train": 42,
}  # fmt: skip


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imported(name: str) -> frozenset[str]:
    """The modules of this house that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found & FILES.keys())


def closure(name: str) -> set[str]:
    """Everything of this house that is read when a module is imported, the packages around it included."""
    seen: set[str] = set()
    coming = [name]
    while coming:
        module = coming.pop()
        if module not in seen:
            seen.add(module)
            coming += [*imported(module), *([package] if (package := module.rpartition(".")[0]) else [])]
    return seen


def test_no_lab_imports_another_and_the_core_imports_none() -> None:
    for name in FILES:
        others = {module.partition(".")[0] for module in imported(name)} - {name.partition(".")[0]}
        assert others <= {"labs_common"}, f"{name} imports {others}"


def test_there_is_no_circle() -> None:
    for name in FILES:
        back = {module for module in imported(name) if module != name and name in closure_without_packages(module)}
        assert not back, f"{name} and {back} import each other"


def closure_without_packages(name: str) -> set[str]:
    seen: set[str] = set()
    coming = [name]
    while coming:
        module = coming.pop()
        if module not in seen:
            seen.add(module)
            coming += imported(module)
    return seen


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_training_needs_few_files(name: str) -> None:
    files = {module for module in closure(name) if FILES[module].name != "__init__.py"}
    assert len(files) <= MOST_FILES[name], sorted(files)


def test_the_house_stays_small() -> None:
    """Signs, not goals; docs/architecture.md says where they stand and why. Who must raise one says what it bought."""
    lines = {name: file.read_text(encoding="utf-8").count("\n") for name, file in FILES.items()}
    assert len(lines) <= 207
    assert sum(lines.values()) <= 38_900
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top(name: str) -> None:
    """One inside a function says why in a comment on its line."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert "TYPE_CHECKING" not in "\n".join(lines)
    for function in ast.walk(tree(name)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    line = lines[node.lineno - 1]
                    above = lines[node.lineno - 2].strip()
                    assert "  # " in line or above.startswith(("# ", "import ", "from ")), (
                        f"{name}:{node.lineno}: {line}"
                    )


@pytest.mark.parametrize("name", FILES)
def test_docstrings_say_something(name: str) -> None:
    """A sentence with a verb, first in a public function's; and not a question without its mark."""
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            said = ast.get_docstring(node) or ""
            place = f"{name}:{getattr(node, 'lineno', 1)}: {said.splitlines()[0] if said else ''}"
            assert not re.match(r"(What|Which|Where|How|Why)\b(?!.*\?)", said), place
            if said and is_public_function(node):
                assert re.match(r"(?!This|Its)[A-Z][a-z-]*[^s\W]s\b(?!')", said), (
                    f"begin with a verb, such as Returns: {place}"
                )


def is_public_function(node: ast.AST) -> bool:
    """Those that do something: properties are named by what they are, and so their docstrings may be too."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
        return False
    return not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_every_package_is_typed_and_ships_no_tests() -> None:
    for name in (*LABS, "labs_common"):
        assert FILES[name].with_name("py.typed").exists()
    shipped = {file.parent.name for file in FILES.values()} | {file.stem for file in FILES.values()}
    assert not {name for name in shipped if name.startswith(("test", "conftest"))}


def test_what_runs_with_a_package_alone_needs_nothing_else() -> None:
    """A test with this mark that is skipped where an extra or a peer is missing would never run."""
    marked = 0
    for file in sorted(ROOT.glob("packages/*/tests/**/test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "mark.alone" in ast.unparse(one) for one in node.decorator_list
            ):
                assert "importorskip" not in ast.unparse(node), f"{file}: {node.name}"
                marked += 1
    assert marked > 20


# What loads models that others made, by name; their Python code must not run.
LOADERS = (
    "from_pretrained",
    "from_config",
    "get_tokenizer",
    "create_model_and_transforms",
    "create_model_from_pretrained",
)
THROUGH = ("load_auto", "load_network")


def bare_loads(source: str) -> list[str]:
    """The calls and mentions of other libraries' loaders that do not go through the core's, and unpickling."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    handed = {
        id(part) for call in calls if ast.unparse(call.func).rpartition(".")[2] in THROUGH
        for given in call.args[:1] for part in ast.walk(given)
    }  # fmt: skip
    found = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and id(node) not in handed
        and (node.attr in LOADERS or ast.unparse(node) == "open_clip.create_model")
    ]  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("open_clip", "open_clip.factory", "transformers"):
            found += [node for alias in node.names if alias.name in ("create_model", "get_tokenizer", "pipeline")]
    for call in calls:
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        loads = ast.unparse(call.func)
        if (loads == "torch.load" and said.get("weights_only") != "True") or loads in ("pickle.load", "pickle.loads"):
            found.append(call)
        if said.get("trust_remote_code", "False") != "False" or said.get("allow_pickle", "False") != "False":
            found.append(call)
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize(
    "file", [*FILES.values(), *sorted(ROOT.glob("benchmarks/**/*.py"))], ids=lambda file: file.stem
)
def test_models_of_others_are_loaded_by_the_core(file: Path) -> None:
    """By `load_auto` or `load_network` of `labs_common.saved`, which run no code that came with a model."""
    if file != FILES["labs_common.saved"]:
        assert bare_loads(file.read_text(encoding="utf-8")) == [], str(file)


def test_a_bare_load_is_found() -> None:
    for line in ("AutoModel.from_pretrained(name)", "load = transformers.AutoConfig.from_pretrained", "torch.load(file)",
                 "open_clip.create_model(name)", "partial(PeftModel.from_pretrained, base)", "pickle.load(stream)",
                 "from open_clip import create_model", "load_auto(read, AutoModel.from_pretrained(name))",
                 "read(name, trust_remote_code=True)", "np.load(file, allow_pickle=True)", "open_clip.get_tokenizer(n)",
                 "from transformers import pipeline", "AutoModel.from_config(config)"):  # fmt: skip
        assert bare_loads(line), line
    assert not bare_loads("load_auto(partial(PeftModel.from_pretrained, base), name); torch.load(f, weights_only=True)")
