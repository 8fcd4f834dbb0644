"""One layer on a frozen image tower: `python -m clip_lab.probe --checkpoint RN50:openai --data cifar-10-batches-py`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.probe()

from typing import TYPE_CHECKING

from clip_lab.command_config import ProbeConfig
from labs_common.errors import LabError

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch

    from clip_lab.classes import Features
    from labs_common.logistic import Layer

SGD_PENALTY = 1e-4


def probe(config: ProbeConfig) -> None:
    """The road: pictures, frozen features, one layer, test, few-shot curve, report.

    Raises:
        LabError: the model or the pictures cannot be had.
        RunStopped: the frozen model has moved.
    """
    counts = shots_of(config)

    from accelerate import Accelerator

    from clip_lab.classes import features_of, read_splits
    from clip_lab.encoder import load_encoder
    from clip_lab.probing import few_shot_curve, finish_probe
    from labs_common.data import record_splits
    from labs_common.freezing import FrozenAudit
    from labs_common.options import RunOptions
    from labs_common.report.classes import Predictions
    from labs_common.run import Run, check_run_options

    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    encoder = load_encoder(config.checkpoint)
    splits = read_splits(config.data, config.seed)
    audit = FrozenAudit(encoder.module)
    features = features_of(encoder, splits, config.features, config.batch_size, config.cache)
    audit.check()
    run = Run.start(config, options, "probe", Accelerator())
    record_splits(run, splits)
    classes = len(splits["train"].classes)
    layer, penalty, tried = fitted_layer(config, features, classes, encoder.device)
    test = features["test"]
    found = Predictions(layer.probabilities(test.values), test.labels.numpy())
    curve = few_shot_curve(config, features, classes, encoder.device, counts, penalty)
    finish_probe(run, config, encoder, splits, audit, layer, found, penalty, tried, curve)


def shots_of(config: ProbeConfig) -> list[int]:
    """The few-shot counts in order; 0 stands for all.

    Raises:
        LabError: one of them is no count, or another option is out of range.
    """
    if (
        config.penalty < 0
        or config.epochs < 1
        or config.batch_size < 1
        or config.learning_rate <= 0
        or config.draws < 1
    ):
        raise LabError("--penalty must not be negative; --epochs, --batch-size, --draws and --learning-rate above 0")
    found = []
    for part in filter(None, config.shots.split(",")):
        if part != "all" and not (part.isdigit() and int(part)):
            raise LabError(f"--shots {config.shots}: must be numbers from 1, or all, with commas between")
        found.append(0 if part == "all" else int(part))
    return found


def fitted_layer(
    config: ProbeConfig, features: "dict[str, Features]", classes: int, device: "torch.device"
) -> "tuple[Layer, float, dict[float, float]]":
    """The layer, its penalty, and the validation accuracy of every penalty that was tried.

    With the penalty found, the layer is fitted once more on training and validation pictures, as the paper does.
    """
    import torch

    from labs_common.logistic import best_penalty, fitted_by_sgd, fitted_layers
    from labs_common.progress import console

    train, validation = (features[name].to(device) for name in ("train", "validation"))
    whole = [torch.cat(both) for both in zip(train, validation, strict=True)]
    if config.solver == "sgd":
        penalty = config.penalty or SGD_PENALTY
        layer = fitted_by_sgd(whole[0], whole[1], classes, penalty, config.epochs, config.batch_size,
                              config.learning_rate, config.seed)  # fmt: skip
        return layer, penalty, {}
    tried: dict[float, float] = {}
    penalty = config.penalty
    if not penalty:
        penalty, tried = best_penalty(train, validation, classes, console.print)
    return fitted_layers(whole[0], whole[1], classes, [penalty])[0], penalty, tried
