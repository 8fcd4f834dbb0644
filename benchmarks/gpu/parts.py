"""What there is to measure on a GPU, most valuable first. Imports nothing heavy."""

from dataclasses import dataclass

COMMANDS = (
    "llm_peft_fa.train", "clip_lab.train", "caption_lab.train", "vit_transfer.train", "zsi_contrastive.train",
    "zsi_contrastive.pretrain",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """A function that yields rows, in a process of its own.

    Attributes:
        target: "module:function" in this package; it gets a `Setting` and `arguments`.
        minutes: about how long it takes on a GPU of the size of an H100; guessed, as long as none was there.
        long: only with --long.
    """

    name: str
    target: str
    arguments: tuple[str, ...] = ()
    minutes: float = 1.0
    long: bool = False


@dataclass(frozen=True)
class Part:
    """Measurements that are done together, in at most `--minutes`."""

    title: str
    measurements: tuple[Measurement, ...]


PARTS: dict[str, Part] = {
    "commands": Part(
        "The six training commands in bf16: killed and resumed; where they wait for the device",
        tuple(Measurement(name, "commands:killed_and_resumed", (name,), 1.2) for name in COMMANDS),
    ),
    "language": Part(
        "Fine-tuning Llama-3.2-3B and Gemma-2-2B (random weights) against TRL; rows, chunks of the loss, QLoRA",
        (
            Measurement("llama against TRL", "language:against_trl", ("llama",), 2.0),
            Measurement("gemma against TRL", "language:against_trl", ("gemma",), 2.0),
            Measurement("llama, rows and chunks", "language:sweep", ("llama",), 1.5),
            Measurement("gemma, rows and chunks", "language:sweep", ("gemma",), 1.5),
            Measurement("llama, QLoRA", "language:quantized", ("llama",), 1.5),
        ),
    ),
    "traces": Part(
        "Profiler traces: the share of each step in which the device is idle",
        tuple(Measurement(name, "traces:traced", (name,), 0.7) for name in COMMANDS),
    ),
    "pictures": Part(
        "Pictures: one block on CIFAR-10, steps against open_clip and timm, SimCLR against lightly",
        (
            Measurement("one block on CIFAR-10", "pictures:block", (), 3.0),
            Measurement("CLIP against open_clip", "pictures:clip", (), 1.0),
            Measurement("ResNet-50 against timm", "pictures:resnet", (), 1.0),
            Measurement("SimCLR against lightly", "pictures:simclr", (), 2.0),
            Measurement("SimCLR, 200 epochs", "pictures:long", (), 15.0, long=True),
        ),
    ),
    "sharding": Part(
        "FSDP, ZeRO-2 and ZeRO-3 with one process, beside the plain command",
        tuple(
            Measurement(f"{name}, {kind}", "sharding:launched", (name, kind), 0.7)
            for name in ("llm_peft_fa.train", "vit_transfer.train", "clip_lab.train")
            for kind in ("fsdp", "deepspeed_zero2", "deepspeed_zero3")
        ),
    ),
    "losses": Part(
        "Linear probe against scikit-learn, memory and time of CLIP's loss against open_clip",
        (
            Measurement("linear probe", "pictures:probe", (), 1.0),
            Measurement("CLIP's loss", "pictures:loss", (), 0.5),
        ),
    ),
}
