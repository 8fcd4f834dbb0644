"""Whether two short answers are the same to a reader of Persian, however they were typed.

| in the one, in the other | equal |
|---|---|
| Arabic and Persian letters (ي ی, ك ک, ة ه, أ ا, ؤ و, ئ ی), with and without vowel signs | yes |
| Persian, Arabic and Latin digits; separators of thousands; ٫ and . ; ٪ on either side, and درصد | yes |
| a half-space in the place of a space, of nothing, or of either before ها, تر and after می | yes |
| a hyphen within a word or name in the place of any of these (e-mail, F-16, کم-حرف) | yes |
| punctuation, quotes, markdown, emoji beside words; not within numbers (۳٫۵, ۱۰:۳۰), nor + and # (C++, C#) | yes |
| the ezafe after ه (خانۀ, خانه‌ی), the last ء of املاء, spaces around =, + and the minus of terms and ranges | yes |
| یک before a noun; an, the, a small a before a word; upper and lower case; don't, U.S.A. | yes |
| پاسخ: and the like before it, the answer is; است and می‌باشد at its end | yes |
| بلی, آری and بله, نه and خیر, where that is all | yes |
| dates and times with and without leading zeros, ۳٫۵۰ and ۳٫۵, 3.50 m, 3.0, a plus sign, space before a unit | yes |
| مسئله, هیئت, مسئول and مسأله, هیأت, مسوول; letters as PDF files hold them, digits of full width | yes |
| a last ی (ایران, ایرانی), آ and ا, یک before a number, a unit or شنبه, a number in words and in digits | no |
| a minus left out (-۵, -√2, -x, 2-x, x-y, Cl-); A before a word (a blood group), 3.10 and 3.1; ✅ and ❌ | no |
| a list with و and with commas (پدر و مادر is not پدر مادر), another order, a whole sentence, a unit left out | no |

After the answers' normalisation of SQuAD (Rajpurkar et al. 2016), which is for English.
"""

import re
import unicodedata

JOINER = "\u200c"  # the half-space
LETTERS = str.maketrans(
    dict(zip("يىئكةۀأإٱؤ−–٫", "یییکههاااو--.", strict=True))
    | {chr(first + digit): str(digit) for first in (0x0660, 0x06F0) for digit in range(10)}
    | dict.fromkeys("\u0640\u200b\u200d\u200e\u200f\u00ad\ufe0f\ufeff\u0670")
    | dict.fromkeys(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))  # which turn the line's direction
    | dict.fromkeys(map(chr, range(0x064B, 0x0656)))  # vowel signs, and the hamza above
)
THOUSANDS = re.compile(r"(?<=\d)[٬,](?=\d{3}(?!\d))")
# Arabic letters by their place in a word, and full width; not all of NFKC, which makes 102 of 10².
FORMS = re.compile("[\ufb50-\ufdff\ufe70-\ufefc\uff01-\uff5e]")
LABEL = re.compile(
    r"^\W*(?:(?:پاسخ|جواب)(?: نهایی| درست| صحیح)?\W*:|(?:the )?(?:final |correct )?answer(?: is\b|\W*:))(?=.*\w)",
    re.DOTALL | re.IGNORECASE,
)
# The same word in two accepted spellings, after `LETTERS`.
SPELLINGS = {"مسیله": "مساله", "هییت": "هیات", "مسیول": "مسوول"}
ALONE = {"بلی": "بله", "آری": "بله", "نه": "خیر", "نخیر": "خیر"}
COPULA = re.compile(rf"(?<=\w)[ {JOINER}](?:است|می{JOINER}?باشد)$")
DATE = re.compile(r"(?<![\d./-])(\d{2,4})[/-]0?(\d{1,2})[/-]0?(\d{1,2})(?![\d./-])")
CLOCK = re.compile(r"(?<![\d:.])0(?=\d:\d\d(?!\d))")
FRACTION = re.compile(r"^(−?\d+)\.0+$|^(−?\d+(?:\.\d*[1-9])?)\.?0*(?= \w+$)")
APOSTROPHE = re.compile(r"(?<=[^\W\d])['’](?=[^\W\d])|(?<=\b[a-z])\.(?=[a-z]\.)|(?<=\.[a-z])\.")
UNIT = re.compile(r"(?<![^\W\d])(\d+)(?=[^\W\d])|(?<=متر)(?=مربع|مکعب)")
PERCENT_BEFORE = re.compile(r"(?<!\d)[%٪] ?(\d+(?:\.\d+)?)(?![\d%٪])")
# Within a number these say something: a decimal, a time, a fraction, a range.
IN_NUMBER = re.compile(r"(?<=\d)[.:/*-](?=\d)")
# A minus before a number, a root or a variable, and the charge of an ion or the sign of a blood group (Cl-, AB-). The
# dash before any other word makes a list.
SPACED_MINUS = re.compile(r"(^|=)\s*- +(?=\.?[\d√])")
MINUS = re.compile(r"(?<![\w.])-(?=\.?[\d√]|[a-z]\b)|(?<=\d)-(?=√|[a-z]\b)")
# x-y is a difference, whatever the spaces, but T-shirt, F-16 and A-B are none: a term ends with a small letter alone.
BEHIND_TERM = r"(?:(?<=(?<![^\W\d])[a-z])|(?<=(?<![^\W\d])[a-z][²³]))"
DIFFERENCE = re.compile(rf"{BEHIND_TERM}\s*-\s*(?=\d|[a-z√](?![^\W\d]))|(?<=\d)\s+-\s+(?=\d*[a-z](?![^\W\d]))")
RANGE = re.compile(r"^(\s*\d[\d.]*) - (?=\d[\d.]*(?: \w+)?\s*$)")
HYPHEN = re.compile(r"(?<=[^\W\d]{2})-(?=\w)|(?<=[^\W\d])-(?=[^\W\d]{2}|\d)")
CHARGE = re.compile(r"\b((?:[A-Z][a-z]?\d*)+)-(?!\w)")
EZAFE = re.compile(rf"(?<=ه)[ {JOINER}]ی\b|(?<=ا)ء\b")
SPACED_PREFIX = re.compile(r"\b(ن?می) (?=[^\W\d])")
SPACED_SUFFIX = re.compile(r"(?<=[^\W\d]) (?=(?:ها|های|هایی|تر|ترین)\b)")
# "یک" before these counts: one hour is no hour, یک دوم is a half, یک هیچ one to nil, and یک شنبه is Sunday; so it does
# in یک ساله.
COUNTED = (
    "صد|هزار|میلیون|میلیارد|بار|درصد|دوم|سوم|چهارم|پنجم|ششم|هفتم|هشتم|نهم|دهم|و|"
    "هیچ|صفر|یک|دو|سه|چهار|پنج|شش|هفت|هشت|نه|ده|بر|به|از|در|شنبه|تا|طرف|مرتبه|بیستم|صدم|اینچ|فوت|مایل|دهه|"
    "ثانیه|دقیقه|ساعت|روز|هفته|ماه|سال|قرن|متر|کیلومتر|سانتی|میلی|کیلو|کیلوگرم|گرم|تن|لیتر|تومان|ریال|دلار|یورو|نفر"
)
ARTICLE = re.compile(rf"^(\W*)یک +(?=[^\W\d])(?!(?:{COUNTED})ه?\b)|\b(?:(?i:an|the)\b(?=\W+\w)|a (?=[A-Za-z]{{2}}))")


def same(answer: str, reference: str) -> bool:
    """Tells whether a reader takes two answers for the same, by the table above."""
    (one, gaps), (other, gaps_too) = _letters(answer), _letters(reference)
    if not one and not other:  # nothing but signs, which then are the answer
        one, other = (unicodedata.normalize("NFC", text.strip()) for text in (answer, reference))
        return one == other
    # Where the one has a half-space the other may have anything, else both must have the same.
    return one == other and all(a == b or JOINER in (a, b) for a, b in zip(gaps, gaps_too, strict=True))


def canonical(text: str) -> str:
    """Writes a text in one spelling: words with one space between, half-spaces where they are or should be."""
    text = FORMS.sub(lambda found: unicodedata.normalize("NFKC", found[0]), unicodedata.normalize("NFC", text))
    text = re.sub(r"٫(\d*?)[0۰٠]+(?!\d)", r"٫\1", text)
    text = DIFFERENCE.sub("−", SPACED_MINUS.sub(r"\1-", LABEL.sub("", text.translate(LETTERS))))
    text = HYPHEN.sub(JOINER, RANGE.sub(r"\1-", text))
    text = ARTICLE.sub(r"\1", CHARGE.sub(r"\1−", MINUS.sub("−", text))).casefold()
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text.replace("‰", " در هزار "))
    text = PERCENT_BEFORE.sub(r"\1 درصد ", THOUSANDS.sub("", text))
    text = re.sub(r"(?<=\w)\s*([=+])\s*(?=[\w−])", r"\1", re.sub(r"[%٪]|(?<=\d )percent\b", " درصد ", text))
    text = APOSTROPHE.sub("", re.sub(r"(?<![\w+])\+(?=\d)", "", CLOCK.sub("", DATE.sub(r"\1/\2/\3", text))))
    kept = {found.start() for found in IN_NUMBER.finditer(text)}
    text = "".join(sign if place in kept or not _says_nothing(sign) else " " for place, sign in enumerate(text))
    text = " ".join(re.sub(rf"\s*{JOINER}(?=\s|$)|(?:^|(?<=\s)){JOINER}", " ", text).split())
    text = SPACED_SUFFIX.sub(JOINER, SPACED_PREFIX.sub(rf"\1{JOINER}", EZAFE.sub("", text)))
    text = COPULA.sub("", UNIT.sub(r"\1 ", text))
    for spelling, other in SPELLINGS.items():
        text = text.replace(spelling, other)
    return ALONE.get(text, FRACTION.sub(_without_zeros, text))


def _without_zeros(number: re.Match[str]) -> str:
    return number[1] or number[2] if "." in number[0] else number[0]


def _says_nothing(sign: str) -> bool:
    """Tells whether a sign is punctuation or a picture; + and = are neither, and # makes C#."""
    return sign != "#" and unicodedata.category(sign) in {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "So", "Sk"}


def _letters(text: str) -> tuple[str, list[str]]:
    """Separates a text into its letters and what stands before each: a space, a half-space or nothing."""
    found = re.findall(rf"([ {JOINER}]?)([^ {JOINER}])", canonical(text))
    return "".join(letter for _, letter in found), [gap for gap, _ in found]
