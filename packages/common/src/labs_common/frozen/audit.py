"""Chooses what trains, and proves that everything else stayed as it was."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor

from labs_common.checkpoint import SHARDED
from labs_common.errors import LabError, RunStopped
from labs_common.progress import console
from labs_common.run import Run
from labs_common.sharding import reshard

HASHES = "frozen.json"  # in a run's directory
WORDS = 1 << 22  # of eight bytes, hashed at once on a GPU: their factors take 32 MiB as well


def train_only(model: torch.nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Makes exactly the parameters whose name is `wanted` trainable and returns their names.

    Raises:
        LabError: no parameter has such a name.
    """
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise LabError("nothing to train: no parameter of the model fits the chosen method")
    return names


def frozen_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter that does not train, and every buffer of a module that trains nothing of its own.

    The second part catches what `requires_grad=False` does not stop, such as the running statistics of a
    frozen BatchNorm that was left in training mode.
    """
    seen: set[int] = set()  # a tied tensor belongs to the module that comes first
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        learns = any(parameter.requires_grad for parameter in own.values())
        tensors = {name: parameter for name, parameter in own.items() if not parameter.requires_grad}
        tensors |= {} if learns else dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name, tensor


def tensor_hash(tensor: torch.Tensor) -> str:
    """Hashes the bytes of a tensor by BLAKE2b; those of this process's part where FSDP or ZeRO-3 shard it."""
    tensor = _own_part(tensor)
    data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).hexdigest()


def device_hash(tensor: torch.Tensor) -> torch.Tensor:
    """Hashes the bytes of a tensor where it is: two sums (2,) of its 64-bit words, each times an odd number of its own.

    Any one word that changes changes both sums, and changes that cancel out in one do not in the other but by a chance
    of 2^-64. A base of 6 GB would take seconds to reach the CPU in every process; nobody attacks a training's own
    memory, so that BLAKE2b's strength is not needed.
    """
    data = _own_part(tensor).detach().contiguous().flatten().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    found = torch.zeros(2, dtype=torch.int64, device=data.device)
    for first in range(0, len(data), WORDS):
        words = data[first : first + WORDS]
        place = torch.arange(first + 1, first + 1 + len(words), device=data.device) * -0x61C8864680B583EB
        # Integers wrap around at 2^64, as in Python's own hashes; the sums do not depend on their order.
        found[0] += (words * _mixed(place)).sum()
        found[1] += (words * _mixed(place + 0x1234567)).sum()
    return found


def _mixed(place: torch.Tensor) -> torch.Tensor:
    """Returns an odd number for each that looks like chance (the finaliser of SplitMix64, Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        place = (place ^ (place >> shift)) * factor
    return (place ^ (place >> 31)) | 1


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "ds_tensor"):
        whole: Any = tensor
        part: torch.Tensor = whole.ds_tensor.flatten()
        # The last parts are padded with whatever was in memory.
        return part[: max(0, whole.ds_numel - torch.distributed.get_rank() * len(part))]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_hash(module: torch.nn.Module) -> str:
    """Returns 32 hexadecimal digits that change with any weight or buffer that the module saves."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor_hash(tensor)}".encode())
    return found.hexdigest()


@dataclass
class FrozenAudit:
    """Hashes of everything that is frozen, taken when the audit is made; `check` compares.

    Make it when training starts, on the model as it trains (after `accelerator.prepare`, unwrapped). In several
    processes give the accelerator: where weights are sharded each process hashes its own part, and all stop together.
    """

    model: torch.nn.Module
    accelerator: Accelerator | None = None
    before: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._hashes()

    @classmethod
    def start(cls, run: Run, accelerator: Accelerator, model: torch.nn.Module) -> "FrozenAudit":
        """Hashes the prepared `model` and keeps the hashes with the run, or compares with those of its first start.

        Called by all processes together. A run that was killed before it had written its hashes writes them now.

        Raises:
            RunStopped: the run is being resumed, and something frozen is not what it was.
            LabError: the run is being resumed otherwise than its sharded weights allow, or its hashes are damaged.
        """
        audit = cls(accelerator.unwrap_model(model), accelerator)
        # From the main process: the others may be on a machine that does not see the run's directory.
        kept, trouble = broadcast_object_list([_kept(run) if run.resumed and run.is_main else (None, None)])[0]
        if trouble:
            raise LabError(trouble)
        if kept is not None:
            audit.check(_of_process(kept, accelerator))
            return audit
        every = gather_object([audit.before])
        alike = all(hashes == audit.before for hashes in every)
        run.save_json(HASHES, audit.before if alike else every)
        if (run.path / "checkpoints").exists() and run.is_main:
            console.print(f"{run.path / HASHES} is missing: what is frozen is taken as it is now, not as it began")
        return audit

    def check(self, start: dict[str, str] | None = None) -> None:
        """Compares with the state when this audit was made, or with the hashes `start` of the run's first start.

        Raises:
            RunStopped: in any process a tensor changed, appeared or vanished; the first few are named.
        """
        start = self.before if start is None else start
        now = self._hashes(start)
        moved = [name for name in start.keys() | now.keys() if start.get(name) != now.get(name)]
        if self.accelerator is not None:
            moved = gather_object(moved)  # one that stopped alone would leave the others waiting for it
        if moved := sorted(set(moved)):
            raise RunStopped(
                f"{len(moved)} frozen tensors have changed, first {', '.join(moved[:3])}: "
                "the run cannot be trusted and is not finished"
            )

    def _hashes(self, like: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        reshard(self.model)  # an evaluation leaves some parameters whole: the bytes would be others
        found: dict[str, str] = {}
        there: dict[str, torch.Tensor] = {}
        for name, tensor in frozen_tensors(self.model):
            on_gpu = _own_part(tensor).device.type == "cuda"
            # A run that began on another kind of device has hashes of the other kind.
            if ":" in like[name] if name in like else on_gpu:
                there[name] = device_hash(tensor)
            else:
                found[name] = tensor_hash(tensor)
        if there:  # the device is waited for once
            sums = torch.stack(list(there.values())).tolist()
            found |= {name: f"{one:x}:{two:x}" for name, (one, two) in zip(there, sums, strict=True)}
        return found

    def table(self) -> list[dict[str, str | int]]:
        """Makes a row for each kind of module: parameters that train, parameters and buffers whose hashes were equal.

        Layers are counted together: `layers.*.self_attn` stands for all of them.
        """
        rows: dict[str, dict[str, int]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                row = rows.setdefault(_kind(name), {"trained": 0, "frozen": 0, "verified": 0})
                row["trained"] += _size(parameter)
        for name, tensor in frozen_tensors(self.model):
            row = rows.setdefault(_kind(name), {"trained": 0, "frozen": 0, "verified": 0})
            row["frozen"] += _size(tensor)
            row["verified"] += name in self.before
        # What every name begins with says nothing: model.base_model.model.
        shared = os.path.commonpath([kind.replace(".", "/") for kind in rows]).replace("/", ".") if rows else ""
        return [{"module": kind.removeprefix(f"{shared}."), **row} for kind, row in rows.items()]


def _kept(run: Run) -> tuple[Any, str | None]:
    """Reads frozen.json, or says what is wrong with it: all processes must hear of it."""
    try:
        kept = run.load_json(HASHES)
    except LabError as error:
        return None, str(error)
    every = kept if isinstance(kept, list) and kept else [kept]
    if kept is not None and not all(
        isinstance(hashes, dict) and all(isinstance(one, str) for one in hashes.values()) for hashes in every
    ):
        return None, f"{run.path / HASHES}: holds no hashes; bring it back from a copy of the run"
    return kept, None


def _of_process(kept: Any, accelerator: Accelerator) -> dict[str, str] | None:
    """Takes this process's hashes out of frozen.json: one dictionary if all had the same, else one for each process."""
    if isinstance(kept, list):
        if accelerator.distributed_type not in SHARDED:
            raise LabError("--resume: the run's weights were sharded; launch it as before, with launch/fsdp.yaml")
        if len(kept) != accelerator.num_processes:
            raise LabError(f"--resume: the run's weights are sharded over {len(kept)} processes; resume with as many")
        return dict(kept[accelerator.process_index])
    # Runs of version 0.1 kept the main process's hashes alone, also of sharded weights.
    unknown = accelerator.distributed_type in SHARDED and not accelerator.is_main_process
    return None if unknown else kept


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0]) or name


def _size(tensor: torch.Tensor) -> int:
    return int(getattr(tensor, "ds_numel", tensor.numel()))
