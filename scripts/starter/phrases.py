"""Stage `phrases`: the captions of index/starter, composed from words.toml by a small grammar.

Of each kind of subject a fixed random part of what makes sense is taken, so that people and dogs do not drown the rest.
"""

import random
import re
import tomllib
from collections.abc import Container, Iterable, Iterator
from itertools import islice, product
from pathlib import Path

from clipcap_rag.artifact import new_directory

_WORDS: dict[str, str] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))

FILE = "phrases.txt"

# How many phrases of each kind are taken at most.
SHARES = {
    "adult": 5600, "adults": 2600, "child": 3600, "children": 1700, "dog": 2800, "dogs": 400, "animal": 900,
    "animals": 400, "vehicle": 1500, "food": 900, "object": 600, "place": 400, "sky": 60,
}  # fmt: skip

_SEVERAL = {
    f"{verb} a {thing}": f"{verb} {thing}s"
    for verb, things in {
        "riding": ("bike", "horse", "skateboard", "scooter", "motorcycle", "tricycle", "toy car"),
        "playing": ("guitar", "violin", "trumpet"),
        "wearing": ("costume",),
    }.items()
    for thing in things
}
_ENDLESS = ("adult", "child")
_ALONE = re.compile(
    r"piano|haircut|helmet|on the lap|high chair|stroller\b|on the shoulders|with a walking stick|in a chair|"
    r"on a phone|telescope|a taxi|tire swing|from a tree branch|talking to|teddy|pipe|golf cart|doorway|"
    r"\b(its|with another dog|wearing a (sweater|party hat|red collar)|a muzzle)\b"
)
_COLD = re.compile(r"snow|ski(ing)?\b|sled|ice\b|frozen")
_WET = re.compile(r"swim|surf|pool|splash|wading|water\b|diving|into a lake|sprinkler|bath|waves|rafting|kayak")
_NOTHING = re.compile(r"costume|dress up|under the water|bath")
_FIRST = ("old", "small", "large", "wooden", "young", "fluffy", "shaggy", "wet", "muddy")
_SAME = {"sheep": "sheep", "fish": "fish", "deer": "deer", "goose": "geese", "calf": "calves"}


def write(out: Path) -> None:
    """Writes the phrases, one a line."""
    with new_directory(out) as folder:
        (folder / FILE).write_text("".join(f"{phrase}\n" for phrase in phrases()), encoding="utf-8")


def phrases(seed: int = 0) -> list[str]:
    """The captions, all different, in a fixed order."""
    chosen: dict[str, None] = {}
    for kind, made in _kinds(seed).items():
        if kind not in _ENDLESS:
            made = sorted(set(made))
            random.Random(f"{seed} {kind}").shuffle(made)
        chosen |= dict.fromkeys(islice(_unlike(made, chosen), SHARES[kind]))
    return list(chosen)


def _unlike(made: Iterable[str], chosen: Container[str]) -> Iterator[str]:
    """Each of `made` once, without those that are chosen."""
    seen = set()
    for phrase in made:
        if phrase not in seen and phrase not in chosen:
            seen.add(phrase)
            yield phrase


def _kinds(seed: int) -> dict[str, Iterator[str]]:
    anyone, adults, children = (_table(_WORDS[name]) for name in ("anyone_does", "adults_do", "children_do"))
    return {
        "adult": _people(_list(_WORDS["adults"]), _merged(anyone, adults), _list(_WORDS["wearing"]), seed),
        "adults": _groups(_list(_WORDS["adult_groups"]), _merged(anyone, adults)),
        "child": _people(_list(_WORDS["children"]), _merged(anyone, children), _list(_WORDS["child_wearing"]), seed),
        "children": _groups(_list(_WORDS["child_groups"]), _merged(anyone, children)),
        "dog": _dogs(),
        "dogs": _groups(_list(_WORDS["dog_groups"]), _table(_WORDS["dogs_do"])),
        "animal": _animals(),
        "animals": _animal_groups(),
        "vehicle": _vehicles(),
        "food": _foods(),
        "object": _objects(),
        "place": (_sentence(a, b) for a, b in _pairs(_WORDS["places"])),
        "sky": (_sentence(a, b, article=False) for a, b in _pairs(_WORDS["weather"])),
    }


def _people(who: list[str], table: dict[str, list[str]], wearing: list[str], seed: int) -> Iterator[str]:
    """Endlessly, every action as often as it has places: what one can wear would outnumber what one can do."""
    draw = random.Random(f"{seed} {who[0]}")
    doings = [f"{action} {place}" for action, places in table.items() for place in places]
    while True:
        subject, doing, verb = draw.choice(who), draw.choice(doings), draw.choice(("is ", ""))
        clothes = draw.choice(_clothes(doing, wearing)) if subject.count(" ") < 2 else ""
        if "dress" not in clothes or "boy" not in subject:
            yield _sentence(subject, clothes, verb + doing)


def _clothes(doing: str, wearing: list[str]) -> list[str]:
    """What one can sensibly wear doing this, with every colour."""
    if _NOTHING.search(doing):
        return [""]
    if _COLD.search(doing):
        wearing = ["in a COLOUR jacket", "in a COLOUR coat", "wearing a COLOUR hat"]
    elif _WET.search(doing):
        wearing = ["in COLOUR shorts", "in a COLOUR swimsuit", ""]
    made = [text.replace("TOP", top) for text in wearing for top in (_list(_WORDS["tops"]) if "TOP" in text else [""])]
    return ["", *(text.replace("COLOUR", colour) for text in made for colour in _list(_WORDS["colours"]))]


def _groups(who: list[str], table: dict[str, list[str]]) -> Iterator[str]:
    for subject, (action, places) in product(who, table.items()):
        action = _SEVERAL.get(action, action)
        for place, verb in product(places, ("are", "")):
            if not _ALONE.search(f"{action} {place}"):
                yield _sentence(subject, verb, action, place, article=False)


def _dogs() -> Iterator[str]:
    coats, dogs = ["", *_list(_WORDS["coats"])], _list(_WORDS["dogs"])
    for (action, place), coat, dog, verb in product(_pairs(_WORDS["dogs_do"]), coats, dogs, ("is", "")):
        yield _sentence(_coloured(coat, dog), verb, action, place)


def _animals() -> Iterator[str]:
    for (animal, doing), verb in product(_pairs(_WORDS["animals"]), ("is", "")):
        yield _sentence(animal, verb, doing)


def _animal_groups() -> Iterator[str]:
    many = ("two", "three", "several", "a group of")
    for (animal, doing), number, verb in product(_pairs(_WORDS["animals"]), many, ("are", "")):
        if " its " not in doing and " in a box" not in doing:
            yield _sentence(number, _plural(animal), verb, doing, article=False)


def _vehicles() -> Iterator[str]:
    for (vehicle, state), colour in product(_pairs(_WORDS["vehicles"]), ["", *_list(_WORDS["colours"])]):
        yield _sentence(_coloured(colour, vehicle), state)


def _objects() -> Iterator[str]:
    for (thing, place), colour in product(_pairs(_WORDS["objects"]), ["", *_list(_WORDS["colours"])]):
        if not colour or thing in _list(_WORDS["coloured_objects"]):
            yield _sentence(_coloured(colour, thing), place)


def _foods() -> Iterator[str]:
    for (dish, food), place in product(_pairs(_WORDS["foods"]), _list(_WORDS["food_places"], empty=True)):
        yield _sentence(dish, food, place)


def _sentence(*parts: str, article: bool = True) -> str:
    text = " ".join(" ".join(parts).split())
    if article:
        text = f"a {text}"
    text = re.sub(r"\ba (?=[aeio]|umb)", "an ", text)
    return f"{text[0].upper()}{text[1:]}."


def _coloured(colour: str, thing: str) -> str:
    """The colour stands behind words of size, age and state: an old red car."""
    first, _, rest = thing.partition(" ")
    return f"{first} {colour} {rest}" if first in _FIRST and rest else f"{colour} {thing}"


def _plural(noun: str) -> str:
    head, _, last = noun.rpartition(" ")
    if last in _SAME:
        last = _SAME[last]
    elif last[-1] == "y" and last[-2] not in "aeo":
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last[-1] in "sx" else "s"
    return f"{head} {last}".strip()


def _list(text: str, empty: bool = False) -> list[str]:
    entries = [" ".join(entry.split()) for entry in text.split(";")]
    return [entry for entry in entries if entry or empty]


def _table(text: str) -> dict[str, list[str]]:
    """The lines of a table; indented lines continue the one before."""
    lines = re.split(r"\n(?=\S)", text.strip())
    table: dict[str, list[str]] = {}
    for what, where in (line.split("|") for line in lines):
        table.setdefault(" ".join(what.split()), []).extend(_list(where, empty=where.rstrip().endswith(";")))
    return table


def _merged(one: dict[str, list[str]], other: dict[str, list[str]]) -> dict[str, list[str]]:
    return {what: one.get(what, []) + other.get(what, []) for what in {**one, **other}}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    return ((thing, where) for things, places in _table(text).items() for thing in _list(things) for where in places)
