"""Captions are written greedily, by beam search, or by sampling; all pictures of a batch at once.

A decoder has `begin(features)`, which returns `fixed` and `moving`, and `step(words, fixed, moving)`, which reads one
more word of each beam and returns a `NextWord`. What it knows while it writes lies in these two dicts of tensors:
`fixed` (pictures, …) never changes, `moving` (pictures, beams, …) does, and follows its beam when beams are re-ordered.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from labs_common.device import constant
from labs_common.options import DecodingOptions
from labs_common.progress import tracked

Tensors = dict[str, torch.Tensor]
GREEDY = DecodingOptions(beam=1)


class NextWord(NamedTuple):
    """A decoder's answer to one more word of each beam.

    Attributes:
        logits: of the next word (pictures, beams, vocabulary).
        moving: what the decoder knows now.
        attention: share of each place (pictures, beams, places), if it attends.
    """

    logits: torch.Tensor
    moving: Tensors
    attention: torch.Tensor | None


class Output(NamedTuple):
    """A decoder's answer to whole captions.

    Attributes:
        logits: of the word after each word (captions, words, vocabulary).
        attention: share of each place for each word (captions, words, places), if the decoder has it in training.
    """

    logits: torch.Tensor
    attention: torch.Tensor | None


class SpecialTokens(NamedTuple):
    """The numbers of a vocabulary's tokens that are no words.

    Attributes:
        start: what a decoder reads before the first word.
        end: what it writes when the caption is over.
        pad: what fills a caption after its end; it may be the end itself.
        never: those that are never written.
    """

    start: int
    end: int
    pad: int
    never: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """The captions of a batch of pictures.

    Attributes:
        words: the numbers of each caption's words, with `<end>` unless it was cut off.
        log_probabilities: of each caption, the sum over its words.
        attention: (words, places) of each caption if the decoder attends and it was asked for, else empty.
    """

    words: list[list[int]]
    log_probabilities: list[float]
    attention: list[torch.Tensor]


def written_captions(
    decoder: Any,
    features: Callable[[Sequence[int]], torch.Tensor],
    count: int,
    tokens: SpecialTokens,
    length: int,
    decode: Callable[[list[int]], str],
    options: DecodingOptions,
    accelerator: Accelerator | None = None,
    batch_size: int = 64,
    task: str = "",
) -> list[str]:
    """Writes a caption for each of `count` pictures; `features` gives what the decoder reads for their places.

    `length` is that of `write`; `decode` turns a caption's numbers into a sentence. For the rest see
    `captions_by_parts`. `top_p` samples from the process's generator.
    """

    def describe(places: Sequence[int]) -> list[str]:
        return [*map(decode, write(decoder, features(places), tokens, length, options).words)]

    return captions_by_parts(describe, count, accelerator, batch_size, task)


def captions_by_parts(
    describe: Callable[[Sequence[int]], list[str]],
    count: int,
    accelerator: Accelerator | None,
    batch_size: int,
    task: str,
) -> list[str]:
    """Describes `count` pictures, `batch_size` at once by their places.

    The processes of `accelerator` share the pictures; every one gets all captions. With a `task` it shows how far it
    has come.
    """
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(rank, count, processes)
    found: list[tuple[int, str]] = []
    starts = range(0, len(mine), batch_size)
    for first in tracked(starts, task, len(starts), bool(task) and rank == 0):
        places = list(mine[first : first + batch_size])
        with accelerator.autocast() if accelerator else contextlib.nullcontext():
            found += zip(places, describe(places), strict=True)
    everyone = gather_object(found) if processes > 1 else found
    return [caption for _, caption in sorted(everyone)]


@torch.no_grad()
def write(
    decoder: Any,
    features: torch.Tensor,
    tokens: SpecialTokens,
    length: int,
    options: DecodingOptions,
    generator: torch.Generator | None = None,
    attention: bool = False,
) -> Written:
    """Writes captions for features (pictures, …), of at most `length` words with `<end>`.

    With one beam it takes the most probable next word every time; with `top_p` one that is sampled from `generator`
    (Holtzman et al. 2020, eq. 2, 3); else see `beam_search`. `decoder` is in evaluation mode.
    """
    if options.beam > 1 and not options.top_p:
        return beam_search(decoder, features, tokens, length, options, attention)
    fixed, moving = decoder.begin(features)
    words = torch.full((len(features), 1, 1), tokens.start, device=features.device)
    total = torch.zeros(len(features), device=features.device)
    over = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    looked = []
    while words.shape[2] <= length and not bool(over.all()):
        logits, moving, seen = decoder.step(words[:, :, -1], fixed, moving)
        every = log_probabilities(logits, tokens.never, _banned(words, options, tokens, logits))
        logs = every[:, 0]  # (pictures, vocabulary)
        chosen = _sampled(logs, options, generator) if options.top_p else logs.argmax(-1)
        total += torch.where(over, 0.0, logs.gather(1, chosen[:, None])[:, 0])
        words = torch.cat([words, torch.where(over, tokens.pad, chosen)[:, None, None]], 2)
        over = over | (chosen == tokens.end)
        if attention and seen is not None:
            looked.append(seen[:, 0])
    captions = [_ended(row, tokens.end) for row in words[:, 0, 1:].tolist()]
    seen_of = torch.stack(looked, 1).cpu().unbind() if looked else ()  # of each picture (words, places)
    return Written(captions, total.tolist(), [seen[: len(row)] for seen, row in zip(seen_of, captions, strict=False)])


@torch.no_grad()
def beam_search(
    decoder: Any,
    features: torch.Tensor,
    tokens: SpecialTokens,
    length: int,
    options: DecodingOptions,
    attention: bool = False,
) -> Written:
    """Follows `options.beam` beginnings of each picture and returns the best caption that they lead to.

    They are ranked by log-probability / words ** `length_penalty`, `<end>` counting as a word. A picture leaves the
    batch when no beginning that is still open can get ahead of its best finished caption.
    """
    beams, power = options.beam, options.length_penalty
    fixed, moving = decoder.begin(features)
    moving = {name: tensor.expand(-1, beams, *tensor.shape[2:]) for name, tensor in moving.items()}
    device = features.device
    words = torch.full((len(features), beams, 1), tokens.start, device=device)
    total = torch.full((len(features), beams), -torch.inf, device=device)
    total[:, 0] = 0.0  # all beams are the same at first: only one counts
    counts = torch.zeros(len(features), beams, device=device)
    over = torch.zeros(len(features), beams, dtype=torch.bool, device=device)
    looked: torch.Tensor | None = None
    places = torch.arange(len(features), device=device)  # of the pictures that are still searched
    found: dict[int, tuple[list[int], float, list[torch.Tensor]]] = {}
    for step in range(length):
        logits, moving, seen = decoder.step(words[:, :, -1], fixed, moving)
        logs = log_probabilities(logits, tokens.never, _banned(words, options, tokens, logits))
        # A finished caption goes on as itself, and as nothing else.
        logs = logs.masked_fill(over[..., None], -torch.inf)
        logs[..., tokens.pad] = torch.where(over, 0.0, logs[..., tokens.pad])
        totals, lengths = total[..., None] + logs, (counts + ~over)[..., None].expand_as(logs)
        # The beams' next words compete with each other: (pictures, beams * vocabulary)
        _, best = (totals / lengths**power).flatten(1).topk(beams)
        beam, word = best // logs.shape[-1], best % logs.shape[-1]
        total, counts = totals.flatten(1).gather(1, best), lengths.flatten(1).gather(1, best)
        words = torch.cat([_of_beams(words, beam), word[..., None]], 2)
        over = over.gather(1, beam) | (word == tokens.end)
        moving = {name: _of_beams(tensor, beam) for name, tensor in moving.items()}
        if attention and seen is not None:
            now = _of_beams(seen, beam)[:, :, None]
            looked = now if looked is None else torch.cat([_of_beams(looked, beam), now], 2)
        score = total / counts**power
        finished = score.masked_fill(~over, -torch.inf).amax(1)
        # Probabilities only fall: this is the most that an open beginning can still reach.
        reachable = (total / length**power).masked_fill(over, -torch.inf).amax(1)
        done = (finished >= reachable) | (step == length - 1)
        # Taking pictures out copies all that the beams know: fewer than a quarter cost more than they save.
        if not (bool(done.all()) or done.sum() * 4 >= len(done)):
            continue
        first = score.masked_fill(~over & (step < length - 1), -torch.inf).argmax(1)
        for place in done.nonzero()[:, 0].tolist():
            kept = int(first[place])
            said = _ended(words[place, kept, 1:].tolist(), tokens.end)
            attended = [] if looked is None else [looked[place, kept, : len(said)].cpu()]
            found[int(places[place])] = (said, float(total[place, kept]), attended)
        if bool(done.all()):
            break
        words, total, counts, over, places = (tensor[~done] for tensor in (words, total, counts, over, places))
        fixed, moving = ({name: tensor[~done] for name, tensor in part.items()} for part in (fixed, moving))
        looked = None if looked is None else looked[~done]
    captions = [found[place] for place in range(len(features))]
    maps = [seen for _, _, attended in captions for seen in attended]
    return Written([said for said, _, _ in captions], [total for _, total, _ in captions], maps)


def log_probabilities(logits: torch.Tensor, never: tuple[int, ...], banned: torch.Tensor | None = None) -> torch.Tensor:
    """Returns those of the next words (…, vocabulary), among the words but those `never` written and `banned`."""
    logits = logits.float().index_fill(-1, constant(never, logits.device).long(), -torch.inf)
    return (logits if banned is None else logits.masked_fill(banned, -torch.inf)).log_softmax(-1)


def repeating(words: torch.Tensor, size: int, vocabulary: int, tokens: SpecialTokens) -> torch.Tensor:
    """Marks the words (pictures, beams, vocabulary) that would repeat a sequence of `size` words of `words`.

    `words` (pictures, beams, length) are those so far; `<end>` is never marked.
    """
    banned = torch.zeros(*words.shape[:2], vocabulary, dtype=torch.bool, device=words.device)
    if words.shape[2] >= size:
        windows = words.unfold(2, size, 1)  # (pictures, beams, windows, size)
        begun = words[:, :, None, words.shape[2] - size + 1 :]  # (pictures, beams, 1, size - 1)
        same = (windows[..., :-1] == begun).all(-1)
        # Where nothing repeats, a word that is never written anyway is banned.
        banned.scatter_(2, torch.where(same, windows[..., -1], tokens.pad), True)
    banned[..., tokens.end] = False
    return banned


def _banned(
    words: torch.Tensor, options: DecodingOptions, tokens: SpecialTokens, logits: torch.Tensor
) -> torch.Tensor | None:
    return repeating(words, options.no_repeat, logits.shape[-1], tokens) if options.no_repeat else None


def _ended(numbers: list[int], end: int) -> list[int]:
    """Cuts a row of numbers after its first end."""
    return numbers[: numbers.index(end) + 1] if end in numbers else numbers


def _sampled(logs: torch.Tensor, options: DecodingOptions, generator: torch.Generator | None) -> torch.Tensor:
    """Samples a word for each picture from the smallest set of words that together have `top_p`."""
    shares, order = (logs / options.temperature).softmax(-1).sort(-1, descending=True)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= options.top_p, 0.0)
    return order.gather(1, sampled_places(shares, generator)[:, None])[:, 0]


def sampled_places(shares: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Samples a place (…) by its share (…, places).

    It takes the largest of shares over exponential times, as `torch.multinomial` does; but that asks the device first
    whether all shares are sound, and where a loss is no number it is the training loop's to say so.
    """
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1)


def _of_beams(tensor: torch.Tensor, beam: torch.Tensor) -> torch.Tensor:
    """Takes the entries of (pictures, beams, …) that belong to the chosen beams (pictures, beams)."""
    return tensor[torch.arange(len(beam), device=beam.device)[:, None], beam]
