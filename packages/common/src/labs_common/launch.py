"""Lets the processes of a launch agree: on GPUs and precision, and on errors of one of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, get_int_from_env, parse_flag_from_env

from labs_common.errors import LabError, reason_of
from labs_common.progress import console


def check_launch(precision: str) -> None:
    """Refuses more processes than GPUs; says which GPUs stay idle, and that `--precision` decides.

    `precision` is Accelerate's name of the arithmetic that `--precision` gave. Each process finds out by itself, before
    they meet: all of a machine count the same, so all of them stop, and none waits for another.

    Raises:
        LabError: this machine has more processes than GPUs that they may use, or DeepSpeed has no launcher.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # a configuration that leaves it out says "no" too
    if asked not in ("no", precision):
        _say(f"mixed_precision {asked} of the launch configuration does not count: "
             f"--precision decides, and gives {'fp32' if precision == 'no' else precision}")  # fmt: skip
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and "RANK" not in os.environ:
        raise LabError("ACCELERATE_USE_DEEPSPEED: is set, but no launcher started this; unset it, or start with "
                       "accelerate launch --config_file launch/deepspeed_zero2.yaml")  # fmt: skip
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    processes = get_int_from_env(["LOCAL_WORLD_SIZE", "LOCAL_SIZE"], 1)  # of torchrun; of DeepSpeed's own launcher
    if get_int_from_env(["WORLD_SIZE"], 1) > 1 and not {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & os.environ.keys():
        return  # a launcher that does not say how many are on this machine
    gpus = torch.accelerator.device_count()
    # torchrun and DeepSpeed's launcher start processes that see the same GPUs. A scheduler binds one to each
    # (srun --gpus-per-task=1): then the one that a process sees is its own.
    if gpus == 1 and not {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & os.environ.keys():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    of = f"{gpus} GPU{'' if gpus == 1 else 's'}" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})")
    # A single process goes on without a GPU. Several would not: Accelerate gives two of them the same GPU, and where
    # there is none it lets each train alone, in one directory.
    if processes > gpus and get_int_from_env(["WORLD_SIZE"], 1) > 1:
        raise LabError(
            f"{processes} processes on a machine with {of}: each needs one; lower --num_processes (a resumed run needs "
            "as many as it had), or set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    if processes < gpus:
        _say(f"{processes} of {of} is used, the others stay idle: as many processes on each machine (--num_processes) "
             "take all")  # fmt: skip


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Lets the main process through before the others, as Accelerate's own does; an error in one is one in all.

    With Accelerate's the others would wait for hours for one that has ended.

    Raises:
        LabError: another process failed; what it said.
    """
    if not accelerator.is_main_process:
        _share(None)  # waits for the main process
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    _share(failed)
    if accelerator.is_main_process:
        _share(None)  # waits for the others


def _share(failed: Exception | None) -> None:
    """Raises in all processes what went wrong in any; each calls it."""
    said = failed and (str(failed) if isinstance(failed, LabError) else reason_of(failed))
    others = [one for one in gather_object([said]) if one is not None]
    if failed is not None:
        raise failed
    if others:
        raise LabError(others[0])


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        console.print(line)
