"""Checkpoints: written whole or not at all, read without running anything that they contain."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from labs_common.cache import SUMS, file_sum, files_in
from labs_common.errors import LabError, json_of, reason_of
from labs_common.progress import console
from labs_common.sharding import part_like, reshard, whole, zero_stage

SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)
KERNELS = ("fused", "foreach")  # how an optimizer computes, not what


class Stateful(Protocol):
    """State that a run must remember besides weights and optimizer, the same in every process."""

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors, numbers and text, in dictionaries and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""


def save_checkpoint(
    path: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    also: Stateful | None = None,
) -> None:
    """Writes a checkpoint to the directory `path`, in place of one that is there; called by all processes together.

    A checkpoint holds what changes: trainable parameters and buffers (`trainable.safetensors`), the
    optimizer (`optimizer.pt`), the random generators of each process (`random-R.pt`), the place in the
    data and how the run computes (`position.json`), the state of `also` (`also.pt`) and check sums of all of these.
    What FSDP shards is gathered on the main process, tensor by tensor; DeepSpeed writes its own format (`sharded/`).
    It appears under its name by one rename after everything is on disk, so that a process killed at any moment leaves
    only whole checkpoints.
    """
    part = path.with_name(f".{path.name}.part")
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _save(_random_state(), part / f"random-{accelerator.process_index}.pt")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Without the option it would write the frozen base model into every checkpoint.
        accelerator.save_state(str(part / "sharded"), exclude_frozen_parameters=True)
    elif accelerator.is_main_process or accelerator.distributed_type == DistributedType.FSDP:
        plain, kept = accelerator.unwrap_model(model), accelerator.is_main_process
        reshard(plain)
        tensors = changing_tensors(plain, kept)
        state: dict[str, Any] = {"optimizer": _whole_state(optimizer.state_dict(), kept)}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        if kept:
            save_file(tensors, part / "trainable.safetensors")
            _save(state, part / "optimizer.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if also is not None:
            _save(also.state_dict(), part / "also.pt")
        (part / "position.json").write_text(json.dumps(position | _surroundings(accelerator)), encoding="utf-8")
    sums = _check_sums(part, accelerator)
    if accelerator.is_main_process:
        (part / SUMS).write_text(json.dumps(sums), encoding="utf-8")
        for file in part.rglob("*"):
            if file.is_file():
                _to_disk(file)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        _to_disk(path.parent)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Finds the whole checkpoints `step-N` under `folder`, oldest first."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def best_checkpoints(folder: Path) -> list[Path]:
    """Finds the checkpoints `best-N` of the best weights under `folder`; copies under longer names are the user's."""
    return sorted(folder.glob("best-" + 8 * "[0-9]"))


def check_resumed(folder: Path, accelerator: Accelerator, identity: dict[str, Any]) -> None:
    """Makes sure that a run can go on from its newest checkpoint under `folder` as it began; called by all processes.

    `identity` is what the run would save with its position now. Another device and another version of torch are said.

    Raises:
        LabError: the checkpoint, or that of the best weights, is damaged or of another run; the newest earlier one that
            is whole is named. Or the run would go on with other numbers: other processes, launch, precision, options
            or data.
    """
    saved = checkpoints(folder)
    for path in [*saved[-1:], *best_checkpoints(folder)]:
        if damage := _damage(path, accelerator, identity["run"]):
            older = [one for one in saved if _number(one) < _number(path)]
            while older and _damage(older[-1], accelerator, identity["run"]):
                older.pop()
            wrong = {path.name, *(one.name for one in saved[len(older) :])}
            go_on = f"go on from {older[-1].name}" if older else "begin again: no earlier one is whole"
            raise LabError(f"{damage}; delete {', '.join(sorted(wrong))} in {folder} to {go_on}")
    for path in saved[-1:]:
        # Each process has its own generators and its own part of every step: with another number of processes the
        # run would go on with other numbers.
        wrote, now = len(list(path.glob("random-*.pt"))), accelerator.num_processes
        if wrote != now:
            raise LabError(f"{path}: was written by {wrote} processes, not {now}; resume with as many as the run had")
        # One of an earlier version, without check sums, may be damaged: `load_checkpoint` says what is wrong.
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            before = _json(path / "position.json")
            _compare(path, before, json.loads(json.dumps(identity)) | _surroundings(accelerator), accelerator)
            _check_best(path, before)


def _check_best(path: Path, position: dict[str, Any]) -> None:
    """Makes sure that the best weights so far are there, or those of a later step, which comes again."""
    best, there = position.get("best", {}).get("step"), [_number(one) for one in best_checkpoints(path.parent)]
    if best is not None and best not in there and max(there, default=0) <= position["step"]:
        raise LabError(f"{path.with_name(f'best-{best:08d}')}: the best weights so far are missing; bring them back, "
                       "or begin a new run")  # fmt: skip


def _compare(path: Path, before: dict[str, Any], now: dict[str, Any], accelerator: Accelerator) -> None:
    """Compares how a run was with how it would go on; what checkpoints of earlier versions do not say is let pass."""
    unlike = {name: (value, now[name]) for name, value in before.items() if name in now and value != now[name]}
    if "launch" in unlike:
        raise LabError("{}: the run was launched with {}, not {}; launch it as before".format(path, *unlike["launch"]))
    if "precision" in unlike:
        was, is_now = map(_said, unlike["precision"])
        raise LabError(f"{path}: the run computes in {was}, and --precision auto is {is_now} here; go on where it "
                       "began")  # fmt: skip
    if "options" in unlike:
        (was, is_now) = unlike["options"]
        for name in was.keys() & is_now.keys():  # not those that another version has or had
            if was[name] != is_now[name]:
                raise LabError(f"{path}: --{name.replace('_', '-')} was {was[name]} when it was written and is "
                               f"{is_now[name]} in the run's config.yaml; put it back, or begin a new run")  # fmt: skip
    if {"data", "steps", "epoch"} & unlike.keys() or before["step"] > now["steps"]:
        raise LabError(f"{path}: the data have changed since ({before.get('steps', before['step'])} steps then, "
                       f"{now['steps']} now); bring them back, or begin a new run")  # fmt: skip
    for name in sorted(unlike.keys() & {"device", "torch", "CPU threads"}) if accelerator.is_main_process else ():
        console.print("{}: was written with {} {}, and goes on with {}: numbers may differ in their last digits".format(
            path, name, *unlike[name]))  # fmt: skip


def _surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Says how this process computes: its precision, and what the figures' last digits depend on."""
    kind = accelerator.distributed_type
    launch = kind.value if kind in SHARDED else "no sharding"
    if kind == DistributedType.DEEPSPEED:
        launch += f" ZeRO-{zero_stage(accelerator)}"
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    here = {"launch": launch, "precision": accelerator.mixed_precision, "device": device, "torch": torch.__version__}
    # Sums are split among threads; a GPU's are not.
    return here | ({} if device != "cpu" else {"CPU threads": torch.get_num_threads()})


def _said(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _check_sums(folder: Path, accelerator: Accelerator, names: list[str] | None = None) -> dict[str, int | None]:
    """Returns the check sums of the files `names` in `folder`, or of all; None for what cannot be read.

    Each process reads its share of them, and all get the sums of all.
    """
    (names,) = broadcast_object_list([names or files_in(folder)])
    mine: list[tuple[str, int | None]] = []
    for name in names[accelerator.process_index :: accelerator.num_processes]:
        try:
            mine.append((name, file_sum(folder / name)))
        except (OSError, ValueError):  # ValueError: a NUL in the name
            mine.append((name, None))
    return dict(sorted(gather_object(mine)))


def _damage(path: Path, accelerator: Accelerator, run: str | None) -> str | None:
    """Says what is wrong with a checkpoint of `run`, in all processes; nothing of one that has no check sums yet."""
    written, position, there = broadcast_object_list(
        [_json(path / SUMS), _json(path / "position.json"), files_in(path)]
    )
    if not written:
        if run is None and not (path / SUMS).exists():  # of a run that began before there were any
            if accelerator.is_main_process:
                console.print(f"{path}: has no check sums, as an earlier version wrote it; it is taken as it is")
            return None
        return f"{path / SUMS}: is missing or damaged"
    for name, found in _check_sums(path, accelerator, list(written)).items():
        if found != written[name]:
            return f"{path / name}: is {'missing' if found is None else 'damaged (its check sum is another)'}"
    if more := set(there) - written.keys():
        return f"{path / min(more)}: has no check sum"
    # A run whose environment.json is lost has no name to compare with.
    if run not in (None, position.get("run")) or position.get("step") != _number(path):
        return f"{path}: is of another run or another step"
    return None


def _json(file: Path) -> Any:
    """Reads a dictionary; an empty one if there is none to be read."""
    try:
        found = json_of(file, str(file))
    except LabError:
        return {}
    return found if isinstance(found, dict) else {}


def load_checkpoint(
    path: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    also: Stateful | None = None,
) -> dict[str, Any]:
    """Puts model, optimizer and random generators back as `save_checkpoint` found them; returns the position.

    Raises:
        LabError: a file is missing or damaged, or the checkpoint is of another model or process count.
    """
    try:
        position: dict[str, Any] = json.loads((path / "position.json").read_text(encoding="utf-8"))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            accelerator.load_state(str(path / "sharded"), load_module_strict=False)
        else:
            plain = accelerator.unwrap_model(model)
            reshard(plain)
            restore_tensors(plain, load_file(path / "trainable.safetensors"))
            state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
            own = [{name: group.get(name) for name in KERNELS} for group in optimizer.param_groups]
            optimizer.load_state_dict(_state_parts(state["optimizer"], optimizer))
            for group, kernels in zip(optimizer.param_groups, own, strict=True):
                group |= kernels  # those of this machine and version, not those of the one that saved
            if accelerator.scaler is not None and "scaler" in state:
                accelerator.scaler.load_state_dict(state["scaler"])
        if also is not None:
            also.load_state_dict(torch.load(path / "also.pt", weights_only=True, map_location="cpu"))
        random_file = path / f"random-{accelerator.process_index}.pt"
        _set_random_state(torch.load(random_file, weights_only=True, map_location="cpu"))
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        raise LabError(
            f"{path}: the checkpoint cannot be read ({reason_of(error)}); "
            "delete that directory to go on from an earlier one"
        ) from error
    return position


def changing_tensors(model: torch.nn.Module, kept: bool = True) -> dict[str, torch.Tensor]:
    """Copies the trainable parameters and the buffers of `model`, by name, contiguous, detached and whole.

    Where FSDP shards them all processes call it together; those that do not say `kept` get nothing.
    """
    copies = {}
    for name, tensor in _changing(model).items():
        one = whole(tensor)
        if kept:  # a gathered one goes to the host at once: what trains may be too large for one GPU
            copies[name] = one.cpu().contiguous() if isinstance(tensor, DTensor) else one.contiguous().clone()
    return copies


@torch.no_grad()
def restore_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copies `changing_tensors` back into `model`; where FSDP shards it, each process takes its parts.

    Raises:
        ValueError: names or shapes are those of another model.
    """
    present = _changing(model)
    if present.keys() != tensors.keys():
        raise ValueError(f"holds {len(tensors)} tensors where this model trains {len(present)}")
    for name, tensor in tensors.items():
        if present[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, here {tuple(present[name].shape)}")
        present[name].copy_(part_like(tensor, present[name]))


def _changing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _whole_state(state: Any, kept: bool) -> Any:
    """Gathers what FSDP shards of an optimizer's state; a process that does not keep it only takes part."""
    if isinstance(state, DTensor):
        one = whole(state)
        return one.cpu() if kept else None
    if isinstance(state, dict):
        return {name: _whole_state(value, kept) for name, value in state.items()}
    return [_whole_state(value, kept) for value in state] if isinstance(state, list) else state


def _state_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Turns the moments that `_whole_state` gathered into this process's parts of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {
            name: _laid_out(part_like(value, parameter), parameter) if isinstance(value, torch.Tensor) else value
            for name, value in state["state"][number].items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    return state | {"state": moments}


def _laid_out(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Gives a moment the memory format of its weight: fused kernels go through both as they lie in memory."""
    if moment.shape != parameter.shape or isinstance(moment, DTensor) or moment.stride() == parameter.stride():
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # Of this process's own GPU: the run may go on where others are visible.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        own = state["cuda"]  # of all visible GPUs in runs before version 0.2
        torch.cuda.set_rng_state(own[torch.cuda.current_device() if len(own) > 1 else 0])


def _save(state: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a name, torch would not say that the disk is full
        torch.save(state, file)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
