"""Generated Persian conversations whose answers can be checked, and plain text about the same small world.

The tasks are numbers in digits and words, arithmetic, ordering, plurals, opposites, the Jalali calendar, capitals,
units, counting letters, copying, yes and no. Each is a list of items (the fields of a question, and its one right
answer), several ways to ask, and several ways to say the fact in prose. Of the items of every task about a fifth is
for validation and another fifth for the test: no training conversation asks about them. The recipe of the tiny base and
the methods' defaults were chosen with the former in sight; the latter were drawn when all that stood.
"""

import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, permutations, product, zip_longest
from typing import Literal

from num2words import num2words

SYSTEM = "تو دستیار فارسی‌زبان هستی و کوتاه و درست پاسخ می‌دهی."

ASKED_AND_ANSWERED = (
    "کسی پرسید: {question} و پاسخ این بود: {answer}.",
    "می‌پرسند {question} می‌گوییم {answer}.",
    "اگر بپرسی {question} پاسخ درست {answer} است.",
    "پرسش: {question} پاسخ: {answer}.",
)

# The layouts in which books and forums set a question and its answer: text before the one, and between the two.
LAYOUTS = (
    ("", "\n"), ("", "\n\n"), ("پرسش:\n", "\nپاسخ:\n"), ("س:\n", "\n\nج:\n"), ("user\n", "\n\nmodel\n"),
    ("#\n", "\n#\n"), ("— ", "\n— "),
)  # fmt: skip

# Left over at the end of a paragraph, so that the tokens of the chat format are known as marks.
STRAY_MARKS = ("<start_of_turn>", "<end_of_turn>", "user", "model", "\n")

MONTHS = [
    "فروردین", "اردیبهشت", "خرداد", "تیر", "مرداد", "شهریور",
    "مهر", "آبان", "آذر", "دی", "بهمن", "اسفند",
]  # fmt: skip

WEEKDAYS = ["شنبه", "یکشنبه", "دوشنبه", "سه‌شنبه", "چهارشنبه", "پنجشنبه", "جمعه"]

CAPITALS = [
    ("ایران", "تهران"), ("فرانسه", "پاریس"), ("آلمان", "برلین"), ("ایتالیا", "رم"), ("اسپانیا", "مادرید"),
    ("ژاپن", "توکیو"), ("چین", "پکن"), ("روسیه", "مسکو"), ("ترکیه", "آنکارا"), ("عراق", "بغداد"),
    ("افغانستان", "کابل"), ("مصر", "قاهره"), ("یونان", "آتن"), ("پرتغال", "لیسبون"), ("اتریش", "وین"),
    ("سوئد", "استکهلم"), ("نروژ", "اسلو"), ("فنلاند", "هلسینکی"), ("دانمارک", "کپنهاگ"), ("لهستان", "ورشو"),
    ("کوبا", "هاوانا"), ("پرو", "لیما"), ("شیلی", "سانتیاگو"), ("کنیا", "نایروبی"), ("سوریه", "دمشق"),
    ("لبنان", "بیروت"), ("اردن", "امان"), ("قطر", "دوحه"), ("عمان", "مسقط"), ("ارمنستان", "ایروان"),
    ("گرجستان", "تفلیس"), ("تاجیکستان", "دوشنبه"), ("مجارستان", "بوداپست"), ("بلغارستان", "صوفیه"),
    ("انگلستان", "لندن"), ("کانادا", "اتاوا"), ("هند", "دهلی نو"), ("پاکستان", "اسلام‌آباد"),
]  # fmt: skip

OPPOSITES = [
    ("بزرگ", "کوچک"), ("بلند", "کوتاه"), ("گرم", "سرد"), ("روز", "شب"), ("خوب", "بد"), ("زشت", "زیبا"),
    ("سیاه", "سفید"), ("تند", "کند"), ("سبک", "سنگین"), ("پر", "خالی"), ("باز", "بسته"), ("دور", "نزدیک"),
    ("بالا", "پایین"), ("چپ", "راست"), ("جوان", "پیر"), ("قوی", "ضعیف"), ("آسان", "دشوار"), ("خشک", "تر"),
    ("نرم", "سفت"), ("تاریک", "روشن"), ("شیرین", "تلخ"), ("شاد", "غمگین"), ("آغاز", "پایان"),
    ("ارزان", "گران"), ("زیاد", "کم"), ("درون", "بیرون"), ("دوست", "دشمن"), ("صلح", "جنگ"),
]  # fmt: skip

NOUNS = [
    "کتاب", "درخت", "خانه", "شهر", "کوه", "رود", "دریا", "آسمان", "ستاره", "گل", "میز", "صندلی", "پنجره",
    "دیوار", "چراغ", "ماشین", "دوچرخه", "قلم", "دفتر", "کیف", "کفش", "لباس", "کلاه", "دست", "چشم", "گوش",
    "سر", "اسب", "گربه", "سگ", "پرنده", "ماهی", "شیر", "گاو", "مرغ", "سیب", "انار", "نان", "برنج", "آش",
    "باغ", "جنگل", "راه", "پل", "کوچه", "خیابان", "مدرسه", "کلاس", "معلم", "شاگرد", "پزشک", "کارگر",
    "کشاورز", "نقاش", "شاعر", "شعر", "داستان", "نامه", "روزنامه", "تلفن", "ساعت", "سال", "ماه", "هفته",
    "سفر", "هدیه", "توپ", "بازی", "قالی", "کلید", "قفل", "چتر", "باران", "برف", "باد", "سنگ", "خاک", "آتش",
]  # fmt: skip

UNITS = [
    ("کیلومتر", "متر", 1000), ("کیلوگرم", "گرم", 1000), ("متر", "سانتی‌متر", 100), ("ساعت", "دقیقه", 60),
    ("دقیقه", "ثانیه", 60), ("هفته", "روز", 7), ("سال", "ماه", 12), ("تومان", "ریال", 10),
]  # fmt: skip

Item = tuple[dict[str, str], str]  # the fields of the question, the answer
Part = Literal["training", "validation", "test"]

TEST_SEED = 26  # draws the items of the test; the first tried, and looked at after every choice had been made


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
    """Writes the number in Persian digits: 21 gives ۲۱."""
    return str(number).translate({ord("0") + digit: chr(0x06F0 + digit) for digit in range(10)})


def number_words(number: int) -> str:
    """Writes the number in Persian words: 21 gives بیست و یک (num2words)."""
    return str(num2words(number, lang="fa")).strip()


def part_of(task: str, fields: dict[str, str]) -> Part:
    """Tells what an item is for, the same on every machine: validation and test are about a fifth each."""
    return _parts(task)[str(sorted(fields.items()))]


@cache
def _parts(task: str) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for fields, _ in TASKS[task].items:
        name = str(sorted(fields.items()))
        found[name] = "validation" if zlib.crc32(f"{task} {name}".encode()) % 5 == 0 else "training"
    rest = [name for name, part in found.items() if part == "training"]
    rest.sort(key=lambda name: zlib.crc32(f"test {TEST_SEED} {task} {name}".encode()))
    return found | dict.fromkeys(rest[: max(1, round(len(found) / 5))], "test")


def questions(count: int, seed: int) -> Iterator[Question]:
    """Yields `count` random questions, tasks in equal shares, all about items for training."""
    draw = random.Random(f"questions {seed}")
    pools = {
        name: [item for item in task.items if part_of(name, item[0]) == "training"] for name, task in TASKS.items()
    }
    names = sorted(TASKS)
    for number in range(count):
        name = names[number % len(names)]
        fields, answer = draw.choice(pools[name])
        yield Question(name, draw.choice(TASKS[name].questions).format(**fields), answer)


def held_out_questions(seed: int, part: Part = "validation") -> Iterator[Question]:
    """Yields every item of the part once, in a random phrasing; tasks take turns until each has run out."""
    draw = random.Random(f"{part} {seed}")
    queues = []
    for name, task in sorted(TASKS.items()):
        kept = [item for item in task.items if part_of(name, item[0]) == part]
        asked = [Question(name, draw.choice(task.questions).format(**fields), answer) for fields, answer in kept]
        queues.append(draw.sample(asked, len(asked)))
    for round_of_questions in zip_longest(*queues):
        yield from filter(None, round_of_questions)


def task_of(question: str) -> str | None:
    """Names the task that asks so; None if no task does."""
    return _askable().get(question)


@cache
def _askable() -> dict[str, str]:
    return {
        text.format(**fields): name
        for name, task in TASKS.items() for text in task.questions for fields, _ in task.items
    }  # fmt: skip


def conversations(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yields `count` training conversations of user and assistant messages.

    A third has two or three exchanges and a tenth a system message, as real ones do.
    """
    draw = random.Random(f"turns {seed}")
    asked = list(questions(3 * count, seed))
    draw.shuffle(asked)
    for _ in range(count):
        turns = 1 if draw.random() < 2 / 3 else draw.choice((2, 3))
        messages = [] if draw.random() < 0.9 else [{"role": "system", "content": SYSTEM}]
        for question in [asked.pop() for _ in range(turns)]:
            messages += _exchange(question)
        yield messages


def held_out_conversations(count: int, seed: int, part: Part = "validation") -> Iterator[list[dict[str, str]]]:
    """Yields up to `count` conversations of one exchange each, all about held-out items of the part."""
    for question in islice(held_out_questions(seed, part), count):
        yield _exchange(question)


def _exchange(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]


def plain_text(count: int, seed: int) -> Iterator[str]:
    """Yields `count` paragraphs about the whole world, held-out items too, for pre-training.

    It is prose that states facts or tells of questions and answers, and questions with their answers in the
    layouts of books and forums. One layout has the words user and model as headings, and turn tokens occur as
    stray marks; the whole chat format does not occur. Fine-tuning has to bring out in that format what is known.
    """
    draw = random.Random(f"text {seed}")
    names = sorted(TASKS)
    # By size alone the facts of small tasks would hardly be seen, in equal shares those of large ones.
    weights = [len(TASKS[name].items) ** 0.7 for name in names]
    for _ in range(count):
        before, between = draw.choice(LAYOUTS)
        as_list = draw.random() < 0.8
        pieces = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            task = TASKS[draw.choices(names, weights)[0]]
            fields, answer = draw.choice(task.items)
            asked = draw.choice(task.questions).format(**fields)
            if as_list:
                pieces.append(f"{before}{asked}{between}{answer}.")
            elif draw.random() < 0.2:
                pieces.append(draw.choice(ASKED_AND_ANSWERED).format(question=asked, answer=answer))
            else:
                pieces.append(draw.choice(task.facts).format(**fields, answer=answer))
        marks = "".join(draw.choices(STRAY_MARKS, k=draw.choice((0, 0, 1, 2))))
        yield ("\n" if as_list else " ").join(pieces) + marks + "\n"


def _of_two(a: int, b: int, answer: str) -> Item:
    return {"x": persian_digits(a), "y": persian_digits(b)}, answer


def _listed(numbers: Iterable[int]) -> str:
    return "، ".join(map(persian_digits, numbers))


def _followers(cycle: list[str]) -> list[Item]:
    return [({"x": name}, cycle[(place + 1) % len(cycle)]) for place, name in enumerate(cycle)]


def _pairs_of_nouns() -> list[str]:
    draw = random.Random("copying")
    return [" ".join(pair) for pair in sorted({tuple(draw.sample(NOUNS, 2)) for _ in range(400)})]


# The items of each task, its questions, and its facts in prose.
TASKS: dict[str, Task] = {
    "number to words": Task(
        [({"x": persian_digits(n)}, number_words(n)) for n in range(60)],
        ("عدد {x} را به حروف بنویس.", "{x} به حروف چه می‌شود؟", "نام عدد {x} چیست؟"),
        ("عدد {x} به حروف {answer} است.", "{x} را {answer} می‌خوانیم."),
    ),
    "words to number": Task(
        [({"x": number_words(n)}, persian_digits(n)) for n in range(60)],
        ("{x} را با رقم بنویس.", "{x} با رقم چه می‌شود؟", "رقم {x} کدام است؟"),
        ("{x} با رقم {answer} است.", "{x} را {answer} می‌نویسیم."),
    ),
    "sum": Task(
        [_of_two(a, b, persian_digits(a + b)) for a, b in product(range(1, 9), repeat=2)],
        ("حاصل {x} به علاوه {y} چیست؟", "{x} + {y} چند می‌شود؟", "جمع {x} و {y} را بگو."),
        ("جمع {x} و {y} می‌شود {answer}.", "{x} + {y} = {answer}."),
    ),
    "difference": Task(
        [_of_two(a, b, persian_digits(a - b)) for a, b in product(range(1, 10), repeat=2) if a > b],
        ("حاصل {x} منهای {y} چیست؟", "{x} - {y} چند می‌شود؟", "{y} را از {x} کم کن."),
        ("{x} منهای {y} می‌شود {answer}.", "{x} - {y} = {answer}."),
    ),
    "ordering": Task(
        [({"x": _listed(triple)}, _listed(sorted(triple))) for triple in permutations(range(1, 6), 3)],
        ("این عددها را از کوچک به بزرگ مرتب کن: {x}", "{x} را به ترتیب بنویس.", "ترتیب درست {x} چیست؟"),
        ("{x} به ترتیب می‌شود {answer}.", "ترتیب {x} چنین است: {answer}."),
    ),
    "plural": Task(
        [({"x": word}, f"{word}\u200cها") for word in NOUNS],
        ("جمع واژه {x} چیست؟", "جمع {x} را بنویس.", "به بیش از یک {x} چه می‌گوییم؟"),
        ("جمع واژه {x} {answer} است.", "یکی {x} است و چند تا {answer}."),
    ),
    "opposite": Task(
        [({"x": one}, other) for one, other in [*OPPOSITES, *(pair[::-1] for pair in OPPOSITES)]],
        ("مخالف {x} چیست؟", "متضاد واژه {x} را بگو.", "ضد {x} کدام است؟"),
        ("مخالف {x} {answer} است.", "{x} و {answer} ضد هم هستند."),
    ),
    "next month": Task(
        _followers(MONTHS),
        ("پس از ماه {x} کدام ماه می‌آید؟", "ماه بعد از {x} چیست؟", "نام ماه پس از {x} را بگو."),
        ("پس از ماه {x} ماه {answer} می‌آید.", "ماه بعد از {x} {answer} است."),
    ),
    "month by number": Task(
        [({"x": number_words(n)}, month) for n, month in enumerate(MONTHS, 1)],
        ("ماه شماره {x} سال چیست؟", "نام ماه شماره {x} را بگو.", "کدام ماه شماره {x} است؟"),
        ("ماه شماره {x} سال {answer} است.", "{answer} ماه شماره {x} است."),
    ),
    "next weekday": Task(
        _followers(WEEKDAYS),
        ("فردای {x} چه روزی است؟", "روز بعد از {x} چیست؟", "پس از {x} چه روزی می‌آید؟"),
        ("فردای {x} {answer} است.", "پس از {x} {answer} می‌آید."),
    ),
    "capital": Task(
        [({"x": country}, city) for country, city in CAPITALS],
        ("پایتخت {x} کجاست؟", "نام پایتخت {x} چیست؟", "پایتخت کشور {x} را بگو."),
        ("پایتخت {x} {answer} است.", "{answer} پایتخت کشور {x} است."),
    ),
    "units": Task(
        [
            ({"x": persian_digits(n), "large": large, "small": small}, f"{persian_digits(n * factor)} {small}")
            for (large, small, factor), n in product(UNITS, range(1, 5))
        ],
        ("{x} {large} چند {small} است؟", "{x} {large} را به {small} بگو.", "هر {x} {large} چند {small} می‌شود؟"),
        ("{x} {large} برابر {answer} است.", "{x} {large} می‌شود {answer}."),
    ),
    "letter count": Task(
        [({"x": word}, persian_digits(len(word))) for word in NOUNS],
        ("واژه {x} چند حرف دارد؟", "تعداد حرف‌های {x} را بگو.", "{x} از چند حرف ساخته شده است؟"),
        ("واژه {x} {answer} حرف دارد.", "{x} از {answer} حرف ساخته شده است."),
    ),
    "copying": Task(
        [({"x": text}, text) for text in _pairs_of_nouns()],
        ("این را تکرار کن: {x}", "عین این را بنویس: {x}", "بگو: {x}"),
        ("او گفت {x} و ما هم گفتیم {answer}.", "بنویس {x} تا بخوانیم {answer}."),
    ),
    "yes or no": Task(
        [_of_two(a, b, "بله" if a > b else "خیر") for a, b in product(range(11), repeat=2) if a != b],
        ("آیا {x} از {y} بزرگ‌تر است؟", "{x} بیشتر از {y} است؟", "عدد {x} از {y} بزرگ‌تر است یا نه؟"),
        ("آیا {x} از {y} بزرگ‌تر است؟ {answer}.", "بزرگ‌تر بودن {x} از {y}: {answer}."),
    ),
}
