"""CHAIR: how many of the objects that captions name are not in the photo."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_rag.bootstrap import Measure, mean, ratio
from clipcap_rag.errors import InputError
from clipcap_rag.json_documents import load_document
from clipcap_rag.lines import BadLines, read_lines
from clipcap_rag.ptb_tokens import tokenize

_PLURALS = {
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
}


class ObjectNames:
    """The objects that a text names: the names of categories, their plurals, spellings of compounds, and synonyms."""

    def __init__(self, categories: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None):
        """synonyms: further names by category.

        Raises:
            InputError: one name belongs to two categories.
        """
        self._owner: dict[tuple[str, ...], str] = {}
        named = [(name, name) for name in categories]
        named += [(category, name) for category, names in (synonyms or {}).items() for name in names]
        for category, name in named:
            if self._owner.setdefault(tuple(tokenize(name).split()), category) != category:
                other = self._owner[tuple(tokenize(name).split())]
                raise InputError(f"{name!r} is a name of {other!r} and of {category!r}; take it out of one of them")
        for name, category in list(self._owner.items()):
            for form in _forms(name):
                self._owner.setdefault(form, category)
        self._longest = max(map(len, self._owner), default=0)

    def mentioned(self, text: str) -> list[str]:
        """The categories that a text names, in order, one entry per mention; the longest name counts."""
        words, found, place = tokenize(text).split(), [], 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                category = self._owner.get(tuple(words[place : place + length]))
                if category is not None:
                    found.append(category)
                    place += length
                    break
            else:
                place += 1
        return found


def _forms(name: tuple[str, ...]) -> set[tuple[str, ...]]:
    """A name of several words also joined and with hyphens, each singular and plural."""
    spelled = {name, ("".join(name),), ("-".join(name),)}
    return spelled | {(*words[:-1], form) for words in spelled if words for form in _numbers(words[-1])}


def _numbers(word: str) -> set[str]:
    """The plurals that a word may have, and its singular if it looks like a plural."""
    forms = {word + "s", word + "es"}
    for singular, plural in _PLURALS.items():
        if word.endswith(singular):
            forms.add(word.removesuffix(singular) + plural)
    if word.endswith("man"):
        forms.add(word.removesuffix("man") + "men")
    if word.endswith(("f", "fe")):
        forms.add(word.rpartition("f")[0] + "ves")
    if word.endswith("y") and word[-2:-1] not in set("aeiou"):
        forms.add(word.removesuffix("y") + "ies")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        forms.add(word.removesuffix("s"))
    return forms


class Hallucinations:
    """CHAIR (Rohrbach et al. 2018): objects in a caption that neither the photo's instances nor its references show."""

    def __init__(self, names: ObjectNames, present: Sequence[set[str]]):
        """present: per photo, the categories of its instances."""
        self.names, self.present = names, present

    def __call__(self, references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
        """CHAIR-s, the share of captions with such an object, and CHAIR-i, the share of such among all mentions."""
        mentions, wrong = [], []
        for texts, caption, present in zip(references, captions, self.present, strict=True):
            known = present.union(*(self.names.mentioned(text) for text in texts))
            said = self.names.mentioned(caption)
            mentions.append(len(said))
            wrong.append(sum(category not in known for category in said))
        return {"CHAIR-s": mean([count > 0 for count in wrong]), "CHAIR-i": ratio(wrong, mentions)}


def read_instances(path: Path) -> tuple[list[str], dict[str, set[str]]]:
    """The categories of a COCO instances file, and those in each photo, by its id and by the stem of its file.

    Raises:
        InputError: it is no such file.
    """
    document = load_document(path)
    lists = [
        document.get(key) if isinstance(document, dict) else None for key in ("images", "annotations", "categories")
    ]
    if not all(isinstance(entries, list) for entries in lists):
        raise InputError(f"{path} is no instances file: it needs the lists images, annotations and categories")
    images, annotations, categories = lists
    names = {_id(entry, "id", path): _name(entry, path) for entry in categories}
    present: dict[str, set[str]] = {}
    for number, annotation in enumerate(annotations):
        category = names.get(_id(annotation, "category_id", path))
        if category is None:
            raise InputError(f"{path}:annotations[{number}] has a category_id that is not among the categories")
        present.setdefault(_id(annotation, "image_id", path), set()).add(category)
    found = {}
    for entry in images:
        number, file = _id(entry, "id", path), entry.get("file_name")
        found[number] = present.get(number, set())
        if isinstance(file, str):
            found[PurePosixPath(file).stem] = found[number]
    return list(names.values()), found


def _id(entry: Any, key: str, path: Path) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) not in (int, str):
        raise InputError(f"{path} has an entry without {key}; give a COCO instances file")
    return str(value)


def _name(entry: dict[str, Any], path: Path) -> str:
    if not isinstance(entry.get("name"), str) or not tokenize(entry["name"]):
        raise InputError(f"{path} has a category without name; give a COCO instances file")
    return entry["name"]


def read_synonyms(path: Path, categories: Sequence[str]) -> dict[str, list[str]]:
    """Further names of categories from lines of the form `category, name, name`.

    Raises:
        InputError: it cannot be read, or a line begins with no category.
    """
    synonyms: dict[str, list[str]] = {}
    for number, line in read_lines(path, BadLines()):
        category, *names = (name.strip() for name in line.split(","))
        if category not in categories:
            raise InputError(f"{path}:{number}: {category!r} is no category of the instances file; begin with one")
        synonyms.setdefault(category, []).extend(name for name in names if tokenize(name))
    return synonyms
