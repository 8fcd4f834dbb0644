"""What happens to files of models: an interrupted download, a hostile configuration, a tensor that is missing."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]  # done to a model's directory
# What names code of the model in its configurations; `evil` is the file that `hostile` writes.
OWN_CODE: dict[str, Any] = {"AutoTokenizer": ["evil.Model", None]}
OWN_CODE |= dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor"), "evil.Model")


def edited(file: str, **more: Any) -> Damage:
    """Adds keys to a JSON file."""

    def damage(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | more))

    return damage


def cut(file: str) -> Damage:
    """Takes the second half of a file away, as an interrupted download does."""
    return lambda folder: written(file, (folder / file).read_bytes()[: (folder / file).stat().st_size // 2])(folder)


def written(file: str, content: bytes) -> Damage:
    """Puts other bytes into a file."""
    return lambda folder: (folder / file).write_bytes(content)


def without(file: str, name: str) -> Damage:
    """Takes the tensors away whose names contain `name`."""

    def damage(folder: Path) -> None:
        kept = {key: tensor for key, tensor in load_file(folder / file).items() if name not in key}
        save_file(kept, folder / file, {"format": "pt"})

    return damage


def hostile(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Lays code into a model's directory, and says yes to whoever asks; returns the file that exists if it ran."""
    ran = folder.with_name("ran")
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Model: pass\n")
    patch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    return ran
