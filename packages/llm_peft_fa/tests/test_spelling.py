import pytest

from llm_peft_fa.spelling import changes, in_one_spelling, is_arabic, normalise

pytestmark = pytest.mark.quick
ARABIC = "ذهب الطالب إلى المدرسة في الصباح، وكان معه كتاب كبير على ظهره."


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("علي و كتاب و موسى", "علی و کتاب و موسی"),
        ("٠١٢٣٤٥٦٧٨٩ ۰۱۲ 012", "۰۱۲۳۴۵۶۷۸۹ ۰۱۲ 012"),
        ("می\u200cروم", "می\u200cروم"),
        ("می\u200c\u200c\u200cروم", "می\u200cروم"),
        ("می\u200c روم", "می روم"),
        ("می \u200cروم", "می روم"),
        ("می\u200c \u200c\u200cروم", "می روم"),
        ("\u200cسلام\u200c\n\u200cسلام", "سلام\nسلام"),
        ("\u200c\u200cسلام\u200c\u200c", "سلام"),
        ("\u200c", ""),
        ("کتـــاب", "کتاب"),
        ("سلام\u00a0بر\ufeff تو", "سلام بر تو"),
        ("مُحَمَّد؛ خانهٔ ما؟", "مُحَمَّد؛ خانهٔ ما؟"),
        ("print(x[0])  # 3.14", "print(x[0])  # 3.14"),
        (ARABIC, ARABIC),
        (f"اين متن را به فارسي ترجمه كن:\n{ARABIC}", f"این متن را به فارسی ترجمه کن:\n{ARABIC}"),
        ("كتاب «المنجد في اللغة» را علي خريد كه از تهران است", "کتاب «المنجد فی اللغة» را علی خرید که از تهران است"),
    ],
)
def test_one_spelling(written: str, becomes: str) -> None:
    assert normalise(written) == becomes
    assert normalise(becomes) == becomes


@pytest.mark.parametrize(
    ("text", "arabic"),
    [
        (ARABIC, True),
        ("بسم الله الرحمن الرحيم", True),
        ("هذه هي الحياة", True),
        ("اين كتاب براي من است", False),
        ("پایتخت ایران کجاست؟", False),
        ("علي", False),
        ("البته الان می‌آیم", False),
        ("Tehran", False),
        ("اسم من علي", False),
        ("متأسفم", False),
        ("سلام، الان كجايي؟", False),
        ("أنا طالب", True),
    ],
)
def test_arabic_is_told_from_persian(text: str, arabic: bool) -> None:
    assert is_arabic(text) is arabic


def test_a_short_line_has_the_language_of_its_row() -> None:
    asked, said = ({"role": role, "content": text} for role, text in (("user", ARABIC), ("assistant", "علي")))
    assert in_one_spelling([asked, said]) == [asked, said]
    assert in_one_spelling([said]) == [{"role": "assistant", "content": "علی"}]
    asked = {"role": "user", "content": "پایتخت فلسطین کجاست؟"}
    for short, becomes in (("بيت المقدس", "بیت المقدس"), ("سيدة", "سیدة"), ("دار الكتب", "دار الکتب")):
        assert in_one_spelling([asked, said | {"content": short}])[1]["content"] == becomes, "a sign is not enough"
        arabic = [{"role": "user", "content": ARABIC}, said | {"content": short}]
        assert in_one_spelling(arabic) == arabic


def test_changes_are_counted_by_letter() -> None:
    before = "علي  كتاب\u200c خريد\u00a0٣"
    assert changes(before, normalise(before)) == {"ي": 2, "ك": 1, "٣": 1, "\u00a0": 1, "\u200c": 1}
