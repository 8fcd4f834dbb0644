"""Scores against other implementations, by hand, and on texts whose judgement is plain."""

import pytest
import sacrebleu

from llm_peft_fa.metrics import Answer, Prompt, language, refuses, scores, scores_by_kind, task_or_kind

pytestmark = pytest.mark.quick
QUESTION = [{"role": "user", "content": "پایتخت ایران کجاست؟"}]


def test_scores_against_sacrebleu_and_by_hand() -> None:
    prompts = [
        Prompt(QUESTION, "تهران", True),
        Prompt(QUESTION, "علي و كتاب", True),
        Prompt(QUESTION, "الف ب ج"),
        Prompt(QUESTION),
    ]
    said = ["تهران.", "علی  و کتاب", "الف ب ب", "الف"]
    found = scores(prompts, [Answer(text) for text in said])
    assert found["exact match"] == 1.0, "a full stop, spacing and Arabic letters are not mistakes"
    references = ["تهران", "علي و كتاب", "الف ب ج"]
    assert found["chrF"] == pytest.approx(sacrebleu.metrics.CHRF().corpus_score(said[:3], [references]).score)
    assert found["distinct-1"] == 6 / 8
    assert found["distinct-2"] == 4 / 4
    assert (found["words per answer"], found["words per reference"]) == (2.0, 7 / 3)
    assert scores(prompts[:1], [Answer("تهران بزرگ")])["exact match"] == 0.0
    assert not {"exact match", "chrF"} & scores(prompts[3:], [Answer("")]).keys()
    assert scores([], []) == {}


def test_cut_answers_are_told_apart() -> None:
    whole = "رودخانه از برف کوهستان سرچشمه می‌گیرد و به دشت می‌رسد"
    prompts = [Prompt(QUESTION, whole)] * 2
    found = scores(prompts, [Answer(whole), Answer(whole[:18], truncated=True)])
    assert found["truncated"] == 0.5
    assert found["chrF, ended"] == 100
    assert found["chrF, truncated"] < 50 < found["chrF"] < 100
    assert "chrF, ended" not in scores(prompts, [Answer(whole)] * 2), "nothing was cut"


def test_repetition_and_refusals_and_language_are_shares() -> None:
    prompts = [Prompt(QUESTION)] * 4 + [Prompt([{"role": "user", "content": "What is the capital of Iran?"}])]
    said = [
        "نه " * 8,
        "متأسفم، نمی‌توانم به این پرسش پاسخ دهم.",
        "It is Tehran.",
        "عاصمة إيران هي طهران في الشرق",
        "Tehran",
    ]
    found = scores(prompts, [Answer(text) for text in said])
    assert found["repetition"] == pytest.approx(4 / 5 / 5), "one of five repeats four of its five 4-grams"
    assert found["refusals"] == 1 / 5
    assert (found["in Persian"], found["in English"], found["in other"]) == (0.5, 0.25, 0.25), "of prompts in Persian"
    number = scores(prompts[:2], [Answer("۱۲"), Answer("سلام")])
    assert number["in Persian"] == 1, "a number is of no language"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("سلام، حال شما چطور است؟", "Persian"), ("تهران", "Persian"), ("علي كتاب را به من داد", "Persian"),
        ("تابع print(x) را صدا بزنید", "Persian"), ("الكتاب على الطاولة في الغرفة", "other"),
        ("The river begins in the mountains.", "English"), ("Tehran", "English"), ("Über den Fluß führt eine Brücke", "other"),
        ("Москва", "other"), ("12 + 3", "none"), ("", "none"),
    ],
)  # fmt: skip
def test_languages(text: str, named: str) -> None:
    assert language(text) == named


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("متأسفانه نمی‌توانم در این مورد کمک کنم.", True), ("به عنوان یک مدل زبانی نظری ندارم", True),
        ("I'm sorry, but I can't help with that.", True), ("As an AI, I have no opinion.", True),
        ("البته، می‌توانم کمک کنم: تهران.", False), ("پایتخت ایران تهران است.", False), ("You can find it there.", False),
        ("پایتخت ایران تهران است. " * 20 + "متأسفانه", False),
    ],
)  # fmt: skip
def test_refusals(answer: str, refused: bool) -> None:
    assert refuses(answer) == refused


@pytest.mark.parametrize(
    ("question", "kind"),
    [("پایتخت ایران کجاست؟", "capital"), ("جمع کتاب را بنویس.", "plural"), ("چرا آسمان آبی است؟", "why")],
)
def test_a_generated_question_is_of_its_task(question: str, kind: str) -> None:
    assert task_or_kind(question) == kind


def test_each_kind_has_its_scores() -> None:
    asked = ["پایتخت ایران کجاست؟", "مخالف شب چیست؟", "پایتخت چین کجاست؟"]
    prompts = [Prompt([{"role": "user", "content": text}], "روز", True) for text in asked]
    found = scores_by_kind(prompts, [Answer("روز"), Answer("روز"), Answer("شب")])
    assert list(found) == ["capital", "opposite"], "the most frequent first"
    assert (found["capital"]["prompts"], found["capital"]["exact match"]) == (2, 0.5)
    assert (found["opposite"]["prompts"], found["opposite"]["exact match"]) == (1, 1.0)
