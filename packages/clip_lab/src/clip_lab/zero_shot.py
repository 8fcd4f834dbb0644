"""Names pictures by the sentence that fits best: `python -m clip_lab.zero_shot --checkpoint RN50:openai`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.zero_shot()

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clip_lab.command_config import ProbeConfig, ZeroShotConfig
from labs_common.errors import LabError

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    import torch

    from clip_lab.encoder import Encoder


def zero_shot(config: ZeroShotConfig) -> None:
    """The road: pictures, embeddings, one embedding per class, test, comparison with a probe, report.

    Raises:
        LabError: the model or the pictures cannot be had, or the model reads no text.
        RunStopped: the frozen model has moved.
    """
    if config.batch_size < 1:
        raise LabError("--batch-size: must be at least 1")
    import numpy as np
    from accelerate import Accelerator

    from clip_lab.classes import features_of, read_splits
    from clip_lab.encoder import load_encoder
    from clip_lab.naming import finish_zero_shot
    from clip_lab.probe import fitted_layer
    from clip_lab.templates import lines_of, templates_of
    from labs_common.data import record_splits
    from labs_common.freezing import FrozenAudit
    from labs_common.options import RunOptions
    from labs_common.report.classes import Predictions
    from labs_common.run import Run, check_run_options

    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    templates = templates_of(config.templates)
    encoder = load_encoder(config.checkpoint)
    if encoder.text is None:
        encoder.read([""])  # says what is missing
    splits = read_splits(config.data, config.seed)
    names = list(splits["test"].classes) if config.names is None else lines_of(config.names, "--names")
    if len(names) != len(splits["test"].classes):
        raise LabError(f"--names {config.names}: has {len(names)} names for {len(splits['test'].classes)} classes")
    audit = FrozenAudit(encoder.module)
    wanted = splits if config.probe else {"test": splits["test"]}
    features = features_of(encoder, wanted, "embedding", config.batch_size, config.cache)
    audit.check()
    run = Run.start(config, options, "zero-shot", Accelerator())
    record_splits(run, splits)
    test = features["test"]
    found: dict[str, Predictions] = {}
    for said, sentences in (("all templates together", templates), ("the first template alone", templates[:1])):
        logits = encoder.scale * test.values @ class_embeddings(encoder, names, sentences).T
        found[said] = Predictions(logits.double().softmax(1).numpy(), test.labels.numpy())
    if config.probe:
        options_of_probe = ProbeConfig(features="embedding", seed=config.seed)
        layer, _, _ = fitted_layer(options_of_probe, features, len(names), encoder.device)
        found["a linear probe on the embeddings"] = Predictions(layer.probabilities(test.values), test.labels.numpy())
    by_template: dict[str, Any] = {}
    for template in templates:
        named = (test.values @ class_embeddings(encoder, names, [template]).T).argmax(1).numpy()
        by_template[template] = float(np.mean(named == test.labels.numpy()))
    finish_zero_shot(run, config, encoder, splits, audit, found, by_template, names)


def class_embeddings(encoder: "Encoder", names: Sequence[str], templates: Sequence[str]) -> "torch.Tensor":
    """The mean of each class's sentences, of length 1 (classes, width); Radford et al. 2021, section 3.1.4."""
    import torch
    import torch.nn.functional as F

    from clip_lab.templates import filled

    sentences = [filled(template, name) for name in names for template in templates]
    every: torch.Tensor = encoder.read(sentences).unflatten(0, (len(names), len(templates)))
    return F.normalize(every.mean(1), dim=1)
