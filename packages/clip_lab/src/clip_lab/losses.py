"""The objectives, one function each, and gradient caching: batches larger than what goes through the towers at once.

None of the losses keeps a matrix of all pictures by all captions in memory. Pictures and captions carry the number of
their picture, and what has the same number belongs together: the captions of one picture are not negatives of each
other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from clip_lab.config import OWN, HeadOptions, TrainConfig
from clip_lab.data import Part, Step, normalised
from clip_lab.model import ClipModel, CocaModel, Embedded, Model, SiglipModel, SimVlmModel, places_of_end
from labs_common.data.captions import augmented
from labs_common.device import to_device
from labs_common.errors import LabError
from labs_common.fitting import Fitting
from labs_common.gathering import gathered, in_chunks

# A part's share of the step's loss, and its shares of further metrics; they add up over the parts of a step.
Share = tuple[torch.Tensor, dict[str, torch.Tensor]]
PADDED = -100  # the target where nothing is to be predicted: cross_entropy's own default


@dataclass(frozen=True)
class Objective:
    """One entry of `OBJECTIVES`.

    Attributes:
        model: the class of its model.
        share: computes the share of part `number` of a step.
        learns: the question that the model learns to answer, in a comparison's words.
        own: the names of `HeadOptions` that only this objective reads.
    """

    model: type[Any]
    share: Callable[[Fitting, TrainConfig, Step, int], Share]
    learns: str
    own: tuple[str, ...] = ()


def contrastive(fitting: Fitting, config: TrainConfig, step: Step, number: int) -> Share:
    """Computes the loss in which each caption finds its picture among all, and each picture its captions."""
    loss, found = contrast_share(fitting, config, step, number)
    return loss, {"logit_scale": found.scale.detach() / len(step.parts)}


def coca(fitting: Fitting, config: TrainConfig, step: Step, number: int) -> Share:
    """Adds to the same the loss of writing every caption word by word (Yu et al. 2022, eq. 4)."""
    head = config.head
    contrast, found = contrast_share(fitting, config, step, number)
    assert found.logits is not None
    captions = caption_share(fitting, step.parts[number], found.logits)
    metrics = {
        "logit_scale": found.scale.detach() / len(step.parts),
        "contrastive_loss": contrast.detach(),
        "caption_loss": captions.detach(),
    }
    return head.contrastive_weight * contrast + head.caption_weight * captions, metrics


def simvlm(fitting: Fitting, config: TrainConfig, step: Step, number: int) -> Share:
    """Computes the loss in which each caption goes on from its beginning (Wang et al. 2022, eq. 3)."""
    part, device = step.parts[number], fitting.accelerator.device
    logits = fitting.model(pictures_of(fitting, part), to_device(part.words, device), to_device(part.prefix, device))
    return caption_share(fitting, part, logits), {}


OBJECTIVES = {
    "clip": Objective(
        ClipModel, contrastive, "each caption finds its picture among the batch's, and the other way round"
    ),
    "siglip": Objective(SiglipModel, contrastive, "is this the caption of this picture? for every pair of the batch"),
    "coca": Objective(
        CocaModel, coca, "as clip, and every caption is written word by word", ("contrastive_weight", "caption_weight")
    ),
    "simvlm": Objective(
        SimVlmModel, simvlm, "the rest of each caption is written from its beginning", ("encoder_layers",)
    ),
}


def check_objective(config: TrainConfig) -> None:
    """Refuses options that the objective cannot do with, before anything is read.

    Raises:
        LabError: an option is of another objective, or of another kind of model.
    """
    model, text = OBJECTIVES[config.objective].model, config.text.text
    for name, objective in OBJECTIVES.items():
        for option in objective.own:
            if name != config.objective and getattr(config.head, option) != getattr(HeadOptions(), option):
                raise LabError(f"--{option.replace('_', '-')}: is of --objective {name}")
    if model.writes and text != OWN:
        wanted = f"--objective {config.objective} needs a causal tower: --text {OWN}"
        raise LabError(f"--text {text}: sees a whole caption at once; {wanted}")
    if not model.embeds and config.training.watch == "recall" and config.training.patience:
        raise LabError(f"--watch recall: --objective {config.objective} has no embeddings; take --watch loss")


class Embeddings(NamedTuple):
    """Pictures and captions to be compared: those of a process, or of all.

    Attributes:
        image: embeddings of pictures (pictures, width), of length 1.
        text: those of captions (captions, width).
        image_ids: the number of each picture (pictures,).
        text_ids: the number of each caption's picture (captions,).
    """

    image: torch.Tensor
    text: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor

    def of_all_processes(self) -> "Embeddings":
        """Gathers those of all processes; gradients flow back to the process that an embedding is of.

        Every process must bring the same number of pictures, and of captions.
        """
        return Embeddings(*map(gathered, self))


def clip_loss(own: Embeddings, scale: torch.Tensor, every: Embeddings | None = None, chunk: int = 4096) -> torch.Tensor:
    """Computes CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3), with several positives per row.

    The target of a row is spread evenly over what has its id (Yang et al. 2022, UniCL, eq. 3): with one caption per
    picture this is CLIP's own loss.

    Args:
        own: the rows.
        scale: factor of the cosines, 1 / temperature (scalar).
        every: the columns, with which rows are compared; by default each other.
        chunk: rows at once; memory grows with it times the columns.
    """
    every = every or own
    by_picture = in_chunks(_cross_entropy, (own.image, own.image_ids), (every.text, every.text_ids, scale), chunk)
    by_caption = in_chunks(_cross_entropy, (own.text, own.text_ids), (every.image, every.image_ids, scale), chunk)
    return (by_picture / len(own.image) + by_caption / len(own.text)) / 2


def _cross_entropy(
    rows: torch.Tensor, ids: torch.Tensor, others: torch.Tensor, of: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Sums over rows the cross-entropy with a target that is even over the columns of the row's id."""
    logits = scale * rows @ others.T  # (rows, columns)
    together = ids[:, None] == of
    wanted = (logits * together).sum(1) / together.sum(1)
    return (logits.logsumexp(1) - wanted).sum()


def siglip_loss(
    own: Embeddings, scale: torch.Tensor, bias: torch.Tensor, every: Embeddings | None = None, chunk: int = 4096
) -> torch.Tensor:
    """Computes the sigmoid loss of every pair (Zhai et al. 2023, eq. 1): do the two belong together?

    Arguments are those of `clip_loss`; `bias` is added to the scaled cosines (scalar).
    """
    every = every or own
    shared = (every.text, every.text_ids, torch.stack([scale, bias]))
    return in_chunks(_logistic, (own.image, own.image_ids), shared, chunk) / len(own.image)


def _logistic(
    rows: torch.Tensor, ids: torch.Tensor, others: torch.Tensor, of: torch.Tensor, line: torch.Tensor
) -> torch.Tensor:
    """Sums the logistic loss over all pairs of a row and a column; `line` is scale and bias (2,)."""
    sign = (ids[:, None] == of).to(rows.dtype) * 2 - 1
    return -F.logsigmoid(sign * (line[0] * rows @ others.T + line[1])).sum()


def caption_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Computes the mean cross-entropy of the next word over all words to be predicted (Yu et al. 2022, eq. 3).

    Of logits (captions, length, vocabulary) and targets (captions, length), `PADDED` where nothing is to be predicted.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDED)


def suffix_targets(words: torch.Tensor, prefix: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Returns the targets of PrefixLM (Wang et al. 2022, SimVLM, eq. 3): the words after each caption's prefix.

    Args:
        words: (captions, length).
        prefix: how many words each caption's prefix has (captions,), the start token among them.
        last: the place of each one's end token (captions,).

    Returns:
        (captions, length - 1): the next word at each place, `PADDED` within the prefix and after the end.
    """
    place = torch.arange(1, words.shape[1], device=words.device)
    wanted = (place >= prefix[:, None]) & (place <= last[:, None])
    return words[:, 1:].masked_fill(~wanted, PADDED)


def caption_share(fitting: Fitting, part: Part, logits: torch.Tensor) -> torch.Tensor:
    """Computes a part's share of the mean loss over all words of the step that follow their captions' prefixes."""
    words, prefix = to_device(part.words, logits.device), to_device(part.prefix, logits.device)
    targets = suffix_targets(words, prefix, places_of_end(fitting.plain, words))
    return caption_loss(logits.float(), targets) * part.of_words


def pictures_of(fitting: Fitting, part: Part) -> torch.Tensor:
    """Returns a part's pictures as the image tower's input, or its output for them if it is frozen; on the device."""
    device = fitting.accelerator.device
    pictures = to_device(part.pictures, device)
    if pictures.dim() == 2:  # the frozen tower's output
        return pictures
    crops = None if part.crops is None else to_device(part.crops, device)
    return normalised(augmented(pictures, crops), cast(Model, fitting.plain).image)


def embedded(fitting: Fitting, part: Part) -> Embedded:
    """Returns the prepared model's output for a part, on its device."""
    return fitting.model(pictures_of(fitting, part), to_device(part.words, fitting.accelerator.device))


def contrastive_loss(fitting: Fitting, config: TrainConfig, found: Embedded, ids: torch.Tensor) -> torch.Tensor:
    """Compares this process's pictures and captions with those of all; the mean over processes is the whole loss."""
    image, text, batch = found.image.float(), found.text.float(), config.batch
    each = len(text) // len(image)
    text_ids = ids.repeat_interleave(each)
    if not batch.multi_positive:  # every pair has a number of its own
        image = image.repeat_interleave(each, 0)
        first = fitting.accelerator.process_index * len(text)
        ids = text_ids = torch.arange(first, first + len(text), device=ids.device)
    own = Embeddings(image, text, ids, text_ids)
    every = own.of_all_processes()
    if found.bias is not None:
        return siglip_loss(own, found.scale, found.bias, every, batch.loss_chunk)
    return clip_loss(own, found.scale, every, batch.loss_chunk)


def contrast_share(fitting: Fitting, config: TrainConfig, step: Step, number: int) -> tuple[torch.Tensor, Embedded]:
    """Computes a part's share of the step's contrastive loss, and the model's output for it.

    A step of several parts is put together by gradient caching (Gao et al. 2021, GradCache): embeddings of all parts
    first, without their graphs; the loss and its gradient by the embeddings; then each part again with its graph.
    """
    part = step.parts[number]
    if len(step.parts) == 1:
        found = embedded(fitting, part)
        return contrastive_loss(fitting, config, found, to_device(part.ids, found.image.device)), found
    if number == 0:
        step.known = [_first_pass(fitting, config, step)]
    known: _Known = step.known[0]
    with known.random[number].again():
        found = embedded(fitting, part)
    replayed = (found.image * known.image[number]).sum() + (found.text * known.text[number]).sum()
    for output, gradient in ((found.scale, known.scale), (found.bias, known.bias)):
        if output is not None and gradient is not None:
            replayed = replayed + output * gradient / len(step.parts)
    # The value is that of the whole batch's loss, the gradient that of the replay.
    return replayed - replayed.detach() + known.loss / len(step.parts), found


class _Known(NamedTuple):
    """The loss of a step, its gradient by each part's embeddings, and the chance that each part had."""

    loss: torch.Tensor
    image: tuple[torch.Tensor, ...]
    text: tuple[torch.Tensor, ...]
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    random: list["_Chance"]


def _first_pass(fitting: Fitting, config: TrainConfig, step: Step) -> _Known:
    """Embeds all parts without their graphs, and takes the gradient of the whole loss by the embeddings."""
    chances, outputs = [], []
    with torch.no_grad(), _statistics_kept(fitting.plain):
        for part in step.parts:
            chances.append(_Chance(fitting.accelerator.device))
            outputs.append(embedded(fitting, part)._replace(logits=None))
    # Gathered anew with their graph: gradients of what other processes compare with ours come back to us.
    image = torch.cat([found.image for found in outputs]).float().requires_grad_()
    text = torch.cat([found.text for found in outputs]).float().requires_grad_()
    scale = outputs[0].scale.detach().requires_grad_()
    bias = None if outputs[0].bias is None else outputs[0].bias.detach().requires_grad_()
    ids = torch.cat([to_device(part.ids, image.device) for part in step.parts])
    with torch.enable_grad():
        loss = contrastive_loss(fitting, config, Embedded(image, text, scale, bias), ids)
        loss.backward()
    sizes = [len(part.ids) for part in step.parts]
    each = len(text) // len(image)
    assert image.grad is not None
    assert text.grad is not None
    by_image, by_text = image.grad.split(sizes), text.grad.split([size * each for size in sizes])
    return _Known(loss.detach(), by_image, by_text, scale.grad, None if bias is None else bias.grad, chances)


class _Chance:
    """The state of the random generators at a moment, so that dropout falls the same way again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Makes everything random inside as it was, and after it as it would have been."""
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


@contextmanager
def _statistics_kept(model: torch.nn.Module) -> Iterator[None]:
    """Keeps batch norms from counting what they see inside: the pictures of a first pass come again in the second."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
