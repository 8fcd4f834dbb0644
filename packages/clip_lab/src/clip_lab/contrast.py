"""The parts of a step's loss, and gradient caching: batches larger than what goes through the towers at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from clip_lab.batches import Part, Step, augmented, normalised
from clip_lab.fitting import Fitting
from clip_lab.model import Embedded, places_of_end
from clip_lab.objectives import caption_loss, clip_loss, gathered, siglip_loss, suffix_targets


def embedded(fitting: Fitting, part: Part) -> Embedded:
    """The prepared model's output for a part, on its device."""
    device = fitting.accelerator.device
    found: Embedded = fitting.model(pictures_of(fitting, part), part.words.to(device))
    return found


def pictures_of(fitting: Fitting, part: Part) -> torch.Tensor:
    """A part's pictures as the image tower reads them, or what it made of them if it is frozen; on the device."""
    device = fitting.accelerator.device
    pictures = part.pictures.to(device)
    if pictures.dim() == 2:  # what the frozen tower made of them
        return pictures
    crops = None if part.crops is None else part.crops.to(device)
    return normalised(augmented(pictures, crops), fitting.plain.image)


def contrast_share(fitting: Fitting, step: Step, number: int) -> tuple[torch.Tensor, Embedded]:
    """A part's share of the step's contrastive loss, and the model's output for it.

    A step of several parts is put together by gradient caching (Gao et al. 2021, GradCache): embeddings of all parts
    first, without their graphs; the loss and its gradient by the embeddings; then each part again with its graph.
    """
    part = step.parts[number]
    if len(step.parts) == 1:
        found = embedded(fitting, part)
        loss = contrastive_loss(fitting, found, part.ids.to(found.image.device))
        return loss, found
    if number == 0:
        step.known = [known_gradients(fitting, step)]
    known: Known = step.known[0]
    with known.random[number].again():
        found = embedded(fitting, part)
    image, text = known.image[number], known.text[number]
    replayed = (found.image * image).sum() + (found.text * text).sum()
    for output, gradient in ((found.scale, known.scale), (found.bias, known.bias)):
        if output is not None and gradient is not None:
            replayed = replayed + output * gradient / len(step.parts)
    # The value is that of the whole batch's loss, the gradient that of the replay.
    return replayed - replayed.detach() + known.loss / len(step.parts), found


def contrastive_loss(fitting: Fitting, found: Embedded, ids: torch.Tensor) -> torch.Tensor:
    """This process's loss of its pictures and captions against those of all processes; its mean is the whole loss."""
    image, text, batch = found.image.float(), found.text.float(), fitting.config.batch
    each = len(text) // len(image)
    text_ids = ids.repeat_interleave(each)
    if not batch.multi_positive:  # every pair has a number of its own
        image = image.repeat_interleave(each, 0)
        first = fitting.accelerator.process_index * len(text)
        ids = text_ids = torch.arange(first, first + len(text), device=ids.device)
    columns = gathered(image, text, ids, text_ids)
    if found.bias is not None:
        return siglip_loss(image, text, found.scale, found.bias, ids, text_ids, columns, batch.loss_chunk)
    return clip_loss(image, text, found.scale, ids, text_ids, columns, batch.loss_chunk)


class Known(NamedTuple):
    """The loss of a step, its gradient by each part's embeddings, and the chance that each part had."""

    loss: torch.Tensor
    image: tuple[torch.Tensor, ...]
    text: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    bias: torch.Tensor | None
    random: list["Chance"]


def known_gradients(fitting: Fitting, step: Step) -> Known:
    """The first pass of gradient caching."""
    chances, outputs = [], []
    with torch.no_grad(), _statistics_kept(fitting.plain):
        for part in step.parts:
            chances.append(Chance(fitting.accelerator.device))
            found = embedded(fitting, part)
            outputs.append(found._replace(logits=None))
    # Gathered anew with their graph: gradients of what other processes compare with ours come back to us.
    image = torch.cat([found.image for found in outputs]).float().requires_grad_()
    text = torch.cat([found.text for found in outputs]).float().requires_grad_()
    scale = outputs[0].scale.detach().requires_grad_()
    bias = None if outputs[0].bias is None else outputs[0].bias.detach().requires_grad_()
    ids = torch.cat([part.ids for part in step.parts]).to(image.device)
    with torch.enable_grad():
        loss = contrastive_loss(fitting, Embedded(image, text, scale, bias), ids)
        loss.backward()
    sizes = [len(part.ids) for part in step.parts]
    each = len(text) // len(image)
    assert image.grad is not None
    assert text.grad is not None
    assert scale.grad is not None
    return Known(
        loss.detach(), image.grad.split(sizes), text.grad.split([size * each for size in sizes]), scale.grad,
        None if bias is None else bias.grad, chances,
    )  # fmt: skip


class Chance:
    """The state of the random generators at a moment, so that dropout falls the same way again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Everything random inside is as it was; after it, as it would have been."""
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


@contextmanager
def _statistics_kept(model: torch.nn.Module) -> Iterator[None]:
    """Batch norms do not count what they see inside."""
    norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, tracked), count in zip(norms, before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)


def caption_share(fitting: Fitting, part: Part, logits: torch.Tensor) -> torch.Tensor:
    """A part's share of the mean loss over all words of the step that follow their captions' prefixes."""
    words = part.words.to(logits.device)
    targets = suffix_targets(words, part.prefix.to(logits.device), places_of_end(fitting.plain, words))
    return caption_loss(logits.float(), targets) * part.of_words


def suffix_share(fitting: Fitting, part: Part) -> torch.Tensor:
    """The same for SimVLM, which reads the prefix as it reads the picture."""
    device = fitting.accelerator.device
    logits = fitting.model(pictures_of(fitting, part), part.words.to(device), part.prefix.to(device))
    return caption_share(fitting, part, logits)
