"""Released models of transformers: captioners that are measured beside ours, and CLIPs that judge captions (CLIPScore).

transformers is imported where such a model is loaded: it takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from labs_common.data.captions import CaptionedPictures
from labs_common.data.images import decoding_threads
from labs_common.decoding import captions_by_parts
from labs_common.errors import LabError, json_of, reason_of
from labs_common.options import DecodingOptions
from labs_common.saved import load_auto, load_network

REMEDY = "name a run, or an image-to-text model of transformers, such as Salesforce/blip-image-captioning-base"
# The prompt of families that take one: BLIP's authors train and measure with theirs, and cut it off (models/blip.py).
PROMPTS, NO_PROMPT = {"blip": "a picture of ", "git": ""}, "none"
LENGTH = 30  # most tokens of a caption; the models' own defaults, 16 to 20, cut off sentences
BATCH = 64  # pictures or sentences through a CLIP at once
# Hessel et al. 2021, section 3: the factor that spreads scores over 0 to 1, and what captions begin with.
WEIGHT, PROMPT = 2.5, "A photo depicts "
CLIP_SCORES = {"clip-score": "CLIPScore", "ref-clip-score": "RefCLIPScore"}  # as tables call them


def is_released(checkpoint: Path) -> bool:
    """Tells whether `--checkpoint` names a model of transformers: by its config.json, or as an id of the hub."""
    if not checkpoint.exists():
        return len(checkpoint.parts) == 2 and not str(checkpoint).startswith((".", "/", "~")) \
            and not checkpoint.parent.exists()  # fmt: skip
    config = checkpoint / "config.json"
    said = json_of(config, str(config)) if config.is_file() else None
    return isinstance(said, dict) and "model_type" in said


@dataclass(frozen=True)
class ReleasedCaptioner:
    """An image-to-text model of transformers, with the library's own search and processing.

    Attributes:
        kind: its name, for the report.
        prompt: what its captions begin with, which is cut off; it may be empty.
    """

    kind: str
    prompt: str
    network: Any
    processor: Any
    tokenizer: Any

    def captions(
        self,
        pictures: CaptionedPictures,
        accelerator: Accelerator,
        size: int,
        options: DecodingOptions,
        task: str,
    ) -> list[str]:
        """Writes a caption for each picture, `size` of them at once; the processes share them.

        Raises:
            LabError: the model needs more than a picture.
        """
        network = self.network.to(accelerator.device)
        search: dict[str, Any] = {"do_sample": bool(options.top_p), "max_new_tokens": LENGTH}
        if options.top_p:
            search |= {"top_p": options.top_p, "top_k": 0, "temperature": options.temperature, "num_beams": 1}
        else:
            search |= {"num_beams": options.beam, "no_repeat_ngram_size": options.no_repeat}
        if search["num_beams"] > 1:
            search["length_penalty"] = options.length_penalty

        # [CLS], words, [SEP]: of the end BLIP itself takes care, and puts its own start in the place of [CLS].
        prompt = self.tokenizer(self.prompt).input_ids if self.prompt else []
        given = prompt if network.config.model_type == "blip" else prompt[:-1]

        @torch.no_grad()
        def describe(places: Sequence[int]) -> list[str]:
            images = list(decoding_threads().map(pictures.image, places))
            inputs = self.processor(images=images, return_tensors="pt").to(accelerator.device)
            begun = {"input_ids": torch.tensor([given] * len(places), device=accelerator.device)} if prompt else {}
            try:
                written = network.generate(pixel_values=inputs["pixel_values"], **begun, **search)
                written = written[:, len(prompt[:-1]) :]
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # a prompt is missing, say
                said = f"--checkpoint {self.kind}: cannot describe a picture by that alone ({reason_of(error)[:300]})"
                raise LabError(f"{said}; {REMEDY}") from error
            return [said.strip() for said in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

        return captions_by_parts(describe, len(pictures), accelerator, size, task)


def load_released(checkpoint: Path, prompt: str = "") -> ReleasedCaptioner:
    """Loads an image-to-text model by its hub id or directory; no code of its own runs.

    `prompt` is that of `--prompt`.

    Raises:
        LabError: it cannot be had, or writes nothing of pictures, or takes no prompt.
    """
    from transformers import AutoModelForImageTextToText  # takes seconds
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    said, source = f"--checkpoint {checkpoint}", str(checkpoint)
    config, processor, tokenizer = _parts(source, said, REMEDY)
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise LabError(f"{said}: is of the kind {config.model_type}, which writes no captions; {REMEDY}")
    if prompt not in ("", NO_PROMPT) and config.model_type not in PROMPTS:
        raise LabError(f"--prompt: works with {' and '.join(PROMPTS)} only, {checkpoint} is of the kind "
                       f"{config.model_type}; drop it")  # fmt: skip
    prompt = "" if prompt == NO_PROMPT else prompt or PROMPTS.get(config.model_type, "")
    network = load_network(AutoModelForImageTextToText, source, said, REMEDY, dtype=torch.float32).eval()
    return ReleasedCaptioner(source, prompt, network, processor, tokenizer)


class ClipJudge:
    """A CLIP of transformers that says how well captions fit their pictures (Hessel et al. 2021)."""

    def __init__(self, name: str) -> None:
        """Loads the CLIP that `--clip-score` names.

        Raises:
            LabError: it cannot be had, or compares no pictures with texts.
        """
        from transformers import AutoModel  # takes seconds

        said, remedy = f"--clip-score {name}", "name a CLIP of transformers, such as openai/clip-vit-base-patch32"
        config, self.processor, self.tokenizer = _parts(name, said, remedy)
        # SigLIP has no mask: it was trained on texts that are filled up to its full length.
        self.filled: bool | str = "max_length" if "siglip" in config.model_type else True
        places = getattr(getattr(config, "text_config", config), "max_position_embeddings", 77)
        self.length = min(int(places), self.tokenizer.model_max_length)
        self.network = load_network(AutoModel, name, said, remedy, dtype=torch.float32).eval()
        if not hasattr(self.network, "get_image_features") or not hasattr(self.network, "get_text_features"):
            raise LabError(f"{said}: {type(self.network).__name__} is no CLIP; {remedy}")

    def look(self, pictures: CaptionedPictures, device: torch.device) -> "JudgedPictures":
        """Embeds the pictures and their true captions, which are the same for all captions that are judged."""
        self.network.to(device)
        parts = [range(len(pictures))[first : first + BATCH] for first in range(0, len(pictures), BATCH)]
        seen = torch.cat([self._pictures([pictures.image(place) for place in part]) for part in parts])
        references = self.texts([caption for captions in pictures.captions for caption in captions])
        return JudgedPictures(self, seen, references.split([len(captions) for captions in pictures.captions]))

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeds captions behind the paper's prompt (captions, width), with length 1."""
        found = []
        for first in range(0, len(captions), BATCH):
            said = [PROMPT + caption for caption in captions[first : first + BATCH]]
            inputs = self.tokenizer(
                said, padding=self.filled, truncation=True, max_length=self.length, return_tensors="pt"
            )
            found.append(self._embedded(self.network.get_text_features, inputs))
        return torch.cat(found)

    def _pictures(self, images: Sequence[Any]) -> torch.Tensor:
        return self._embedded(self.network.get_image_features, self.processor(images=images, return_tensors="pt"))

    @torch.no_grad()
    def _embedded(self, embed: Any, inputs: Any) -> torch.Tensor:
        output = embed(**inputs.to(self.network.device))
        found = output if isinstance(output, torch.Tensor) else output.pooler_output
        return F.normalize(found.flatten(1).float(), dim=1).cpu()  # ALIGN's is (pictures, width, 1, 1)


@dataclass(frozen=True)
class JudgedPictures:
    """Pictures as a judge sees them.

    Attributes:
        pictures: their embeddings (pictures, width), with length 1.
        references: those of each picture's true captions (captions, width).
    """

    judge: ClipJudge
    pictures: torch.Tensor
    references: Sequence[torch.Tensor]

    def scores(self, captions: Sequence[str]) -> dict[str, float]:
        """Returns the means of CLIPScore and RefCLIPScore of a caption of each picture (section 3, with w = 2.5).

        CLIP-S is w max(cos(caption, picture), 0), RefCLIP-S its harmonic mean with max(cos(caption, reference), 0) of
        the reference that is nearest.
        """
        said = self.judge.texts(captions)
        seen = WEIGHT * (said * self.pictures).sum(1).clamp(min=0)
        alike = torch.stack([(own @ one).amax() for own, one in zip(self.references, said, strict=True)]).clamp(min=0)
        both = 2 * seen * alike / (seen + alike).clamp(min=1e-12)  # 0 where both are
        return {"clip-score": float(seen.mean()), "ref-clip-score": float(both.mean())}


def _parts(source: str, said: str, remedy: str) -> tuple[Any, Any, Any]:
    """Loads a model's configuration, image processor and tokenizer."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer  # takes seconds

    config, processor, tokenizer = (
        load_auto(auto.from_pretrained, source, said=said, remedy=remedy)
        for auto in (AutoConfig, AutoImageProcessor, AutoTokenizer)
    )
    return config, processor, tokenizer
