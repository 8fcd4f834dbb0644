"""Persian conversations whose answers can be checked, and plain text about the same small world.

Everything is generated: numbers in digits and words, arithmetic, ordering, plurals, opposites, the Jalali
calendar, capitals, units, counting letters, copying, yes and no. Each task is a list of items (what is
asked, and its one right answer), several ways to ask, and several ways to say the fact in prose. A fixed
fifth of the items of every task is held out: no training conversation asks about them.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from num2words import num2words

from llm_peft_fa import persian_words as words

Item = tuple[dict[str, str], str]  # the fields of the question, the answer


@dataclass(frozen=True)
class Task:
    """One kind of question. `questions` and `facts` are patterns over an item's fields; facts also use {answer}."""

    items: list[Item]
    questions: tuple[str, ...]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question in words, its one right answer, and the task it belongs to."""

    task: str
    text: str
    answer: str


def persian_digits(number: int) -> str:
    """The number in Persian digits: 21 gives ۲۱."""
    return str(number).translate({ord("0") + digit: chr(0x06F0 + digit) for digit in range(10)})


def number_words(number: int) -> str:
    """The number in Persian words: 21 gives بیست و یک (num2words)."""
    return str(num2words(number, lang="fa")).strip()


def held_out(task: str, fields: dict[str, str]) -> bool:
    """Whether an item is kept for the test: a fixed fifth, the same on every machine."""
    return zlib.crc32(f"{task} {sorted(fields.items())}".encode()) % 5 == 0


def questions(count: int, seed: int, test: bool = False) -> Iterator[Question]:
    """Yields `count` random questions, tasks in equal shares; held-out items if `test`, the others if not."""
    draw = random.Random(f"{seed} {test}")
    pools = {name: [item for item in task.items if held_out(name, item[0]) == test] for name, task in TASKS.items()}
    names = sorted(TASKS)
    for number in range(count):
        name = names[number % len(names)]
        fields, answer = draw.choice(pools[name])
        yield Question(name, draw.choice(TASKS[name].questions).format(**fields), answer)


def conversations(count: int, seed: int, test: bool = False) -> Iterator[list[dict[str, str]]]:
    """Yields `count` conversations of user and assistant messages.

    A third of the training conversations has two or three exchanges and a tenth a system message, as real
    ones do; test conversations are single questions.
    """
    draw = random.Random(f"turns {seed} {test}")
    asked = list(questions(count if test else 3 * count, seed, test))
    if not test:
        draw.shuffle(asked)
    for number in range(count):
        turns = 1 if test or draw.random() < 2 / 3 else draw.choice((2, 3))
        picked = asked[number : number + 1] if test else [asked.pop() for _ in range(min(turns, len(asked)))]
        messages = [] if test or draw.random() < 0.9 else [{"role": "system", "content": words.SYSTEM}]
        for question in picked:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": question.answer})
        yield messages


def plain_text(count: int, seed: int) -> Iterator[str]:
    """Yields `count` paragraphs about the whole world, held-out items too, for pre-training.

    Two thirds state facts; a third asks and answers in running prose. There is no chat format in it: the
    base model knows the language and the facts and has not learnt to follow an instruction.
    """
    draw = random.Random(f"text {seed}")
    names = sorted(TASKS)
    for _ in range(count):
        sentences = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            task = TASKS[draw.choice(names)]
            fields, answer = draw.choice(task.items)
            if draw.random() < 0.5:
                asked = draw.choice(task.questions).format(**fields)
                sentences.append(draw.choice(words.ASKED_AND_ANSWERED).format(question=asked, answer=answer))
            else:
                sentences.append(draw.choice(task.facts).format(**fields, answer=answer))
        yield " ".join(sentences)


def _numbers_to_words() -> list[Item]:
    return [({"x": persian_digits(n)}, number_words(n)) for n in range(100)]


def _words_to_numbers() -> list[Item]:
    return [({"x": number_words(n)}, persian_digits(n)) for n in range(100)]


def _sums() -> list[Item]:
    return [
        ({"x": persian_digits(a), "y": persian_digits(b)}, persian_digits(a + b))
        for a, b in product(range(11), repeat=2)
    ]


def _differences() -> list[Item]:
    return [
        ({"x": persian_digits(a), "y": persian_digits(b)}, persian_digits(a - b))
        for a, b in product(range(16), range(11))
        if a >= b
    ]


def _orderings() -> list[Item]:
    draw = random.Random("ordering")
    triples = sorted({tuple(draw.sample(range(10), 3)) for _ in range(400)})
    return [
        ({"x": "، ".join(map(persian_digits, triple))}, "، ".join(map(persian_digits, sorted(triple))))
        for triple in triples
    ]


def _pairs(pairs: list[tuple[str, str]], both_ways: bool = False) -> list[Item]:
    turned = [(right, left) for left, right in pairs] if both_ways else []
    return [({"x": left}, right) for left, right in [*pairs, *turned]]


def _followers(cycle: list[str]) -> list[Item]:
    return [({"x": name}, cycle[(place + 1) % len(cycle)]) for place, name in enumerate(cycle)]


def _conversions() -> list[Item]:
    return [
        ({"x": persian_digits(n), "large": large, "small": small}, f"{persian_digits(n * factor)} {small}")
        for (large, small, factor), n in product(words.UNITS, range(1, 10))
    ]


def _letter_counts() -> list[Item]:
    return [({"x": word}, persian_digits(len(word))) for word in words.NOUNS]


def _copies() -> list[Item]:
    draw = random.Random("copying")
    pairs = sorted({tuple(draw.sample(words.NOUNS, 2)) for _ in range(400)})
    return [({"x": f"{first} {second}"}, f"{first} {second}") for first, second in pairs]


def _comparisons() -> list[Item]:
    return [
        ({"x": persian_digits(a), "y": persian_digits(b)}, "بله" if a > b else "خیر")
        for a, b in product(range(21), repeat=2)
        if a != b
    ]


TASKS: dict[str, Task] = {
    "number to words": Task(_numbers_to_words(), *words.NUMBER_TO_WORDS),
    "words to number": Task(_words_to_numbers(), *words.WORDS_TO_NUMBER),
    "sum": Task(_sums(), *words.SUM),
    "difference": Task(_differences(), *words.DIFFERENCE),
    "ordering": Task(_orderings(), *words.ORDERING),
    "plural": Task([({"x": word}, f"{word}\u200cها") for word in words.NOUNS], *words.PLURAL),
    "opposite": Task(_pairs(words.OPPOSITES, both_ways=True), *words.OPPOSITE),
    "next month": Task(_followers(words.MONTHS), *words.NEXT_MONTH),
    "month by number": Task(
        [({"x": number_words(n)}, month) for n, month in enumerate(words.MONTHS, 1)], *words.MONTH_BY_NUMBER
    ),
    "next weekday": Task(_followers(words.WEEKDAYS), *words.NEXT_WEEKDAY),
    "capital": Task(_pairs(words.CAPITALS), *words.CAPITAL),
    "units": Task(_conversions(), *words.UNIT),
    "letter count": Task(_letter_counts(), *words.LETTER_COUNT),
    "copying": Task(_copies(), *words.COPYING),
    "yes or no": Task(_comparisons(), *words.YES_OR_NO),
}
