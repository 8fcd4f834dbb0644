"""Reads checkpoints of others, tensors alone, and writes ours: `python -m zsi_contrastive.convert FILE`."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchvision.models import get_model, list_models

from labs_common.errors import LabError, reason_of
from labs_common.lock import check_new, new_folder
from labs_common.run import write_atomically
from labs_common.saved import FOLDER, named, read_weights
from zsi_contrastive.detector.annotations import read_split
from zsi_contrastive.detector.backbone import make_backbone
from zsi_contrastive.detector.config import ConvertConfig, DataOptions, DetectionOptions, ModelOptions, TrainConfig
from zsi_contrastive.detector.data import read_vectors
from zsi_contrastive.detector.model import CHANNELS, Parts, ZeroShotMaskRCNN, sizes_of
from zsi_contrastive.detector.saved import save_detector
from zsi_contrastive.detector.vectors import read_vocabulary

State = dict[str, torch.Tensor]
# Only the published detector has it: (2 · anchors, d, 1, 1), rows of background and things in turn.
ROWS = "rpn_head.vec_fb.weight"
VECTORS = "mask_head.conv_vec.weight"  # (1 + seen, d, 1, 1): what the masks were trained with
# Modules of our detector, and what the published code calls them.
PUBLISHED = {
    "rpn.head.conv": "rpn_head.rpn_conv",
    "rpn.head.semantic": "rpn_head.rpn_cls_conv_T",
    "rpn.head.box": "rpn_head.rpn_reg",
    "regions.box_head.first": "bbox_head.shared_fcs.0",
    "regions.box_head.second": "bbox_head.shared_fcs.1",
    "regions.box_head.semantic": "bbox_head.fc_semantic",
    "regions.box_head.from_words": "bbox_head.kernel_semantic",
    "regions.box_head.to_words": "bbox_head.d_kernel_semantic",
    "regions.box_head.decoder": "bbox_head.d_fc_semantic",
    "regions.box_head.box": "bbox_head.fc_reg",
    "regions.semantic_masks.convs.0.0": "mask_head.convs.3.conv",
    "regions.semantic_masks.deconv": "mask_head.upsample",
    "regions.semantic_masks.encoder.0": "mask_head.convT.conv",
    "regions.semantic_masks.encoder.2": "mask_head.kernel_semantic",
    "regions.semantic_masks.decoder.0": "mask_head.d_kernel_semantic",
    "regions.semantic_masks.decoder.2": "mask_head.dconvT.conv",
    **{f"backbone.fpn.inner_blocks.{level}.0": f"neck.lateral_convs.{level}.conv" for level in range(4)},
    **{f"backbone.fpn.layer_blocks.{level}.0": f"neck.fpn_convs.{level}.conv" for level in range(4)},
}
LEFT_OUT = {  # of the published detector
    r".+\.num_batches_tracked": "a counter of a batch norm, which is fixed",
    r"mask_head\.convs\.[0-2]\..+": "the published code drops this convolution's output",
    r"bbox_head\.fc_res\..+": "the published code never calls this layer",
    r"mask_head\.con\w*_vec\w*\.weight": "class vectors; they are those of --word-vectors",
}
# From the names of MoCo, of torchvision's, mmdetection's and Detectron2's detectors to torchvision's ResNets; in turn.
SPELLINGS = (
    (r"^(encoder_q|base_encoder|backbone\.body|backbone\.bottom_up|backbone|roi_heads(?=\.res5))\.", ""),
    (r"^stem\.", ""),
    *((rf"^res{stage + 1}\.", f"layer{stage}.") for stage in range(1, 5)),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
    *((rf"^fpn_lateral{level + 2}\.", f"fpn.inner_blocks.{level}.0.") for level in range(4)),
    *((rf"^fpn_output{level + 2}\.", f"fpn.layer_blocks.{level}.0.") for level in range(4)),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"fpn.layer_blocks.\1.0."),
    (r"^fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"fpn.\1_blocks.\2.0.\3"),  # torchvision's of before 0.13
)
# Modules of detectors alone: who has one of them was trained with boxes, also without a pyramid (C4).
OF_DETECTORS = re.compile(
    r"(roi_heads?|rpn|rpn_head|proposal_generator|bbox_head|mask_head|neck|fpn|backbone\.(body|bottom_up|fpn))\."
)

WIDTH = "bbox_head.shared_fcs.1.weight"
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # the last counts batches
# Depths of torchvision's ResNets by their blocks in the third stage.
DEPTHS = {2: "18", 6: "34|50", 23: "101", 36: "152"}


def convert(config: ConvertConfig) -> None:
    """Writes a detector or a backbone, and conversion.json: which tensor became which, and which are not used.

    Raises:
        LabError: the file holds more than tensors, or not those of a network that is known.
    """
    check_new(config.output)
    if config.file is None:
        raise LabError("FILE: name the checkpoint to convert")
    state = read_tensors(config.file)
    folder = new_folder(config.output, Path(config.file.name.lstrip(".").partition(".")[0] or "converted"))
    make = detector if ROWS in state else backbone
    used, left_out = make(state, config.file, config, folder)
    said = {"file": config.file.name, "used": used, "not used": left_out}
    write_atomically(folder / "conversion.json", json.dumps(said, indent=2) + "\n")
    print(f"used: {len(used)} of {len(state)} tensors")
    for why in dict.fromkeys(left_out.values()):
        print(f"not used: {named([name for name, reason in left_out.items() if reason == why])} ({why})")
    print(f"written: {folder}")


def read_tensors(file: Path) -> State:
    """Reads a checkpoint's tensors by name, without DataParallel's `module.`; no code that the file holds is run.

    Raises:
        LabError: the file cannot be read so.
    """
    if not file.is_file():
        raise LabError(f"{file}: no such file")
    found: Any
    if file.suffix == ".safetensors":
        found = read_weights(file, "FILE")
    else:
        try:
            with warnings.catch_warnings(action="ignore"):  # of a pickle that it will not read
                found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle can fail anywhere
            other = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {other[1]}, which is no tensor" if other else reason_of(error)
            raise LabError(
                f"{file}: its tensors cannot be read alone ({reason}), and nothing else of it is run; save the "
                "state_dict by itself, with torch.save, where you trust the file"
            ) from error
        for key in ("state_dict", "model"):
            found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise LabError(f"{file}: holds no state_dict, a dictionary of tensors alone")
    state = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    if len(state) < len(found):
        raise LabError(f"{file}: holds tensors of one name with and without module.; save one network by itself")
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.dtype not in KINDS or (tensor.is_floating_point() and not tensor.isfinite().all()):
            raise LabError(f"{file}: {name} is no tensor of finite numbers of 16 to 64 bits; take another checkpoint")
    for name in (VECTORS, ROWS, WIDTH):
        if name in state and (state[name].ndim < 2 or not len(state[name])):
            raise LabError(f"{file}: {name} has the shape {tuple(state[name].shape)}, which no detector's has")
    return state


def detector(state: State, file: Path, config: ConvertConfig, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Writes the published detector as a run's model; returns our names of tensors by its own, and why others are not.

    Raises:
        LabError: a tensor is missing, spare or of another shape, or the classes' vectors are others.
    """
    said, split = str(file), read_split(config.split)
    words = config.words
    if not words.word_vectors or words.vocabulary is None:
        raise LabError(f"{said}: the published detector needs its matrices: name --word-vectors and --vocabulary")
    vectors = read_vectors(words, split, shown=True)
    vocabulary = read_vocabulary(words.vocabulary, vectors.seen.shape[1])
    if VECTORS not in state:
        raise LabError(f"{said}: lacks {VECTORS}")
    own = state[VECTORS].flatten(1).float()
    if own.shape != (1 + len(vectors.seen), vectors.seen.shape[1]) or not torch.allclose(own[1:], vectors.seen):
        raise LabError(f"{said}: {VECTORS} has other vectors than --word-vectors gives the seen classes of --split")
    network = network_of({name.removeprefix("backbone."): tensor for name, tensor in state.items()}, said)
    # The code of 65/15 puts the learnt background there, that of 48/17 leaves the word's.
    synchronised = not torch.allclose(own[0], vectors.background)
    options = ModelOptions(
        network, backbone_pretrained=False, form="official", sync_masks=synchronised, min_side=800, max_side=1333
    )
    trained = TrainConfig(
        DataOptions(split=config.split, protocol="zsi"), words, options, DetectionOptions("code", temperature=1.0)
    )
    sizes, sampling = sizes_of(trained)
    if WIDTH in state:
        sizes = replace(sizes, width=len(state[WIDTH]))
    with torch.device("meta"):  # its shapes alone: every value is read
        body = make_backbone(network, False, None, 0, CHANNELS)
        parts = Parts(official=True, sync_masks=synchronised)
        model = ZeroShotMaskRCNN(body, vectors.background, vectors.seen, parts, sizes, sampling, vocabulary)
    rows = state[ROWS].flatten(1).float()
    written = {"rpn.head.background": rows[0::2], "rpn.head.thing": rows[1::2], "seen": vectors.seen,
               "background.word": vectors.background, "regions.box_head.words": vocabulary}  # fmt: skip
    used = {ROWS: "rpn.head.background, rpn.head.thing"}
    missing = []
    for name, wanted in model.state_dict().items():
        if name in written:
            continue
        module, _, kind = name.rpartition(".")
        theirs = f"{PUBLISHED.get(module) or module.replace('backbone.body', 'backbone')}.{kind}"
        if theirs not in state:
            missing.append(theirs)
        elif state[theirs].shape != wanted.shape:
            raise LabError(f"{said}: {theirs} is {tuple(state[theirs].shape)}, and not {tuple(wanted.shape)}")
        else:
            used[theirs], written[name] = name, state[theirs].float()
    others = [name for name in state if name not in used]
    left_out = {name: why for name in others for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, name)}
    if missing:
        raise LabError(f"{said}: lacks {named(missing)}")
    if spare := [name for name in others if name not in left_out]:
        raise LabError(f"{said}: the published detector has no {named(spare)}")
    save_detector(trained, model, written, split, vectors, folder / FOLDER)
    return used, left_out


def backbone(state: State, file: Path, config: ConvertConfig, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Writes backbone.safetensors, a ResNet and its pyramid if there is one; returns what `detector` does.

    Raises:
        LabError: no ResNet of torchvision has these tensors.
    """
    ours = {name: spelt(name) for name in state}
    by_name = {new: state[name] for name, new in ours.items()}
    if len(by_name) < len(state):
        raise LabError(f"{file}: holds two networks in one; save one of them by itself")
    network = network_of(by_name, str(file))
    with torch.device("meta"):
        pyramid = make_backbone(network, False, None, 0, CHANNELS).get_submodule("fpn").state_dict()
    wanted = {**plain(network), **{f"fpn.{name}": tensor for name, tensor in pyramid.items()}}
    fitting = {name for name in by_name if name in wanted and by_name[name].shape == wanted[name].shape}
    if not {f"fpn.{name}" for name in pyramid} <= fitting or any(
        name.startswith("fpn.") and name not in fitting for name in by_name
    ):
        fitting = {name for name in fitting if not name.startswith("fpn.")}
    if any(map(OF_DETECTORS.match, state)):
        print("note: a detector's backbone has seen its classes; with COCO's 80, a split's unseen ones are among them")
    save_file({name: by_name[name].clone().contiguous() for name in sorted(fitting)}, folder / "backbone.safetensors")
    print(f"use it: --backbone {network} --backbone-weights {folder / 'backbone.safetensors'}")
    used = {name: new for name, new in ours.items() if new in fitting}
    return used, {name: f"no part of {network} or our pyramid" for name in state if name not in used}


def spelt(name: str) -> str:
    """Returns torchvision's name of a ResNet's tensor, `fpn.…` for those of a pyramid; others stay as they are."""
    for pattern, new in SPELLINGS:
        name = re.sub(pattern, new, name)
    return name


@cache
def plain(network: str) -> Mapping[str, torch.Tensor]:
    """Returns the shapes of a network's tensors, without the classifier."""
    with torch.device("meta"):
        state = get_model(network).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def network_of(state: State, said: str) -> str:
    """Finds the ResNet of torchvision whose tensors these are; those of other names do not matter.

    Raises:
        LabError: there is none; what the nearest one has and these do not is named.
    """
    blocks = {int(found[1]) for name in state if (found := re.match(r"layer3\.(\d+)\.", name))}
    depth = DEPTHS.get(len(blocks), "50$")
    lacking: dict[str, list[str]] = {}
    for network in (name for name in list_models() if re.match(rf"(wide_)?resne(t|xt)({depth})", name)):
        wanted = plain(network)
        lacking[network] = [
            name for name, tensor in wanted.items()
            if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != tensor.shape)
        ]  # fmt: skip
        if not lacking[network]:
            return network
    nearest = min(lacking, key=lambda network: len(lacking[network]))
    lacks = f"for {nearest} it lacks {named(lacking[nearest])}, or has other shapes there"
    raise LabError(f"{said}: holds no ResNet of torchvision; {lacks}")
