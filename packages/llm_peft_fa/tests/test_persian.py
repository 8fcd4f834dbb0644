import re

import pytest

from llm_peft_fa.persian import (
    MONTHS,
    TASKS,
    WEEKDAYS,
    conversations,
    held_out_questions,
    number_words,
    part_of,
    persian_digits,
    plain_text,
    questions,
    task_of,
)
from llm_peft_fa.spelling import normalise

pytestmark = pytest.mark.quick


def test_answers_are_right() -> None:
    answer = {(task, *fields.values()): right for task, value in TASKS.items() for fields, right in value.items}
    digits = persian_digits
    assert answer["number to words", digits(47)] == "چهل و هفت"
    assert answer["words to number", "پنجاه و نه"] == digits(59)
    assert answer["sum", digits(7), digits(8)] == digits(15)
    assert answer["difference", digits(9), digits(4)] == digits(5)
    assert answer["ordering", "۵، ۲، ۴"] == "۲، ۴، ۵"
    assert answer["plural", "کتاب"] == "کتاب\u200cها"
    assert answer["opposite", "شب"] == "روز"
    assert answer["next month", "اسفند"] == "فروردین"
    assert answer["month by number", "هفت"] == "مهر"
    assert answer["next weekday", "جمعه"] == "شنبه"
    assert answer["capital", "ایران"] == "تهران"
    assert answer["units", digits(3), "کیلومتر", "متر"] == "۳۰۰۰ متر"
    assert answer["letter count", "پنجره"] == digits(5)
    assert answer["copying", "آسمان نقاش"] == "آسمان نقاش"
    assert answer["yes or no", digits(3), digits(4)] == "خیر"
    assert (len(MONTHS), len(WEEKDAYS)) == (12, 7)
    for name, task in TASKS.items():
        asked = [tuple(fields.items()) for fields, _ in task.items]
        assert len(asked) == len(set(asked)), f"{name} has one right answer for everything"


def test_texts_are_normalised() -> None:
    for task in TASKS.values():
        for fields, answer in task.items:
            for text in (*fields.values(), answer):
                assert normalise(text) == text


def test_items_of_validation_and_test_are_never_asked_in_training() -> None:
    trained = {question.text for question in questions(4000, seed=1)}
    asked = {part: {question.text: question.task for question in held_out_questions(1, part)}
             for part in ("validation", "test")}  # fmt: skip
    assert not trained & (asked["validation"].keys() | asked["test"].keys())
    assert not asked["validation"].keys() & asked["test"].keys()
    assert set(asked["test"].values()) == set(asked["validation"].values()) == set(TASKS), "every task is tested"
    for name, task in TASKS.items():
        parts = [part_of(name, fields) for fields, _ in task.items]
        assert 0.4 < parts.count("training") / len(parts) < 0.9, name


def test_a_question_is_known_by_its_phrasing() -> None:
    for part in ("validation", "test"):
        for question in held_out_questions(3, part):
            assert task_of(question.text) == question.task
    assert task_of("چرا آسمان آبی است؟") is None


def test_conversations_are_seeded_and_varied() -> None:
    made = list(conversations(300, seed=4))
    assert made == list(conversations(300, seed=4)) != list(conversations(300, seed=5))
    exchanges = {sum(message["role"] == "user" for message in messages) for messages in made}
    assert exchanges == {1, 2, 3}
    assert any(messages[0]["role"] == "system" for messages in made)


def test_pre_training_text_knows_the_facts_and_no_chat_format() -> None:
    text = "\n".join(plain_text(3000, seed=1))
    assert re.search("پایتخت.{0,20}کنیا.{0,20}نایروبی", text, re.DOTALL)
    assert part_of("capital", {"x": "کنیا"}) == "validation", (
        "held-out facts are in the text: fine-tuning teaches how to ask"
    )
    assert not re.search("<end_of_turn>\n<start_of_turn>model\n", text)


@pytest.mark.parametrize(("number", "words"), [(0, "صفر"), (21, "بیست و یک"), (215, "دویست و پانزده")])
def test_numbers(number: int, words: str) -> None:
    assert number_words(number) == words
