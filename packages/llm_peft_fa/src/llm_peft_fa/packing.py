"""Conversations into rows without padding, and rows into optimizer steps.

An optimizer step is `batch_size` conversations, whatever the number of processes. They are spread over rows
of about equal length, as many rows as the processes can share evenly.
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

    Attributes:
        input_ids, position_ids: (1, tokens); positions restart with each conversation.
        blocks: the gathering by which attention finds the conversations, see `blocks_of`.
        predicting: (learnt,) the positions whose next token is learnt.
        targets: (learnt,) those next tokens.
        weight: the factor that makes of the row's summed loss its share of the step's mean.
        tokens: the number of tokens of conversations in the row.
        slots: (conversations, virtual tokens), where the virtual tokens of a soft prompt stand; `input_ids` are 0
            there. None without a soft prompt.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: Blocks
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
        blocks=blocks_of(lengths),
        predicting=targets_at - 1,
        targets=ids[targets_at],
        weight=weight,
        tokens=sum(len(item.ids) for item in conversations),
        slots=starts[:, None] + torch.arange(virtual) if virtual else None,
    )


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


@dataclass
class Packing:
    """The way in which the conversations of a step become rows: of every `processes`-th, from `rank` on, this one's.

    `virtual` is the number of virtual tokens that a soft prompt puts before each conversation.
    """

    tokens: int
    rank: int = 0
    processes: int = 1
    virtual: int = 0

    def rows(self, conversations: Sequence[Encoded]) -> list[PackedRow]:
        """Packs this process's rows of one step; their weighted losses add up to the mean over learnt tokens."""
        rows = spread(conversations, self.tokens, self.processes, self.virtual)
        assert sum(map(learnt_tokens, rows)) == learnt_tokens(conversations), "packing lost tokens to learn"
        weight = self.processes / max(1, learnt_tokens(conversations))
        # Every process must take part in every pass: one without a conversation repeats one at no weight.
        shortest = min(conversations, key=lambda item: len(item.ids))
        idle = replace(shortest, learnt=[False] * len(shortest.ids))
        return [
            packed_row(row, weight, self.virtual) if row else replace(packed_row([idle], 0.0, self.virtual), tokens=0)
            for row in rows[self.rank :: self.processes]
        ]

    def steps(self, conversations: Sequence[Encoded], batch_size: int, seed: int) -> ShuffledSteps:
        """Makes training data of conversations, shuffled every epoch by the seed: a step is `batch_size` of them."""
        count = len(conversations)
        return ShuffledSteps(
            count, batch_size, seed, lambda places, epoch, step: self.rows([conversations[place] for place in places]),
            lambda epoch: random.Random(f"{seed} {epoch}").sample(range(count), count),
        )  # fmt: skip
