import random

import numpy as np
import pytest

from llm_peft_fa.survey import kind_of, language_of, repeats, signature

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("پایتخت ایران کجاست؟", "where"),
        ("متن: این شهر کجا بود؟ بسیار زیبا. چه کسی آن را ساخت؟", "who"),
        ("چند کیلومتر است؟", "how many, how much"),
        ("چرا آسمان آبی است؟", "why"),
        ("آیا ۲ از ۱ بزرگ‌تر است؟", "yes or no"),
        ("این جمله را به انگلیسی ترجمه کن", "translate"),
        ("نام ماه بعد از مهر چیست؟", "what, which"),
        ("یک شعر بنویس.", "write, list, explain"),
        ("How many people live there?", "how many, how much"),
        ("Is it raining?", "yes or no"),
        ("...", "other"),
    ],
)
def test_kinds_of_questions(question: str, kind: str) -> None:
    assert kind_of(question) == kind


def test_languages() -> None:
    texts = {"این کتاب است": "Persian", "إلى المدرسة في الصباح": "Arabic", "Hello, که": "Latin script",
             "Здравствуйте": "other", "12 + 3": "other"}  # fmt: skip
    assert {text: language_of(text) for text in texts} == texts


def test_near_duplicates_are_those_that_share_most_triples_of_words() -> None:
    """Against the exact share of triples, by sets."""
    draw = random.Random(0)
    vocabulary = [f"واژه{n}" for n in range(500)]
    texts = []
    for _ in range(40):
        words = draw.choices(vocabulary, k=80)
        texts.append(words)
        for changed in (1, 30):
            copy = list(words)
            for place in draw.sample(range(80), changed):
                copy[place] = draw.choice(vocabulary)
            texts.append(copy)
    held_out = [list(texts[0]), draw.choices(vocabulary, k=80)]

    def signed(rows: list[list[str]]) -> list[np.ndarray]:
        return [signature([{"role": "user", "content": " ".join(words)}]) for words in rows]

    triples = [{tuple(words[at : at + 3]) for at in range(78)} for words in texts]
    shares = [[len(one & two) / len(one | two) for two in triples[:place]] for place, one in enumerate(triples)]
    exact = sum(max(share, default=0) >= 0.8 for share in shares)
    assert exact == 40
    rows = dict(repeats({"training": signed(texts), "test": signed(held_out)}))
    assert abs(rows["near-duplicates of an earlier conversation:"] - exact) <= 2
    assert rows["of 2 to test, nearly the same in training:"] == 1
