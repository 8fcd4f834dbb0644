"""Captions as words and words as numbers; the same as a Hugging Face `tokenizer.json`."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from caption_lab.config import VocabularyOptions
from labs_common.decoding import Output, SpecialTokens
from labs_common.errors import LabError, json_of
from labs_common.run import write_atomically
from labs_common.sharding import is_sharded

# The first words of every vocabulary, and what each is for.
PURPOSES = {
    "<pad>": "fills a caption up to the length of the longest beside it; nothing is learnt from it",
    "<start>": "what the model reads before the first word",
    "<end>": "what it writes when the caption is over: without it, it could not stop",
    "<unk>": "stands for a word that is too rare to be learnt; it is never written",
}
SPECIAL = tuple(PURPOSES)
PAD, START, END, UNK = range(4)
TOKENS = SpecialTokens(START, END, PAD, (PAD, START, UNK))
FILE, TOKENIZER = "vocabulary.json", "tokenizer.json"
GROUP = 16  # captions that are read together on a CPU: fewer leave less padding, and slower matrix products
COVERED = 0.99  # share of the training captions that are not cut; the few longest would lengthen every batch


@dataclass(frozen=True)
class Cleaning:
    """The rules for capitals, punctuation, digits and symbols; see `VocabularyOptions`.

    What is not kept becomes a space, but for apostrophes, which vanish; what is kept is a word of its own.
    """

    lowercase: bool = True
    punctuation: bool = False
    digits: bool = True
    symbols: bool = False

    @cached_property
    def normalizer(self) -> Any:
        """The part that changes characters, as `tokenizers` does it."""
        steps: list[Any] = [normalizers.NFC()]
        if self.lowercase:
            steps.append(normalizers.Lowercase())
        if not self.punctuation:
            steps.append(normalizers.Replace(Regex("['’]"), ""))
        dropped = {r"\p{P}": self.punctuation, r"\p{S}": self.symbols, r"\p{N}": self.digits}
        steps += [normalizers.Replace(Regex(kind), " ") for kind, kept in dropped.items() if not kept]
        return normalizers.Sequence(steps)

    @cached_property
    def splitter(self) -> Any:
        """The part that finds words."""
        return pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[\p{P}\p{S}]"), "isolated")]
        )

    def words(self, caption: str) -> list[str]:
        """Splits a caption into its words."""
        return [word for word, _ in self.splitter.pre_tokenize_str(self.normalizer.normalize_str(caption))]


def cleaning_of(options: VocabularyOptions) -> Cleaning:
    """Returns the rules that the options ask for."""
    return Cleaning(options.lowercase, options.punctuation, options.digits, options.symbols)


@dataclass(frozen=True)
class Vocabulary:
    """Words by number, the special tokens first.

    Attributes:
        words: all of them.
        cleaning: how captions become words.
        length: most words of a caption that the model is trained on.
    """

    words: tuple[str, ...]
    cleaning: Cleaning
    length: int

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The same as a tokenizer of Hugging Face, which puts `<start>` and `<end>` around the words."""
        numbers = {word: number for number, word in enumerate(self.words)}
        tokenizer = Tokenizer(WordLevel(numbers, unk_token=SPECIAL[UNK]))
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.encode_special_tokens = True  # a caption that contains "<end>" does not end there
        tokenizer.normalizer = self.cleaning.normalizer
        tokenizer.pre_tokenizer = self.cleaning.splitter
        ends = [(SPECIAL[START], START), (SPECIAL[END], END)]
        tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
        return tokenizer

    def encode(self, caption: str) -> list[int]:
        """Turns a caption into numbers: `<start>`, the first `length` words, `<end>`."""
        numbers: list[int] = self.tokenizer.encode(caption).ids
        return [*numbers[: self.length + 1], END] if len(numbers) > self.length + 2 else numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """Joins the words between `<start>` and the first `<end>` with spaces."""
        found = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                found.append(self.words[number])
        return " ".join(found)

    def save(self, folder: Path) -> None:
        """Writes `vocabulary.json` and `tokenizer.json`, each in one move."""
        said = {"words": self.words, "cleaning": asdict(self.cleaning), "length": self.length}
        write_atomically(folder / FILE, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
        write_atomically(folder / TOKENIZER, self.for_others().to_str(pretty=True) + "\n")

    def for_others(self) -> Tokenizer:
        """Returns a tokenizer that gives captions of one length, cut as `encode` does, with a mask of the padding."""
        fixed, length = Tokenizer.from_str(self.tokenizer.to_str()), self.length + 2
        fixed.enable_truncation(length)
        fixed.enable_padding(pad_id=PAD, pad_token=SPECIAL[PAD], length=length)
        return fixed


def load_vocabulary(folder: Path) -> Vocabulary:
    """Reads what `Vocabulary.save` wrote.

    Raises:
        LabError: it is missing or broken.
    """
    said = json_of(folder / FILE, str(folder / FILE))
    try:
        found = Vocabulary(tuple(said["words"]), Cleaning(**said["cleaning"]), int(said["length"]))
        if not all(isinstance(word, str) for word in found.words) or not 0 < found.length < 2**31:
            raise ValueError("words must be texts, and a caption have one at least")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise LabError(f"{folder / FILE}: cannot be read ({error})") from error
    if found.words[: len(SPECIAL)] != SPECIAL:
        raise LabError(f"{folder / FILE}: does not begin with {' '.join(SPECIAL)}")
    return found


def build_vocabulary(captions: Iterable[str], options: VocabularyOptions) -> Vocabulary:
    """Collects the words of these (training) captions, most frequent first, equal ones by alphabet.

    Raises:
        LabError: no word is frequent enough.
    """
    cleaning = cleaning_of(options)
    cleaned = [cleaning.words(caption) for caption in captions]
    counts = Counter(word for words in cleaned for word in words if word not in SPECIAL)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = [word for word, count in ranked if count >= options.min_count]
    if options.vocabulary_size:
        kept = kept[: options.vocabulary_size]
    if not kept:
        raise LabError(f"--min-count {options.min_count}: no word occurs so often in {len(cleaned)} captions")
    length = options.max_length or covering_length([len(words) for words in cleaned])
    return Vocabulary((*SPECIAL, *kept), cleaning, length)


def covering_length(lengths: Sequence[int]) -> int:
    """Returns the smallest length that `COVERED` of the captions do not exceed."""
    ordered = sorted(lengths)
    return max(1, ordered[math.ceil(COVERED * len(ordered)) - 1])


def padded(captions: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads captions to one tensor (captions, longest), and returns with it a mask that is true at words."""
    longest = max(map(len, captions))
    numbers = torch.full((len(captions), longest), PAD)
    for row, caption in enumerate(captions):
        numbers[row, : len(caption)] = torch.tensor(caption)
    return numbers, numbers != PAD


def longest_first(words: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Returns an order of captions (captions,) and the number of them, the first ones, that go on at each position.

    Nothing has to be read from `<end>` on, and on a CPU it would cost as much as words: four tenths of a batch. A GPU
    computes a few captions as fast as many, and would be waited for: there all of them go on, as with --plan.
    """
    captions, length = words.shape
    if words.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(words, FakeTensor):
        return torch.arange(captions, device=words.device), [captions] * length
    goes_on = (words != PAD) & (words != END)
    return goes_on.sum(1).argsort(descending=True, stable=True), goes_on.sum(0).tolist()


def in_groups(
    module: nn.Module,
    read: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    words: torch.Tensor,
    of: torch.Tensor | None,
) -> Output:
    """Calls `read` for captions of about one length at a time, see `longest_first`; all logits come in one tensor.

    Where the weights of `module` are spread over processes it is called once, as often as in the others.
    """
    order, counts = longest_first(words)
    captions, length = words.shape
    if min(counts) == captions or is_sharded(module):
        return Output(read(words, of), None)
    found, places = [], []
    for first in range(0, captions, GROUP):
        chosen, longest = order[first : first + GROUP], sum(count > first for count in counts)
        found.append(read(words[chosen, :longest], chosen if of is None else of[chosen]).flatten(0, 1))
        places.append((chosen[:, None] * length + torch.arange(longest)).flatten())
    packed = torch.cat(found)  # (words, vocabulary)
    whole = packed.new_zeros(captions * length, packed.shape[1]).index_copy(0, torch.cat(places), packed)
    return Output(whole.unflatten(0, (captions, length)), None)
