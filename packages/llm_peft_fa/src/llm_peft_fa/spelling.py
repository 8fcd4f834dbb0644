"""One spelling for what a keyboard can type in several ways, in Persian text; what is Arabic stays as it is.

| written | becomes |
|---|---|
| Arabic yeh and alef maksura (ي ى), kaf (ك) | Persian yeh (ی), kaf (ک) |
| Arabic-Indic digits (٠-٩) | Persian digits (۰-۹); ASCII digits stay, since code and formulas use them |
| zero-width non-joiner | kept between letters; dropped at spaces, at line ends, and when doubled |
| zero-width space, byte-order marks, soft hyphens, tatweel (ـ) | dropped |
| no-break space | space |
| diacritics, everything else | left alone |

A line is Arabic if it has more signs of Arabic (ة إ, أ that begins a word, words such as في and على) than of Persian
(پ چ ژ گ ک ی, words such as است and را). Of a line with as many of both, or a single sign more of Arabic, which names
and terms in Persian have too (بيت المقدس), the whole row decides, and if that does not either, it is Persian.

The libraries for this rewrite more: hazm changes ASCII digits, punctuation, spacing and diacritics and brings a tagger
along; parsivar and piraye rewrite or depend as much.
"""

import re

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

LETTERS = {
    **{"ي": "ی", "ى": "ی", "ك": "ک"},
    **{chr(0x0660 + digit): chr(0x06F0 + digit) for digit in range(10)},
    **{"\u00a0": " ", "\u200b": "", "\ufeff": "", "\u00ad": "", "\u0640": ""},
}
ALSO_ARABIC = "".join(letter for letter in LETTERS if letter not in "\u00a0\u200b\ufeff\u00ad")
# "من" is a word of both.
# Yeh and kaf are no signs of Arabic: half of the Persian on the web is typed with them.
ARABIC = frozenset(
    ["في", "على", "الى", "هذا", "هذه", "ذلك", "التي", "الذي", "كان", "كانت", "عن", "لم", "هو", "هي", "قال"]
)
PERSIAN = frozenset([
    "است", "این", "که", "را", "از", "به", "در", "های", "ها", "با", "برای", "آن", "شد", "شده", "بود", "شود", "تا", "چه",
    "یا", "اين", "مي", "هاي", "براي", "يك", "كه", "نيست", "كرد", "الان", "البته", "شما",
])  # fmt: skip
# A non-joiner does nothing beside a space, a line's end or another one. The pattern begins with the letter: searching
# for that alone is ten times as fast.
IDLE_NON_JOINER = re.compile("\u200c(?:(?<=\\A\u200c)|(?<=[\\s\u200c]\u200c)|(?=\u200c*(?:\\s|\\Z)))")


def normalise(text: str, row: str | None = None) -> str:
    """Returns the text in one spelling, see the table above. Twice gives the same as once.

    `row` is all that was said in the conversation, if it is more than the text.
    """
    if any(letter in text for letter in LETTERS):
        if any(letter in text for letter in ALSO_ARABIC):
            text = "\n".join(
                line if is_arabic(line, text if row is None else row) else _replaced(line) for line in text.split("\n")
            )
        else:
            text = _replaced(text)
    return IDLE_NON_JOINER.sub("", text) if "\u200c" in text else text


def _replaced(text: str) -> str:
    for letter, becomes in LETTERS.items():  # five times as fast as str.translate, which looks each letter up
        text = text.replace(letter, becomes)
    return text


def is_arabic(text: str, row: str = "") -> bool:
    """Tells whether a text is Arabic and not Persian; of one that hardly shows it, whether the `row` is."""
    words = set(text.split())
    signs = text.count(" ال") + sum(map(text.count, "ةإ")) + sum(word[0] == "أ" for word in words) + len(ARABIC & words)
    signs -= sum(map(text.count, "پچژگکی")) + len(PERSIAN & words)
    return is_arabic(row) if row and signs in (0, 1) else signs > 0


def in_one_spelling(messages: list[Message]) -> list[Message]:
    """Normalises the messages of a row, whose language all of them decide."""
    row = "\n".join(message["content"] for message in messages)
    return [message | {"content": normalise(message["content"], row)} for message in messages]


def changes(before: str, after: str) -> dict[str, int]:
    """Counts what `normalise` replaced or dropped, by character."""
    counts = {letter: before.count(letter) - after.count(letter) for letter in (*LETTERS, "\u200c")}
    return {letter: count for letter, count in counts.items() if count}
