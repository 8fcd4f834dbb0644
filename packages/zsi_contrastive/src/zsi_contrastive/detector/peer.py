"""Released open-vocabulary detectors of transformers beside ours: the same pictures, names and scorer, boxes alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

from labs_common.errors import LabError
from labs_common.saved import load_auto, load_network
from zsi_contrastive.detector.heads import Samples
from zsi_contrastive.detector.protocol import Evaluation
from zsi_contrastive.detector.regions import Detections, Query

PROMPTS = {  # by the kind of model: what its authors put a name into
    "owlvit": "a photo of a {}",
    "owlv2": "a photo of a {}",
    "grounding-dino": "{}",
    "mm-grounding-dino": "{}",
}
REMEDY = "name a detector such as google/owlv2-base-patch16-ensemble or IDEA-Research/grounding-dino-tiny"
LEAKAGE = "learnt from data that names these classes and boxes their things: to it none of them is unseen"


class Peer(torch.nn.Module):
    """Answers as `ZeroShotMaskRCNN` does in evaluation, by names in the place of vectors."""

    columns: torch.Tensor

    def __init__(self, source: str, names: Sequence[str], kept: int) -> None:
        """Loads a model from the hub or a directory; `kept` is that of `DetectionOptions`.

        Its scores are not ours, so that no threshold of ours cuts them.

        Raises:
            LabError: it cannot be loaded, is of another kind, or takes fewer names.
        """
        super().__init__()
        said = f"--peer {source}"
        kind = load_auto(AutoConfig.from_pretrained, source, said=said, remedy=REMEDY).model_type
        if kind not in PROMPTS:
            raise LabError(f"{said}: is of the kind {kind}, not {', '.join(PROMPTS)}; {REMEDY}")
        self.processor = load_auto(AutoProcessor.from_pretrained, source, said=said, remedy=REMEDY)
        self.network = load_network(AutoModelForZeroShotObjectDetection, source, said, REMEDY).eval()
        self.texts = [PROMPTS[kind].format(name) for name in names]
        self.kept = kept
        columns = torch.eye(len(names), dtype=torch.bool)  # OWL has a logit for each name
        if "grounding" in kind:
            columns = self._of_tokens(len(names), int(self.network.config.max_text_len), said)
        self.register_buffer("columns", columns)  # (names, logits of a box): which are of a name

    def _of_tokens(self, names: int, most: int, said: str) -> torch.Tensor:
        """Says which tokens of the joined names are of which (names, tokens): each name ends with a full stop."""
        (ids,) = self.processor(text=[self.texts])["input_ids"]
        ends = [place for place, number in enumerate(ids) if number == self.processor.tokenizer.encode(".")[1]]
        if len(ends) != names or len(ids) > most:
            raise LabError(f"{said}: takes {most} tokens and no full stop in a name; the {names} names have {len(ids)}")
        columns = torch.zeros(names, most, dtype=torch.bool)
        for row, first, last in zip(columns, [1, *(end + 1 for end in ends)], ends, strict=False):
            row[first:last] = True
        return columns

    def forward(self, samples: Samples, queries: Sequence[Query]) -> list[list[Detections]]:
        """Returns for each query the best of each of its groups of names in every picture, as the model scores them.

        Suppression is not part of these models, whose boxes are learnt to be apart.
        """
        pictures = [(picture * 255).round().byte() for picture in samples.pictures]
        inputs = self.processor(images=pictures, text=[self.texts] * len(pictures), return_tensors="pt")
        outputs = self.network(**inputs.to(pictures[0].device))
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        # All boxes, where the model's own rule puts them in the picture; phrases are not wanted.
        more: dict[str, Any] = {"input_ids": inputs["input_ids"], "text_threshold": 1.0} if self.joined else {}
        sizes = [tuple(picture.shape[-2:]) for picture in pictures]
        placed = self.processor.post_process_grounded_object_detection(
            outputs, threshold=-1.0, target_sizes=sizes, **more
        )
        hidden = ~self.columns[:, : outputs.logits.shape[-1]]
        # A name's score is that of its best token: (pictures, boxes, names).
        scores = torch.stack([outputs.logits.masked_fill(row, -torch.inf).amax(-1) for row in hidden], -1).sigmoid()
        return [
            [self._best(one["boxes"], score, query.groups) for one, score in zip(placed, scores, strict=True)]
            for query in queries
        ]

    @property
    def joined(self) -> bool:
        """Whether all names are one text."""
        return "grounding" in self.network.config.model_type

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor, groups: Sequence[int]) -> Detections:
        parts, first = [], 0
        for part in scores.split(list(groups), 1):
            best, place = part.flatten().topk(min(self.kept, part.numel()))
            parts.append((boxes[place // part.shape[1]], best, first + place % part.shape[1]))
            first += part.shape[1]
        found, best, names = (torch.cat(column) for column in zip(*parts, strict=True))
        return Detections(found, best, names, None)


def beside(found: Evaluation, theirs: Evaluation, name: str) -> Evaluation:
    """Puts a peer's box scores beside ours, in every table of scores by kind."""
    kind = f"box, {name}"
    tables = {
        table: getattr(found, table) | {kind: getattr(theirs, table)["box"]} for table in ("zsi", "gzsi", "one_list")
    }
    classes = [
        line | {f"{kind}{task}": other[f"box{task}"] for task in (" gzsi", " one list")}
        for line, other in zip(found.classes, theirs.classes, strict=True)
    ]
    return replace(found, **tables, classes=classes, peer=f"{name} {LEAKAGE}")
