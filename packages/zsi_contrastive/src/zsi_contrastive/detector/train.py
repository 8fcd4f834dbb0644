"""Trains a zero-shot detector: `accelerate launch -m zsi_contrastive.train --data coco --split 48_17 …`."""

import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from labs_common.cache import file_sum
from labs_common.checkpoint import SHARDED
from labs_common.data.images import record_splits
from labs_common.errors import LabError
from labs_common.fitting import Fitted, Fitting, begin, channels_last, results_of, write_results
from labs_common.launch import main_process_first
from labs_common.plan import print_plan
from labs_common.report.page import Section
from labs_common.run import Run, seconds_between
from labs_common.saved import FOLDER
from labs_common.steps import ShuffledSteps
from labs_common.training import total_steps
from zsi_contrastive.detector.annotations import read_split
from zsi_contrastive.detector.calibration import CALIBRATION
from zsi_contrastive.detector.config import OWN_SHARES, DetectorTrainingOptions, TrainConfig
from zsi_contrastive.detector.contrastive import CONTRASTIVE
from zsi_contrastive.detector.data import (
    PictureBatches,
    ZeroShotData,
    from_main_process,
    read_data,
    read_parts,
    read_vectors,
)
from zsi_contrastive.detector.defaults import complete
from zsi_contrastive.detector.heads import Samples, Target
from zsi_contrastive.detector.model import ZeroShotMaskRCNN, make_model
from zsi_contrastive.detector.options import DetectionOptions
from zsi_contrastive.detector.predict import predictions, query_of
from zsi_contrastive.detector.protocol import AT_ONCE, evaluated
from zsi_contrastive.detector.report import print_scores, summary_of, training_sections
from zsi_contrastive.detector.saved import load_detector, save_detector
from zsi_contrastive.detector.scoring import harmonic_mean, of_classes, scored

MOMENTUM = 0.9  # of SGD, as in the paper
PACKAGES = ("torch", "torchvision", "timm", "accelerate")  # whose versions results.json has


def train(config: TrainConfig) -> None:
    """Walks the road: pictures, words, model, training, evaluation of what was written, report."""
    clock = {"start": time.perf_counter()}
    config = complete(config)
    if config.plan.plan:
        print_needs(config)
        return
    accelerator = begin(config.run, config.training)
    data = from_main_process(accelerator, lambda: read_data(config.data, config.words, config.run.seed, shown=True))
    with main_process_first(accelerator):  # weights are downloaded on their first use
        set_seed(config.run.seed)  # the same model in every process
        model = make_model(config, data.vectors)
    run = Run.start(config, config.run, f"zsi-{data.split.name}", accelerator)
    record_splits(run, data.pictures)
    # Of boxes and masks: an annotation that was changed since is other data.
    sources = {Path(part.part.source) for part in data.pictures.values()}
    run.data = zlib.crc32(repr([file_sum(file) for file in sorted(sources) if file.is_file()]).encode())
    fitted = fit(config, model, run, accelerator, data)
    clock |= fitted.clock

    # The test is of what was written: the model is read back and sees the pictures themselves.
    loaded = load_detector(run.path)
    found = evaluated(
        loaded.model, data.split, data.vectors, data.pictures, config.detection, accelerator, config.run.seed
    )
    clock["tested"] = time.perf_counter()
    if found is not None:
        seconds = seconds_between(clock)
        if found.calibration is not None:
            run.save_json(f"{FOLDER}/{CALIBRATION}", asdict(found.calibration))
        results = results_of(run, config, fitted, "pictures", seconds["prepared"], PACKAGES) | {"test": found.plain()}

        def page() -> tuple[str, list[Section]]:
            sections = training_sections(run, config, data, loaded.model, fitted, found, results, seconds)
            return summary_of(found), sections

        run.save_json("detections.json", found.results)
        print_scores(found)
        print(f"model: {run.path / FOLDER}")
        write_results(run, results, config.run.report, "Zero-shot instance segmentation", page)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def print_needs(config: TrainConfig) -> None:
    """Prints the memory that the training needs; of the data it reads annotations and class vectors.

    A picture of the batch is as wide and as high as the widest and the highest one, as a batch is padded, and as
    many of its regions show things as may.

    Raises:
        LabError: there is no such data or backbone, or a part of the network depends on what pictures show.
    """
    if config.model.patch_infonce:
        raise LabError("--plan: does not count the patches that --contrastive patch_infonce draws; leave it out")
    split, options = read_split(config.data.split), config.training
    parts, _ = read_parts(config.data, split)
    rows, model_options = parts.train.images, config.model
    if not rows:
        raise LabError(f"--data: no training picture shows only seen classes of {split.name}")
    scales = [
        min(model_options.min_side / min(sides), model_options.max_side / max(sides))
        for sides in ((row["height"], row["width"]) for row in rows)
    ]
    height, width = (
        max(int(row[side] * scale) for row, scale in zip(rows, scales, strict=True)) for side in ("height", "width")
    )
    things = -(-len(parts.train.annotations) // len(rows))
    plain = replace(model_options, backbone_pretrained=False, backbone_weights=None, greedy_weights=None)
    model = make_model(replace(config, model=plain), read_vectors(config.words, split, shown=False)).train()
    model.transform._skip_resize = True  # the pictures below are scaled

    def loss(count: int) -> torch.Tensor:
        def target() -> Target:
            return {
                "boxes": torch.zeros(things, 4),
                "labels": torch.ones(things, dtype=torch.long),
                "masks": torch.zeros(things, height, width, dtype=torch.uint8),
            }

        pictures = [torch.empty(3, height, width) for _ in range(count)]
        return sum(model(Samples(pictures, [target() for _ in range(count)])).values(), torch.zeros(()))

    moments = 1 if options.optimizer == "sgd" else 2
    title = f"{model_options.backbone} and {len(split.seen)} classes, pictures of {height} × {width} pixels"
    # Each picture adds the same, and its many operators take their time also on shapes.
    print_plan(title, "pictures", config, model, loss, at_once=options.at_once, moments=moments, far=2)


def fit(config: TrainConfig, model: ZeroShotMaskRCNN, run: Run, accelerator: Accelerator, data: ZeroShotData) -> Fitted:
    """Trains what is not frozen and writes the model to `model/` under the run.

    Raises:
        LabError: there are fewer pictures than processes.
        RunStopped: the loss is NaN, or something frozen has moved.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    options, pictures = config.training, data.pictures["train"]
    rank, processes = accelerator.process_index, accelerator.num_processes
    if len(pictures) < processes:
        raise LabError(f"--data: {len(pictures)} training pictures are too few for {processes} processes")
    model.to(accelerator.device)
    channels_last(model, accelerator)
    batches = PictureBatches(pictures, options.at_once, options.flip, config.run.seed, rank, processes)
    source = ShuffledSteps(len(pictures), options.batch_size, config.run.seed, batches)
    if options.warmup_steps:
        options = replace(options, warmup=min(1.0, options.warmup_steps / total_steps(options, source)))
    if options.save_every < 0:
        options = replace(options, save_every=len(source))
    fitting = Fitting.start(
        run, accelerator, model, optimizer_of(model, options), source, options, config.run.seed, "pictures"
    )
    loop = fitting.loop
    weights = {"box_reconstruction": options.reconstruction, "mask_reconstruction": options.reconstruction}
    weights |= {name: contrastive_share(options, name, head.share) for name, head in CONTRASTIVE.items()}
    for batch in loop.batches():
        losses = fitting.model(batch.to(accelerator.device))
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items()) * batch.share
        # They stay on the device: the loop reads what it logs.
        parts: dict[str, Any] = {f"{name}_loss": value.detach() * batch.share for name, value in losses.items()}
        # A process without a picture of its own computes another's, with a share of 0: it counts nowhere.
        loop.step(loss, batch.count if batch.share else 0, **parts)
        if loop.evaluation_due and len(data.pictures["validation"]):
            found = scores(fitting, data, config.detection, options.validation_pictures)
            loop.evaluated(found, "validation/harmonic_mean", higher_is_better=True)

    folder = run.path / FOLDER
    return fitting.finish(lambda state: save_detector(config, model, state, data.split, data.vectors, folder))


def contrastive_share(training: DetectorTrainingOptions, name: str, usual: float) -> float:
    """Returns the weight of a contrastive head's loss; `usual` where no option says another."""
    if name in OWN_SHARES:
        return float(getattr(training, OWN_SHARES[name]))
    return training.contrastive_share if training.contrastive_share >= 0 else usual


def optimizer_of(model: ZeroShotMaskRCNN, options: DetectorTrainingOptions) -> torch.optim.Optimizer:
    """Makes the optimizer of what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "sgd":
        return torch.optim.SGD(trained, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    return torch.optim.AdamW(trained, options.learning_rate, weight_decay=options.weight_decay, fused=True)


def scores(fitting: Fitting, data: ZeroShotData, detection: DetectionOptions, most: int) -> dict[str, float]:
    """Measures AP at 0.5 of boxes of seen and unseen classes on validation pictures, each kind looked for alone."""
    pictures = data.pictures["validation"]
    pictures = pictures.subset(range(min(len(pictures), most)))
    seen, unseen = pictures.part.ids(data.split.seen), pictures.part.ids(data.split.unseen)
    assert isinstance(fitting.plain, ZeroShotMaskRCNN)
    fitting.plain.regions.keep(detection.score_threshold, detection.nms_threshold, detection.kept)
    both = [*seen, *unseen]
    # Weights that are sharded can be used only through the model that holds them together. DistributedDataParallel
    # waits for all processes in each batch, for which there is no need here.
    accelerator = fitting.accelerator
    model = fitting.model if accelerator.distributed_type in SHARDED else fitting.plain
    model.eval()
    query = query_of(data.vectors, detection, masks=False)
    (rows,) = predictions(model, pictures, [query], [both], accelerator, AT_ONCE, "validating")
    fitting.model.train()

    def measured() -> dict[str, float]:
        one, two = (
            scored(pictures.part, of_classes(rows, ids), ids, "box").means(ids)["ap@0.5"] for ids in (seen, unseen)
        )
        return {
            "validation/seen_ap50": one,
            "validation/unseen_ap50": two,
            "validation/harmonic_mean": harmonic_mean(one, two),
        }

    return from_main_process(accelerator, measured)


if __name__ == "__main__":
    raise SystemExit("the command is python -m zsi_contrastive.train")
