"""The published detector's checkpoint, against its own forward pass written out here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labs_testing.commands import here
from PIL import Image
from torchvision.models import get_model
from torchvision.ops import nms, roi_align

from labs_common.errors import LabError
from zsi_contrastive.detector.config import ConvertConfig, WordOptions
from zsi_contrastive.detector.convert import ROWS, VECTORS, detector
from zsi_contrastive.detector.heads import through_known
from zsi_contrastive.detector.predict import words_query
from zsi_contrastive.detector.regions import Query
from zsi_contrastive.detector.saved import load_detector

State = dict[str, torch.Tensor]
D, WORDS, WIDTH, SEEN, UNSEEN = 20, 31, 32, 48, 17
HEIGHT, ACROSS = 64, 96
PROPOSALS = 150  # of the published 1,000
BEST = 12  # detections of seen and of unseen classes
EDGE = torch.tensor([0.0, 0, 1, 1])  # from a box with its last pixel to one without
STRIDES = (4, 8, 16, 32, 64)
BLOCKS = (3, 4, 23, 3)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmdetection 1's ResNet-101-FPN with the published heads; d, vocabulary and width are small."""
    with torch.device("meta"):
        body = get_model("resnet101").state_dict()
    shapes = {f"backbone.{name}": tuple(value.shape) for name, value in body.items() if not name.startswith("fc.")}
    layers: dict[str, tuple[int, ...]] = {
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_cls_conv_T": (D, 256, 1, 1),
        "rpn_head.rpn_reg": (12, 256, 1, 1),
        "bbox_head.fc_reg": (4 * (1 + SEEN), WIDTH),
        "bbox_head.fc_semantic": (D, WIDTH),
        "bbox_head.kernel_semantic": (D, WORDS),
        "bbox_head.d_kernel_semantic": (WORDS, D),
        "bbox_head.d_fc_semantic": (WIDTH, D),
        "bbox_head.fc_res": (D, D),
        "bbox_head.shared_fcs.0": (WIDTH, 256 * 49),
        "bbox_head.shared_fcs.1": (WIDTH, WIDTH),
        "mask_head.convT.conv": (D, 256, 3, 3),
        "mask_head.dconvT.conv": (256, D, 3, 3),
        "mask_head.kernel_semantic": (D, D, 3, 3),
        "mask_head.d_kernel_semantic": (D, D, 3, 3),
    }
    for level, channels in enumerate((256, 512, 1024, 2048)):
        layers[f"neck.lateral_convs.{level}.conv"] = (256, channels, 1, 1)
        layers[f"neck.fpn_convs.{level}.conv"] = (256, 256, 3, 3)
        layers[f"mask_head.convs.{level}.conv"] = (256, 256, 3, 3)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {
        "mask_head.upsample.weight": (256, 256, 2, 2), "mask_head.upsample.bias": (256,),
        ROWS: (6, D, 1, 1), VECTORS: (1 + SEEN, D, 1, 1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, torch.Tensor, torch.Tensor, Path]:
    """Random weights in the published shapes, the matrix (1 + seen + unseen, d), the vocabulary, and what was made."""
    torch.manual_seed(0)
    matrix = F.normalize(torch.randn(1 + SEEN + UNSEEN, D).abs() + 0.2 * torch.randn(1 + SEEN + UNSEEN, D), dim=1)
    words = torch.randn(WORDS, D)
    state: State = {}
    for name, shape in published_shapes().items():
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            state[name] = torch.tensor(7)
        elif len(shape) == 1:  # norms and biases
            state[name] = torch.rand(shape) * 0.2 + (
                0.9 if kind == "running_var" else 0.4 if kind == "weight" else -0.1
            )
        else:
            state[name] = torch.randn(shape) * (2 / max(1, np.prod(shape[1:]))) ** 0.5
    state["bbox_head.fc_reg.weight"] *= 0.3
    state["rpn_head.rpn_cls_conv_T.weight"] *= 0.05  # or probabilities of 1 would tie
    # So that no box leaves the picture: of such the code keeps a line of one pixel at the edge, ours nothing.
    state["rpn_head.rpn_reg.weight"] *= 0.03
    # What all regions have in common says nothing, so that not all are of one class.
    first = state["bbox_head.shared_fcs.0.weight"].view(WIDTH, 256, 49)
    first -= first.mean(2, keepdim=True)
    first *= 3
    state["bbox_head.kernel_semantic.weight"] *= 0.3  # nor all sure of it, which would tie
    state[VECTORS] = matrix[: 1 + SEEN, :, None, None].clone()
    state[VECTORS][0] += 0.3  # as 65/15 leaves it: what the proposals had learnt
    folder = tmp_path_factory.mktemp("published")
    np.savetxt(folder / "matrix.txt", matrix.T.double().numpy(), fmt="%.9g", delimiter=",")
    np.savetxt(folder / "words.txt", words.T.double().numpy(), fmt="%.9g", delimiter=",")
    torch.save({"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": state}, folder / "ZSI_48_17.pth")
    return state, matrix, words, folder


def of_files(folder: Path) -> tuple[object, ...]:
    """The options that name the matrices."""
    return ("--split", "48_17", "--word-vectors", folder / "matrix.txt", "--vocabulary", folder / "words.txt",
            "--columns", "trust")  # fmt: skip


@pytest.fixture(scope="module")
def converted(published: tuple[State, torch.Tensor, torch.Tensor, Path]) -> Path:
    folder = published[3]
    here("zsi_contrastive.convert", folder / "ZSI_48_17.pth", *of_files(folder), "--output", folder / "ours")
    (folder / "ZSI_48_17.pth").unlink()
    description = folder / "ours" / "model" / "zsi.json"
    said = json.loads(description.read_text())
    assert (said["sizes"]["min_side"], said["sizes"]["max_side"]) == (800, 1333)
    assert said["sizes"]["proposals"] == [2000, 1000, 2000, 1000]
    said["sizes"] |= {
        "min_side": HEIGHT,
        "max_side": ACROSS,
        "proposals": [2000, 1000, 2000, PROPOSALS],
    }  # it is a test
    description.write_text(json.dumps(said))
    return folder / "ours"


class Published:
    """The published code's forward pass, written out: boxes include their last pixel, so x2 - x1 + 1 is a width."""

    def __init__(self, state: State, matrix: torch.Tensor, words: torch.Tensor) -> None:
        self.s, self.voc = state, words.T  # matrices have a column for each word
        self.vec, self.unseen = matrix[: 1 + SEEN].T.clone(), matrix[1 + SEEN :].T
        self.vec_of_masks = self.vec.clone()

    def layer(self, name: str, x: torch.Tensor, **more: int) -> torch.Tensor:
        weight, bias = self.s[f"{name}.weight"], self.s.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, **more) if weight.ndim == 4 else F.linear(x, weight, bias)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, variance, weight, bias = (
            self.s[f"backbone.{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias)

    def pyramid(self, picture: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu(self.norm("bn1", self.layer("backbone.conv1", picture, stride=2, padding=3)))
        x = F.max_pool2d(x, 3, 2, 1)
        laterals = []
        for stage, blocks in enumerate(BLOCKS):
            for block in range(blocks):
                name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
                out = F.relu(self.norm(f"{name}.bn1", self.layer(f"backbone.{name}.conv1", x)))
                out = self.layer(f"backbone.{name}.conv2", out, stride=stride, padding=1)
                out = self.layer(f"backbone.{name}.conv3", F.relu(self.norm(f"{name}.bn2", out)))
                if not block:
                    x = self.norm(f"{name}.downsample.1", self.layer(f"backbone.{name}.downsample.0", x, stride=stride))
                x = F.relu(self.norm(f"{name}.bn3", out) + x)
            laterals.append(self.layer(f"neck.lateral_convs.{stage}.conv", x))
        for level in (3, 2, 1):
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], scale_factor=2, mode="nearest")
        levels = [self.layer(f"neck.fpn_convs.{level}.conv", x, padding=1) for level, x in enumerate(laterals)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def rpn(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.layer("rpn_head.rpn_conv", level, padding=1))
        scores = self.layer("rpn_head.vec_fb", self.layer("rpn_head.rpn_cls_conv_T", x))
        probability = scores[0].permute(1, 2, 0).reshape(-1, 2).softmax(1)[:, 1]
        return probability, self.layer("rpn_head.rpn_reg", x)[0].permute(1, 2, 0).reshape(-1, 4)

    def proposals(self, levels: list[torch.Tensor]) -> torch.Tensor:
        boxes, scores = [], []
        for level, stride in zip(levels, STRIDES, strict=True):
            ratios = torch.tensor([0.5, 1.0, 2.0])
            down, across = 8 * stride * ratios.sqrt(), 8 * stride / ratios.sqrt()
            centre = 0.5 * (stride - 1)
            base = [
                centre - (across - 1) / 2,
                centre - (down - 1) / 2,
                centre + (across - 1) / 2,
                centre + (down - 1) / 2,
            ]
            y, x = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing="ij")
            places = (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) * stride).float()
            anchors = (places + torch.stack(base, 1).round()).reshape(-1, 4)
            probability, deltas = self.rpn(level)
            best = probability.topk(min(1000, len(probability))).indices
            found = self.moved(anchors[best], deltas[best])
            kept = self.suppressed(found, probability[best], 0.7)
            boxes.append(found[kept])
            scores.append(probability[best][kept])
        order = torch.cat(scores).sort(descending=True).indices[:PROPOSALS]
        return torch.cat(boxes)[order]

    @staticmethod
    def moved(boxes: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        dx, dy, dw, dh = deltas.unbind(1)
        limit = abs(np.log(16 / 1000))
        width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2 + width * dx, (boxes[:, 1] + boxes[:, 3]) / 2 + height * dy
        width, height = width * dw.clamp(-limit, limit).exp(), height * dh.clamp(-limit, limit).exp()
        return torch.stack(
            [
                (x - width / 2 + 0.5).clamp(0, ACROSS - 1), (y - height / 2 + 0.5).clamp(0, HEIGHT - 1),
                (x + width / 2 - 0.5).clamp(0, ACROSS - 1), (y + height / 2 - 0.5).clamp(0, HEIGHT - 1),
            ], 1,
        )  # fmt: skip

    @staticmethod
    def suppressed(boxes: torch.Tensor, scores: torch.Tensor, overlap: float) -> torch.Tensor:
        return nms(boxes + EDGE, scores, overlap)

    @staticmethod
    def pooled(levels: list[torch.Tensor], boxes: torch.Tensor, side: int) -> torch.Tensor:
        sides = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1).sqrt()
        of = (sides / 56 + 1e-6).log2().floor().clamp(0, 3)
        found = torch.zeros(len(boxes), 256, side, side)
        for number in range(4):
            rois = F.pad(boxes[of == number] + EDGE, (1, 0))
            found[of == number] = roi_align(levels[number], rois, side, 1 / STRIDES[number], 2, aligned=False)
        return found

    def box_head(self, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores of seen and of unseen classes, background first, and deltas (n, 1 + seen, 4)."""
        x = F.relu(self.layer("bbox_head.shared_fcs.0", regions.flatten(1)))
        x = F.relu(self.layer("bbox_head.shared_fcs.1", x))
        background = (self.s[ROWS][0] + self.s[ROWS][2] + self.s[ROWS][4]).flatten() / 3
        self.vec[:, 0] = background
        vec_unseen = torch.cat([background[:, None], self.unseen], 1)
        score = self.layer("bbox_head.kernel_semantic", self.layer("bbox_head.fc_semantic", x) @ self.voc) @ self.vec
        mixture = score.softmax(1) @ self.vec.T
        deltas = self.layer("bbox_head.fc_reg", x).view(len(x), -1, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2])
        return mixture @ self.vec, mixture @ vec_unseen, deltas

    def mask_head(self, regions: torch.Tensor, synchronised: bool) -> torch.Tensor:
        """Logits of seen and unseen classes (n, seen + unseen, 28, 28)."""
        vec = self.vec if synchronised else self.vec_of_masks
        x = F.relu(
            self.layer("mask_head.convs.3.conv", regions, padding=1)
        )  # each reads the regions, the last one counts
        up = self.s["mask_head.upsample.weight"], self.s["mask_head.upsample.bias"]
        x = F.relu(self.layer("mask_head.convT.conv", F.relu(F.conv_transpose2d(x, *up, stride=2)), padding=1))
        x = self.layer("mask_head.kernel_semantic", x, padding=1)
        of_seen = F.conv2d(x, vec.T[:, :, None, None])
        of_unseen = F.conv2d(F.conv2d(of_seen, vec[:, :, None, None]), self.unseen.T[:, :, None, None])
        return torch.cat([of_seen[:, 1:], of_unseen], 1)


def test_a_converted_detector_answers_as_the_published_code(
    published: tuple[State, torch.Tensor, torch.Tensor, Path], converted: Path
) -> None:
    state, matrix, words, _ = published
    reference = Published(state, matrix, words)
    loaded = load_detector(converted)
    model = loaded.model
    torch.testing.assert_close(loaded.vectors.classes, matrix[1:])
    torch.manual_seed(1)
    picture = torch.rand(3, HEIGHT, ACROSS)
    mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        levels = reference.pyramid((picture[None] * 255 - mean[:, None, None]) / deviation[:, None, None])
        batch, _ = model.transform([picture])
        ours = list(model.backbone(batch.tensors).values())
        for one, other in zip(ours, levels, strict=True):
            torch.testing.assert_close(one, other, **close)
        scores, shifts = model.rpn.head(ours)
        for level, score, shift in zip(levels, scores, shifts, strict=True):
            probability, deltas = reference.rpn(level)
            torch.testing.assert_close(score[0].permute(1, 2, 0).flatten().sigmoid(), probability, **close)
            torch.testing.assert_close(shift[0].permute(1, 2, 0).reshape(-1, 4), deltas, **close)
        boxes = reference.proposals(levels)
        proposals = model.rpn(batch, dict(zip("01234", ours, strict=True)))[0][0]
        assert len(boxes) == PROPOSALS
        torch.testing.assert_close(proposals, boxes + EDGE, rtol=1e-4, atol=1e-2)
        of_seen, of_unseen, deltas = reference.box_head(reference.pooled(levels, boxes, 7))
        model.regions.keep(0.05, 0.5, BEST)
        query = Query(loaded.vectors.classes, (SEEN, UNSEEN), loaded.detection.temperature, loaded.detection.transfer)
        assert model.parts.sync_masks, "read from the vectors in the file, which are as in 65/15"
        ((found,),) = model.detect([picture], [query])
        assert len(found.boxes) == 2 * BEST
        # Alone, an unseen class that is not the first of them has the boxes that it has among all.
        number = int(found.classes.max())
        assert number > SEEN
        word = {loaded.split.classes[number]: loaded.vectors.classes[number]}
        ((alone,),) = model.detect([picture], [replace(words_query(word, loaded, loaded.detection), masks=False)])
        mine = found.boxes[found.classes == number]
        torch.testing.assert_close(alone.boxes[: len(mine)], mine)
        for first, scores_of, half in ((0, of_seen, slice(BEST)), (SEEN, of_unseen, slice(BEST, None))):
            kept = []
            for number in range(1, scores_of.shape[1]):
                enough = scores_of[:, number] > 0.05
                box, score = reference.moved(boxes, deltas[:, number])[enough], scores_of[enough, number]
                kept += [(score[one], number - 1, box[one]) for one in reference.suppressed(box, score, 0.5)]
            best = sorted(kept, key=lambda row: -float(row[0]))[:BEST]
            assert len({number for _, number, _ in best}) > 1
            torch.testing.assert_close(found.scores[half], torch.stack([row[0] for row in best]), **close)
            assert found.classes[half].tolist() == [first + number for _, number, _ in best]
            best_boxes = torch.stack([row[2] for row in best])
            torch.testing.assert_close(found.boxes[half], best_boxes + EDGE, rtol=1e-4, atol=1e-2)
            regions = reference.pooled(levels, best_boxes, 14)
            asked = replace(query, vectors=through_known(query.vectors, matrix[: 1 + SEEN]))
            plain = [part._replace(boxes=part.boxes[half], classes=part.classes[half]) for part in [found]]
            (plain_found,) = model.regions._masked(dict(zip("01234", ours, strict=True)), HEIGHT, plain, asked)
            for masks, synchronised in ((found.masks[half], True), (plain_found.masks, False)):  # ZSI of 48/17
                wanted = reference.mask_head(regions, synchronised)[torch.arange(BEST), found.classes[half]]
                assert float(wanted.std()) > 0.1
                torch.testing.assert_close(masks, wanted.sigmoid(), **close)


def test_every_tensor_is_used_or_named(
    published: tuple[State, torch.Tensor, torch.Tensor, Path], converted: Path
) -> None:
    said = json.loads((converted / "conversion.json").read_text())
    used, left_out = set(said["used"]), set(said["not used"])
    assert used | left_out == set(published[0])
    assert not used & left_out
    assert {name for name in left_out if not name.endswith("num_batches_tracked")} == {
        VECTORS, "bbox_head.fc_res.weight", "bbox_head.fc_res.bias",
        *(f"mask_head.convs.{number}.conv.{kind}" for number in range(3) for kind in ("weight", "bias")),
    }  # fmt: skip


def test_predict_takes_a_converted_detector(converted: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    done = here("zsi_contrastive.predict", tmp_path / "red.png", "--checkpoint", converted, "--words", "zebra,bus",
                "--kept", 3, "--most", 1, "--output", tmp_path / "found")  # fmt: skip
    assert done.stdout.startswith(f"{tmp_path / 'red.png'}\t")
    done = here("zsi_contrastive.evaluate", "--checkpoint", converted, "--output", tmp_path / "no", code=2)
    assert "name --data" in done.stderr


def without(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def wider(name: str) -> Callable[[State], object]:
    return lambda state: state.update({name: torch.cat([state[name]] * 2)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("mask_head.convT.conv.bias"), "lacks mask_head.convT.conv.bias"),
        (without(VECTORS), f"lacks {VECTORS}"),
        (without("backbone.layer4.2.bn3.bias"), "for resnet101 it lacks layer4.2.bn3.bias"),
        (wider("bbox_head.fc_reg.bias"), "bbox_head.fc_reg.bias is (392,), and not (196,)"),
        (lambda state: state.update({"mask_head.extra": torch.zeros(1)}), "has no mask_head.extra"),
        (lambda state: state.update({VECTORS: state[VECTORS].flip(0)}), "other vectors than --word-vectors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_detector_is_refused(
    published: tuple[State, torch.Tensor, torch.Tensor, Path],
    converted: Path,
    change: Callable[[State], object],
    said: str,
) -> None:
    state, _, _, folder = published
    state = dict(state)
    change(state)
    words = WordOptions(str(folder / "matrix.txt"), folder / "words.txt", "trust")
    with pytest.raises(LabError) as error:
        detector(state, Path("their.pth"), ConvertConfig(words=words), folder / "never")
    assert said in str(error.value)
    assert not (folder / "never").exists()
