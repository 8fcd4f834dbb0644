"""Persian normalisation: one spelling for what a keyboard can type in several ways.

| what | becomes |
|---|---|
| Arabic yeh and alef maksura (ي ى), kaf (ك) | Persian yeh (ی), kaf (ک) |
| Arabic-Indic digits (٠-٩) | Persian digits (۰-۹); ASCII digits stay, since code and formulas use them |
| zero-width non-joiner | kept between letters; dropped at spaces, at line ends, and when doubled |
| zero-width space, byte-order marks, soft hyphens, tatweel (ـ) | dropped |
| no-break space | space |
| diacritics, everything else | left alone |

A library was looked for: hazm rewrites more than this (ASCII digits, punctuation, spacing, diacritics) and pulls
a tagger and its toolkit along; parsivar and piraye rewrite or depend as much. The table is all that is needed.
"""

import re

_LETTERS = str.maketrans(
    {"ي": "ی", "ى": "ی", "ك": "ک", "\u00a0": " "}
    | {chr(0x0660 + digit): chr(0x06F0 + digit) for digit in range(10)}
    | dict.fromkeys("\u200b\ufeff\u00ad\u0640", None)
)
# A non-joiner does nothing beside a space, a line's end or another one.
_IDLE_NON_JOINER = re.compile("(?<![^\\s\u200c])\u200c+|\u200c+(?=\\s|$)|(?<=\u200c)\u200c+")


def normalise(text: str) -> str:
    """The text in one spelling; see the table above. Twice gives the same as once."""
    return _IDLE_NON_JOINER.sub("", text.translate(_LETTERS))
