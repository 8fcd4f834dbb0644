"""Pairs of answers, judged as a reader would, each with its reason."""

import pytest

from llm_peft_fa.equality import same

pytestmark = pytest.mark.quick
Z = "\u200c"

PAIRS = [
    # answer, reference, equal, the reason
    ("تهران.", "تهران", True, "a full stop is no part of an answer"),
    ("«تهران!»", "تهران", True, "nor are quotes and an exclamation mark"),
    ("**تهران**", "تهران", True, "nor is markdown"),
    ("شیراز", "تهران", False, "another town"),
    (f"کتاب{Z}ها", "کتاب ها", True, "a space where a half-space should be"),
    ("کتابها", f"کتاب{Z}ها", True, "joined where a half-space should be"),
    ("کتابها", "کتاب ها", True, "the plural joined and apart: neither has the half-space"),
    ("کتاب", f"کتاب{Z}ها", False, "one book is not several"),
    ("می روم", "میروم", True, "the same verb, apart and joined"),
    ("درآمد", "در آمد", False, "income, and came out: here the space is a difference"),
    (f"پنج{Z}شنبه", "پنجشنبه", True, "both spellings of Thursday are in use"),
    ("نتوانست", "توانست", False, "the negation is one letter"),
    (f"نمی{Z}رود", f"می{Z}رود", False, "the same in the present"),
    ("علي", "علی", True, "an Arabic keyboard's yeh"),
    ("كتاب", "کتاب", True, "an Arabic keyboard's kaf"),
    ("رئیس جمهور", "رییس جمهور", True, "two accepted spellings"),
    ("موسى", "موسی", True, "alef maksura"),
    ("دایرة المعارف", "دایره المعارف", True, "teh marbuta"),
    ("خانۀ ما", "خانه ما", True, "the sign of the ezafe is often left out"),
    ("أحمد و إسلام و ٱلله", "احمد و اسلام و الله", True, "alef with what only Arabic writes on it"),
    ("مؤسسه", "موسسه", True, "two accepted spellings"),
    ("−۵", "-5", True, "the typographer's minus"),
    ("حتماً", "حتما", True, "the tanween is often left out"),
    ("آب", "اب", False, "alef with madda is another letter"),
    ("۱۲", "12", True, "Persian and Latin digits"),
    ("١٢", "۱۲", True, "Arabic and Persian digits"),
    ("۱۲", "۲۱", False, "other numbers"),
    ("۱ ۲", "۱۲", False, "two numbers, and one"),
    ("۱٬۰۰۰ متر", "1000 متر", True, "a separator of thousands"),
    ("۳٫۵", "3.5", True, "a decimal separator"),
    ("۳٫۵", "۳۵", False, "ten times as much"),
    ("-۵", "۵", False, "the sign is not punctuation"),
    ("۵۰٪", "۵۰ درصد", True, "a percent sign is read as the word"),
    ("پنج", "۵", False, "a question may ask for the words: the generated ones do"),
    ("یک کتاب", "کتاب", True, "the article"),
    ("یک ساعت", "ساعت", False, "one hour, and a clock"),
    ("یک دوم", "دوم", False, "a half, and the second"),
    ("بیست و یک", "بیست", False, "here it is a number"),
    ("ایرانی", "ایران", False, "a last yeh is no article that could be left out"),
    ("The Beatles", "beatles", True, "an English article, and case"),
    ("Vitamin A", "vitamin", False, "a letter at the end is no article"),
    ("C++", "C", False, "another language"),
    ("۲، ۴، ۵", "2, 4, 5", True, "a list with Persian and with Latin commas"),
    ("C++، جاوا", "C++ جاوا", True, "the comma of a list"),
    (f"خانه{Z}ی ما", "خانهٔ ما", True, "the ezafe, written as a letter or as a sign"),
    ("خانه ی ما", "خانه ما", True, "the same with a space"),
    ("املاء", "املا", True, "two accepted spellings"),
    ("جزء", "جز", False, "a part, and except"),
    ("یک شنبه", "شنبه", False, "Sunday is no Saturday"),
    ("یک ساله", "ساله", False, "one year old"),
    ("یک سیب", "سیب", True, "an apple"),
    ("٪۲۰", "۲۰ درصد", True, "the percent sign is written on either side"),
    ("۱۰٪ ۲۰٪", "۱۰ درصد ۲۰ درصد", True, "two percentages"),
    ("۱۰–۲۰", "۱۰-۲۰", True, "a range with a typographer's dash"),
    ("x = 2", "x=2", True, "space around a sign"),
    ("\u2067تهران\u2069", "تهران", True, "signs that turn the line's direction are not seen"),
    ("", "تهران", False, "no answer"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference", "equal", "reason"), PAIRS)
def test_a_reader_would_judge_so(answer: str, reference: str, equal: bool, reason: str) -> None:
    assert same(answer, reference) == equal, reason
    assert same(reference, answer) == equal, f"the other way round: {reason}"
    assert same(f" {answer}\n", answer)
