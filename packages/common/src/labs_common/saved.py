"""Results on disk and weights from files: saved in one move, loaded with one line for whatever is wrong with them.

A lab's `saved.py` says what its model is made of (a JSON file) and builds the model from that; this does the rest.
"""

import difflib
import importlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from labs_common.errors import LabError, json_of, reason_of
from labs_common.run import written_whole

FOLDER, WEIGHTS = "model", "model.safetensors"  # of a run's result, and in it
NAMED = 5  # how many tensors an error names
_LOADING = threading.RLock()


def save_model(
    folder: Path,
    file: str,
    description: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    more: Callable[[Path], object] | None = None,
    weights: str = WEIGHTS,
) -> None:
    """Writes a model to the directory `folder` in one move: `file` (JSON), the weights, and what `more` adds.

    `description` is all that `load_model` needs to build the model; `state` are its weights by name, which may be
    sharded in the model itself; `more` gets the directory while it is written (a tokenizer, say); `weights` names the
    file of weights.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_whole(folder) as part:
        save_file(kept, part / weights, {"format": "pt"})
        (part / file).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if more is not None:
            more(part)


def load_model(
    path: Path,
    file: str,
    option: str,
    build: Callable[[dict[str, Any], dict[str, torch.Tensor]], torch.nn.Module],
) -> tuple[Any, dict[str, Any], Path]:
    """Loads what `save_model` wrote, from a finished run or from the directory itself.

    `build` makes the model out of its description and, where it needs them, its weights; these are then loaded, all of
    them. Messages name `option`, which gave the path. Returns the model in evaluation mode with nothing that trains,
    the description, and the directory.

    Raises:
        LabError: nothing is there, or it is broken.
    """
    folder = saved_folder(path, (file, WEIGHTS), option)
    with reading_model(path, option):
        description = json.loads((folder / file).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        model = build(description, state)
        model.load_state_dict(state)
    return model.requires_grad_(False).eval(), description, folder


def timm_arguments(name: str, size: int, option: str) -> dict[str, Any]:
    """Returns the arguments with which `timm.create_model` makes a network for pictures of `size` (0: its own).

    Raises:
        LabError: timm has no such network; similar names are listed.
    """
    # This neither saves nor loads. It stands here because a network is built from its timm name both for training and
    # for loading, with the same arguments, in four labs; a module of its own would hold nothing else.
    import timm  # the labs that call this depend on it; the core does not

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain.split(".")[0]):
        like = difflib.get_close_matches(plain, timm.list_models(), 4)
        hint = f"; like it are {', '.join(like)}" if like else ""
        raise LabError(f"{option} {name}: timm has no such model{hint}")
    known = timm.get_pretrained_cfg(plain, allow_unregistered=True)
    fixed = known is not None and known.fixed_input_size
    return {"img_size": size} if size and fixed else {}


def read_weights(file: Path, option: str) -> dict[str, torch.Tensor]:
    """Reads the tensors of a .safetensors file.

    Raises:
        LabError: the file cannot be read.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError("is no file")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise LabError(f"{option} {file}: cannot be read ({reason_of(error)})") from error


def load_exactly(network: torch.nn.Module, state: Mapping[str, torch.Tensor], said: str) -> None:
    """Gives the network its weights from `state`, which may hold more, such as a classifier.

    Raises:
        LabError: one is missing or has another shape; `said` names where they are from.
    """
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            raise LabError(f"{said}: is of another architecture or image size (first difference: {name})")
    network.load_state_dict({name: state[name] for name in own})


def saved_folder(path: Path, names: Sequence[str], option: str) -> Path:
    """Finds the files `names` of a saved model: under `model/` of a finished run, or in the directory itself.

    Raises:
        LabError: they are not there; the message names `option`.
    """
    for folder in (path / FOLDER, path):
        if all((folder / name).is_file() for name in names):
            return folder
    there = "holds no trained model; name a finished run" if path.is_dir() else "no such directory"
    raise LabError(f"{option} {path}: {there}")


@contextmanager
def reading_model(path: Path, option: str) -> Iterator[None]:
    """Turns errors from reading and building a saved model into one line.

    Raises:
        LabError: instead of what reading and building raise.
    """
    try:
        yield
    except LabError:
        raise
    except Exception as error:  # a damaged description can fail anywhere in the code that builds from it
        raise LabError(f"{option} {path}: the model cannot be read ({reason_of(error)})") from error


def load_auto(load: Callable[..., Any], *given: Any, said: str, remedy: str, **more: Any) -> Any:
    """Loads with a function of transformers, PEFT or open_clip, such as `AutoTokenizer.from_pretrained`.

    Code that came with a model never runs: nobody is asked whether it may, and no file of the model can allow it. A
    model of a type that the library knows loads as the library's own class. `said` (option and value) begins messages,
    `remedy` ends them.

    Raises:
        LabError: the model needs code of its own, or its files are missing or broken; the file is named.
    """
    # The labs that load such models depend on transformers; the core does not.
    modules: Any = importlib.import_module("transformers.dynamic_module_utils")
    # A directory, a hub id or a configuration.
    source = str(given[0]).removeprefix("local-dir:") if isinstance(given[0], (str, Path)) else None
    if source:
        _check_shards(Path(source), said, remedy)
    if getattr(getattr(load, "__self__", None), "__name__", "").startswith("Auto"):
        more["trust_remote_code"] = False
    # That says nothing to the calls that a library makes itself: for a configuration inside another, a tower, a
    # prompt's tokenizer. These are the seconds in which to answer, with 0 nobody is asked, and what fetches the code.
    with _LOADING:
        before = modules.TIME_OUT_REMOTE_CODE, modules.get_cached_module_file
        modules.TIME_OUT_REMOTE_CODE, modules.get_cached_module_file = 0, _refused
        try:
            return load(*given, **more)
        except Exception as error:  # damaged files can fail anywhere in the code that builds from them
            if closed := _closed(error, source):
                raise LabError(f"{said}: {closed}") from error
            if "trust_remote_code" in str(error):
                reason = "needs Python code of its own, which is never run"
            else:
                broken = _broken_file(Path(source)) if source else ""
                reason = f"cannot be loaded ({broken or reason_of(error)[:300]})"
            raise LabError(f"{said}: {reason}; {remedy}") from error
        finally:
            modules.TIME_OUT_REMOTE_CODE, modules.get_cached_module_file = before


def load_network(
    auto: Any,
    source: str,
    said: str,
    remedy: str,
    new: tuple[str, ...] = (),
    missing: list[str] | None = None,
    **more: Any,
) -> Any:
    """Loads a network with `auto.from_pretrained`, all of its weights, from safetensors; see `load_auto`.

    Tensors whose names begin as one of `new` may be missing, and are random then: `missing` gets their names. So may
    those that are tied to others, which the library knows.

    Raises:
        LabError: as `load_auto`; or tensors are missing, which would be random.
    """
    network, info = load_auto(
        auto.from_pretrained, source, said=said, remedy=remedy, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True, **more,
    )  # fmt: skip
    if lacking := sorted(name for name in info["missing_keys"] if not name.startswith(new)):
        raise LabError(f"{said}: its files lack {named(lacking)}, which would be random; {remedy}")
    if missing is not None:
        missing += info["missing_keys"]
    if other := sorted(name for name, *_ in info["mismatched_keys"]):
        raise LabError(f"{said}: its configuration has another shape for {named(other)}; {remedy}")
    return network


def named(tensors: Sequence[str]) -> str:
    """Lists the first names, and says how many more there are."""
    more = f" and {len(tensors) - NAMED} more tensors" if len(tensors) > NAMED else ""
    return ", ".join(tensors[:NAMED]) + more


def _refused(*given: Any, **more: Any) -> str:
    raise ValueError("trust_remote_code: a model's code is never run")


def _closed(error: BaseException | None, source: str | None) -> str:
    """Says how to get what the hub does not give; empty if the error is of something else."""
    while error is not None:
        kind = type(error).__name__  # of huggingface_hub, which comes with transformers
        login = "log in by `hf auth login`, or set HF_TOKEN"
        if kind == "GatedRepoError":
            return f"needs a licence: accept it at https://huggingface.co/{source}, then {login}"
        if kind == "RepositoryNotFoundError":
            return f"the hub has no such model, or it is private: check the name; for a private one {login}"
        error = error.__cause__ or error.__context__
    return ""


def _check_shards(folder: Path, said: str, remedy: str) -> None:
    """Refuses a directory with pipes, or whose index of weights names files that are missing or lie elsewhere."""
    for file in folder.glob("*"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise LabError(f"{said}: {file.name} is a pipe or device; {remedy}")
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = set(json_of(index, index.name)["weight_map"].values())
            there = {name for name in shards if PureWindowsPath(name).name == name and (folder / name).is_file()}
        except (LabError, LookupError, TypeError, AttributeError) as error:
            raise LabError(f"{said}: {index.name} is no index of weights ({reason_of(error)}); {remedy}") from error
        if shards > there:
            what = f"{index.name} names {named(sorted(shards - there))}, which is not in that directory"
            raise LabError(f"{said}: {what}; download it again")


def _broken_file(folder: Path) -> str:
    """Says which file of a model's directory is broken; empty if all can be read."""
    for file in sorted(folder.glob("*.json")):
        try:
            json_of(file, file.name)
        except LabError as error:
            return str(error)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name} is truncated or broken: {reason_of(error)}"
    return ""
