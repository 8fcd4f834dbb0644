"""Tokenizing from space to space, for the tokenizers that never join what stands on both sides of one.

Byte-level BPE cuts a text by a regular expression before it merges. Those of GPT-2, Llama 3 and Qwen 2 match a space
only as their first character or behind white space, so what begins with a space behind something else becomes the same
tokens wherever it stands. Most such pieces were met before: a look-up takes a third of the time of tokenizing, most of
which goes into the expression and into where each byte came from. Others (SentencePiece, Gemma) merge over spaces, and
are not cut.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

Piece = tuple[list[int], list[tuple[int, int]]]  # ids, and which characters each covers

CUT = re.compile(r" (?<=\S )")  # begins with the space, for which the text is searched ten times as fast
REMEMBERED = 150_000  # tokens: some 20 MB in each process
LONGEST = 32  # tokens of a piece that is remembered: what is longer (a link, Chinese, base64) hardly comes again
# Of `Split` before ByteLevel, as in tokenizer.json: Llama 3's, and Qwen's with single digits.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PATTERNS = [PATTERN % digits for digits in ("{1,3}", "")]


class Known(dict[str, Piece]):
    """The look-up of pieces; `tokens` is how many they have together."""

    tokens = 0


class Pieces:
    """The tokens of a text; as much of the class Encoding of `tokenizers` as is asked for.

    Attributes:
        ids: of all tokens.
    """

    def __init__(self, pieces: Sequence[Piece], texts: Sequence[str]) -> None:
        self._pieces = pieces
        self.ids = list(chain.from_iterable(ids for ids, _ in pieces))
        self._first = list(accumulate((len(ids) for ids, _ in pieces), initial=0))  # token of each piece
        self._start = list(accumulate((len(text) + 1 for text in texts), initial=-1))  # the space before each

    def __len__(self) -> int:
        return len(self.ids)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Returns where the characters of a token begin and end in the text."""
        place = bisect_right(self._first, token) - 1
        begin, end = self._pieces[place][1][token - self._first[place]]
        return self._start[place] + begin, self._start[place] + end

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """The places of all tokens, as `token_to_chars` gives them."""
        return [self.token_to_chars(token) for token in range(len(self))]


def in_pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Pieces] | None:
    """Tokenizes texts, without special tokens around them; None if this tokenizer's tokens may go over a space."""
    known = _known(tokenizer, len(tokenizer))
    if known is None:
        return None
    cut = [CUT.split(text) for text in texts]
    if known.tokens > REMEMBERED:
        known.clear()
        known.tokens = 0
    # The first may begin with white space and the last end with it; all between end with something else, so that they
    # can be tokenized one after the other. Behind a letter: some tokenizers say of a text's first token that it covers
    # the space before it.
    missing = list({piece for pieces in cut for piece in pieces[1:-1]} - known.keys())
    lasts = [f"x {pieces[-1]}" for pieces in cut if len(pieces) > 1]
    all_missing, *ends = _encoded(tokenizer, [" ".join(["x", *missing]), *(pieces[0] for pieces in cut), *lasts])
    known.update(zip(missing, _apart(all_missing, missing), strict=True))
    last = iter(ends[len(cut) :])
    found = []
    for pieces, (ids, offsets) in zip(cut, ends, strict=False):
        first = ids, [(begin + 1, end + 1) for begin, end in offsets]
        rest = [known[piece] for piece in pieces[1:-1]] + [_apart(next(last), pieces[-1:])[0] for _ in pieces[1:2]]
        found.append(Pieces([first, *rest], pieces))
    for piece in missing:
        if len(known[piece][0]) > LONGEST:
            del known[piece]
        else:
            known.tokens += len(known[piece][0])
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Piece]:
    # Not verbose: all missing pieces together may be longer than the model reads, which is no reason for a warning.
    out: Any = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [(ids, encoding.offsets) for ids, encoding in zip(out["input_ids"], out.encodings, strict=True)]


def _apart(joined: Piece, pieces: Sequence[str]) -> list[Piece]:
    """Takes the tokens of pieces, each behind a space, out of those of a letter and all of them."""
    starts = list(accumulate((len(piece) + 1 for piece in pieces), initial=1))  # of the spaces
    ids, offsets = joined
    tokens = [*(bisect_left(offsets, start, key=itemgetter(0)) for start in starts[:-1]), len(ids)]
    return [
        (ids[first:last], [(begin - start, end - start) for begin, end in offsets[first:last]])
        for start, first, last in zip(starts, tokens, tokens[1:], strict=False)
    ]


@lru_cache(maxsize=4)
def _known(tokenizer: PreTrainedTokenizerBase, size: int) -> Known | None:
    """Begins the look-up of a tokenizer of so many tokens, if it cuts at spaces."""
    backend: Any = tokenizer.backend_tokenizer
    normalizer, cuts = backend.normalizer, backend.pre_tokenizer
    if cuts is None or not isinstance(backend.model, BPE) or backend.model.dropout:
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__()) != {"type": "NFC"}:
        return None
    said = json.loads(cuts.__getstate__())
    *before, last = said.get("pretokenizers", [said])
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == bool(before):
        return None
    if before and before not in [[SPLIT | {"pattern": {"Regex": pattern}}] for pattern in PATTERNS]:
        return None
    # One that takes the space behind it with it, or holds one, is not the same without what is there; nor is one that
    # begins with a space and asks what is before it.
    for token in backend.get_added_tokens_decoder().values():
        if token.rstrip or CUT.search(token.content) or (token.single_word and token.content.startswith(" ")):
            return None
    return Known()
