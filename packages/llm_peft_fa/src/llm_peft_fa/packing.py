"""Conversations into rows without padding, or into padded batches, and these into optimizer steps.

An optimizer step is `batch_size` conversations, whatever the number of processes. They are spread over rows
of about equal length, as many rows as the processes can share evenly. Of a model that cannot be packed, conversations
of like length are padded to batches: what is said of rows holds for them.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import recursively_apply

from labs_common.device import pinned, to_device
from labs_common.steps import ShuffledSteps
from llm_peft_fa.attention import Blocks, blocks_of
from llm_peft_fa.templates import Encoded


@dataclass(frozen=True)
class PackedRow:
    """Conversations in one row, ready for `PackedCausalLM`.

    Padded, it is (conversations, longest) in the place of (1, tokens): positions are numbered as if it were flattened.

    Attributes:
        input_ids, position_ids: (1, tokens); positions restart with each conversation.
        blocks: the gathering by which attention finds the conversations, see `blocks_of`; None if they are padded.
        predicting: (learnt,) the positions whose next token is learnt.
        targets: (learnt,) those next tokens.
        weight: the factor that makes of the row's summed loss its share of the step's mean.
        tokens: the number of tokens of conversations in the row.
        slots: (conversations, virtual tokens), where the virtual tokens of a soft prompt stand; `input_ids` are 0
            there. None without a soft prompt.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: Blocks | None
    predicting: torch.Tensor
    targets: torch.Tensor
    weight: float
    tokens: int
    slots: torch.Tensor | None = None

    def to(self, device: torch.device) -> "PackedRow":
        """Copies the row to `device`."""
        return replace(self, **recursively_apply(lambda one: to_device(pinned(one, device), device), vars(self)))


def packed_row(conversations: Sequence[Encoded], weight: float = 1.0, virtual: int = 0) -> PackedRow:
    """Puts conversations, in this order, into a row, each with room for `virtual` virtual tokens before it."""
    blocks = blocks_of([virtual + len(item.ids) for item in conversations])
    return replace(_row(conversations, weight, virtual), blocks=blocks)


def _row(conversations: Sequence[Encoded], weight: float, virtual: int) -> PackedRow:
    room = [0] * virtual
    lengths = [virtual + len(item.ids) for item in conversations]
    ids = torch.tensor([token for item in conversations for token in (*room, *item.ids)])
    # A conversation's first token is predicted by nothing, so the row before it never predicts into it.
    learnt = torch.tensor(
        [flag for item in conversations for flag in (*map(bool, room), False, *item.learnt[1:])], dtype=torch.bool
    )
    targets_at = learnt.nonzero().flatten()
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return PackedRow(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        blocks=None,
        predicting=targets_at - 1,
        targets=ids[targets_at],
        weight=weight,
        tokens=sum(len(item.ids) for item in conversations),
        slots=starts[:, None] + torch.arange(virtual) if virtual else None,
    )


def padded_row(conversations: Sequence[Encoded], weight: float = 1.0, virtual: int = 0) -> PackedRow:
    """Pads conversations, in this order, on the right, where no token looks: a mask is not needed."""
    longest = max(len(item.ids) for item in conversations)
    padded = []
    for item in conversations:
        rest = longest - len(item.ids)
        padded.append(replace(item, ids=[*item.ids, *[0] * rest], learnt=[*item.learnt, *[False] * rest]))
    row = _row(padded, weight, virtual)
    shape = len(padded), virtual + longest
    tokens = sum(len(item.ids) for item in conversations)
    return replace(row, input_ids=row.input_ids.view(shape), position_ids=row.position_ids.view(shape), tokens=tokens)


def learnt_tokens(conversations: Sequence[Encoded]) -> int:
    """Counts the tokens that these conversations teach."""
    return sum(sum(item.learnt[1:]) for item in conversations)


def spread(conversations: Sequence[Encoded], tokens: int, multiple: int = 1, virtual: int = 0) -> list[list[Encoded]]:
    """Spreads conversations over rows of at most `tokens` tokens and about equal length, virtual tokens counted.

    The number of rows is a `multiple`, and with one less they would not do; rows may stay empty. A conversation longer
    than `tokens` gets a row that long. Longest first into the emptiest row (LPT, Graham 1969).
    """
    limit = max([tokens, *(virtual + len(item.ids) for item in conversations)])
    total = sum(virtual + len(item.ids) for item in conversations)
    longest_first = sorted(conversations, key=lambda item: -len(item.ids))
    count = -(-max(1, -(-total // limit)) // multiple) * multiple
    failed, step = count - multiple, multiple
    while (rows := _filled(longest_first, count, limit, virtual)) is None:
        failed, count, step = count, count + step, 2 * step
    while count - failed > multiple:  # halve what lies between too few rows and enough
        middle = failed + (count - failed) // multiple // 2 * multiple
        if (fewer := _filled(longest_first, middle, limit, virtual)) is None:
            failed = middle
        else:
            rows, count = fewer, middle
    return rows


def _filled(longest_first: Sequence[Encoded], count: int, limit: int, virtual: int) -> list[list[Encoded]] | None:
    """Fills `count` rows, each time the emptiest; None if one would hold more than `limit` tokens."""
    rows: list[list[Encoded]] = [[] for _ in range(count)]
    sizes = [(0, place) for place in range(count)]  # a heap: the emptiest row first, of equal ones the first
    for item in longest_first:
        size, place = sizes[0]
        longer = size + virtual + len(item.ids)
        if longer > limit:
            return None
        rows[place].append(item)
        heapq.heapreplace(sizes, (longer, place))
    return rows


def bucketed(conversations: Sequence[Encoded], tokens: int, multiple: int = 1, virtual: int = 0) -> list[list[Encoded]]:
    """Cuts conversations, longest first, into batches of at most `tokens` positions, padding and virtual tokens too.

    Less than half of a batch is padding. The number of batches is a `multiple`: the largest are halved, and some stay
    empty where there are too few conversations.
    """
    rows: list[list[Encoded]] = []
    for item in sorted(conversations, key=lambda item: -len(item.ids)):
        longest = virtual + len(rows[-1][0].ids) if rows else 0
        if rows and (len(rows[-1]) + 1) * longest <= tokens and 2 * (virtual + len(item.ids)) > longest:
            rows[-1].append(item)
        else:
            rows.append([item])
    while len(rows) % multiple:
        sizes = [len(row) * len(row[0].ids) if len(row) > 1 else 0 for row in rows]
        place = sizes.index(max(sizes))
        half = -(-len(rows[place]) // 2)
        if not sizes[place]:
            return rows + [[]] * (-len(rows) % multiple)
        rows[place : place + 1] = rows[place][:half], rows[place][half:]
    return rows


@dataclass
class Packing:
    """The way in which the conversations of a step become rows: of every `processes`-th, from `rank` on, this one's.

    `virtual` is the number of virtual tokens that a soft prompt puts before each conversation; with `padded` rows are
    padded batches. Conversations of at most `boundary` tokens share no row with longer ones, see `model.rope_boundary`.
    """

    tokens: int
    rank: int = 0
    processes: int = 1
    virtual: int = 0
    padded: bool = False
    boundary: int | None = None

    def rows(self, conversations: Sequence[Encoded]) -> list[PackedRow]:
        """Packs this process's rows of one step; their weighted losses add up to the mean over learnt tokens."""
        rows = self._cut(conversations)
        assert sum(map(learnt_tokens, rows)) == learnt_tokens(conversations), "packing lost tokens to learn"
        weight = self.processes / max(1, learnt_tokens(conversations))
        # Every process must take part in every pass: one without a conversation repeats one at no weight.
        shortest = min(conversations, key=lambda item: len(item.ids))
        idle = replace(shortest, learnt=[False] * len(shortest.ids))
        made = padded_row if self.padded else packed_row
        return [
            made(row, weight, self.virtual) if row else replace(made([idle], 0.0, self.virtual), tokens=0)
            for row in rows[self.rank :: self.processes]
        ]

    def padding(self, conversations: Sequence[Encoded], batch_size: int, seed: int) -> float:
        """Tells which share of the positions of an epoch's batches is padding."""
        places = _order(len(conversations), seed, 0)
        steps = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
        rows = [row for step in steps for row in self._cut([conversations[place] for place in step]) if row]
        positions = sum(len(row) * max(len(item.ids) for item in row) for row in rows) if self.padded else 0
        return 1 - sum(len(item.ids) for item in conversations) / positions if positions else 0.0

    def _cut(self, conversations: Sequence[Encoded]) -> list[list[Encoded]]:
        cut = bucketed if self.padded else spread
        sides: dict[bool, list[Encoded]] = {}
        for item in conversations:
            sides.setdefault(self.boundary is not None and len(item.ids) > self.boundary, []).append(item)
        return [row for side in sides.values() for row in cut(side, self.tokens, self.processes, self.virtual)]

    def steps(self, conversations: Sequence[Encoded], batch_size: int, seed: int) -> ShuffledSteps:
        """Makes training data of conversations, shuffled every epoch by the seed: a step is `batch_size` of them."""
        count = len(conversations)
        return ShuffledSteps(
            count, batch_size, seed, lambda places, epoch, step: self.rows([conversations[place] for place in places]),
            lambda epoch: _order(count, seed, epoch),
        )  # fmt: skip


def _order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(count), count)
