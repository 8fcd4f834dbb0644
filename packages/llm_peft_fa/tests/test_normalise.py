import pytest

from llm_peft_fa.normalise import normalise


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("علي و كتاب و موسى", "علی و کتاب و موسی"),
        ("٠١٢٣٤٥٦٧٨٩ ۰۱۲ 012", "۰۱۲۳۴۵۶۷۸۹ ۰۱۲ 012"),
        ("می\u200cروم", "می\u200cروم"),
        ("می\u200c\u200c\u200cروم", "می\u200cروم"),
        ("می\u200c روم", "می روم"),
        ("می \u200cروم", "می روم"),
        ("\u200cسلام\u200c\n\u200cسلام", "سلام\nسلام"),
        ("کتـــاب", "کتاب"),
        ("سلام\u00a0بر\ufeff تو", "سلام بر تو"),
        ("مُحَمَّد؛ خانهٔ ما؟", "مُحَمَّد؛ خانهٔ ما؟"),
        ("print(x[0])  # 3.14", "print(x[0])  # 3.14"),
    ],
)
def test_one_spelling(written: str, becomes: str) -> None:
    assert normalise(written) == becomes
    assert normalise(becomes) == becomes
