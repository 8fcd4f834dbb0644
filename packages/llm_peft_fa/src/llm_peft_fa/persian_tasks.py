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
from itertools import islice, permutations, product, zip_longest

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


def questions(count: int, seed: int) -> Iterator[Question]:
    """Yields `count` random questions, tasks in equal shares, none about a held-out item."""
    draw = random.Random(f"questions {seed}")
    pools = {name: [item for item in task.items if not held_out(name, item[0])] for name, task in TASKS.items()}
    names = sorted(TASKS)
    for number in range(count):
        name = names[number % len(names)]
        fields, answer = draw.choice(pools[name])
        yield Question(name, draw.choice(TASKS[name].questions).format(**fields), answer)


def test_questions(seed: int) -> Iterator[Question]:
    """Yields every held-out item once, in a random phrasing; tasks take turns until each has run out."""
    draw = random.Random(f"test {seed}")
    queues = []
    for name, task in sorted(TASKS.items()):
        kept = [item for item in task.items if held_out(name, item[0])]
        asked = [Question(name, draw.choice(task.questions).format(**fields), answer) for fields, answer in kept]
        queues.append(draw.sample(asked, len(asked)))
    for round_of_questions in zip_longest(*queues):
        yield from filter(None, round_of_questions)


def conversations(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yields `count` training conversations of user and assistant messages.

    A third has two or three exchanges and a tenth a system message, as real ones do.
    """
    draw = random.Random(f"turns {seed}")
    asked = list(questions(3 * count, seed))
    draw.shuffle(asked)
    for _ in range(count):
        turns = 1 if draw.random() < 2 / 3 else draw.choice((2, 3))
        messages = [] if draw.random() < 0.9 else [{"role": "system", "content": words.SYSTEM}]
        for question in [asked.pop() for _ in range(turns)]:
            messages += _exchange(question)
        yield messages


def test_conversations(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yields up to `count` conversations of one exchange each, all about held-out items."""
    for question in islice(test_questions(seed), count):
        yield _exchange(question)


def _exchange(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]


def plain_text(count: int, seed: int) -> Iterator[str]:
    """Yields `count` paragraphs about the whole world, held-out items too, for pre-training.

    Prose that states facts or tells of questions and answers, and questions with their answers in the
    layouts of books and forums. One layout has the words user and model as headings, and turn tokens occur as
    stray marks; the whole chat format does not occur. Fine-tuning has to bring out in that format what is known.
    """
    draw = random.Random(f"text {seed}")
    names = sorted(TASKS)
    weights = [len(TASKS[name].items) ** 0.7 for name in names]  # facts of small tasks are seen often enough
    for _ in range(count):
        before, between = draw.choice(words.LAYOUTS)
        as_list = draw.random() < 0.8
        pieces = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            task = TASKS[draw.choices(names, weights)[0]]
            fields, answer = draw.choice(task.items)
            asked = draw.choice(task.questions).format(**fields)
            if as_list:
                pieces.append(f"{before}{asked}{between}{answer}.")
            elif draw.random() < 0.2:
                pieces.append(draw.choice(words.ASKED_AND_ANSWERED).format(question=asked, answer=answer))
            else:
                pieces.append(draw.choice(task.facts).format(**fields, answer=answer))
        marks = "".join(draw.choices(words.STRAY_MARKS, k=draw.choice((0, 0, 1, 2))))
        yield ("\n" if as_list else " ").join(pieces) + marks + "\n"


def _numbers_to_words() -> list[Item]:
    return [({"x": persian_digits(n)}, number_words(n)) for n in range(60)]


def _words_to_numbers() -> list[Item]:
    return [({"x": number_words(n)}, persian_digits(n)) for n in range(60)]


def _sums() -> list[Item]:
    return [
        ({"x": persian_digits(a), "y": persian_digits(b)}, persian_digits(a + b))
        for a, b in product(range(1, 9), repeat=2)
    ]


def _differences() -> list[Item]:
    return [
        ({"x": persian_digits(a), "y": persian_digits(b)}, persian_digits(a - b))
        for a, b in product(range(1, 10), repeat=2)
        if a > b
    ]


def _orderings() -> list[Item]:
    triples = permutations(range(1, 6), 3)
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
        for (large, small, factor), n in product(words.UNITS, range(1, 5))
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
        for a, b in product(range(11), repeat=2)
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
