"""Captions scored against references, and two sets of captions compared, every figure with its 95 % interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipcap_rag.bootstrap import Estimate, Measure, Variety, estimates
from clipcap_rag.diversity import copied_neighbors, variety
from clipcap_rag.errors import InputError
from clipcap_rag.java_metrics import JAVA_TOKENIZER, java_fault, java_tokenize, meteor, spice, spice_fault
from clipcap_rag.metrics import cider, word_measures
from clipcap_rag.ptb_tokens import PYTHON_TOKENIZER, tokenize

Texts = Sequence[str]
Judge = Callable[[Sequence[Texts], Texts], Mapping[str, Measure | Variety]]  # references, captions -> measures


def score(
    references: Sequence[Texts],
    captions: Texts,
    *,
    neighbors: Sequence[Texts] | None = None,
    domains: Sequence[str | None] | None = None,
    judges: Sequence[Judge] = (),
    java: bool = False,
) -> dict[str, Any]:
    """Scores one caption for each photo.

    Args:
        references: per photo, its reference captions.
        captions: per photo, the caption to judge; an empty one has 0.
        neighbors: per photo, the captions that were retrieved for it.
        domains: per photo, a group whose photos are also scored alone, as those of nocaps are.
        judges: further metrics, such as `ClipScores`, `Hallucinations` and `IndexCopies`.
        java: take the tokenizer, METEOR and SPICE that are in Java, where they can run.

    Returns:
        {"images", "empty_captions", "metrics": {"CIDEr": {"value", "low", "high"}, ...}, "domains": {NAME: {"images",
        "metrics"}}, "tokenizer": {"name", "agreement", ...}, "missing": {METRIC: why}}; raw fractions, None where a
        figure is not defined. CIDEr in a domain weighs words by the references of that domain.

    Raises:
        InputError: there is no photo, a photo has no reference, or the lists differ in length.
    """
    (judged,), tokenizer, missing = _judge(references, [captions], [neighbors], judges, java)
    result = {"images": len(captions), "empty_captions": sum(not caption.strip() for caption in captions)}
    result["metrics"] = _shown(estimates(judged.measures))
    if domains and any(domains):
        result["domains"] = {
            name: {"images": len(rows), "metrics": _shown(estimates(judged.part(rows)))}
            for name, rows in _rows_of(domains).items()
        }
    return result | {"tokenizer": tokenizer, "missing": missing}


def paired_difference(
    references: Sequence[Texts],
    first: Texts,
    second: Texts,
    *,
    neighbors: Sequence[Sequence[Texts] | None] = (None, None),
    domains: Sequence[str | None] | None = None,
    judges: Sequence[Judge] = (),
    java: bool = False,
) -> dict[str, Any]:
    """Scores two captions for each photo and their difference, first minus second, on the same resamples of photos.

    Args:
        first, second: per photo, a caption of each captioner.
        neighbors: of the first and of the second, as `score` takes them.

    Returns:
        as `score`, with {"first", "second", "difference"} in place of each figure.
    """
    both, tokenizer, missing = _judge(references, [first, second], list(neighbors), judges, java)
    result = {
        "images": len(first),
        "empty_captions": [sum(not text.strip() for text in texts) for texts in (first, second)],
    }
    result["metrics"] = _compared(*(judged.measures for judged in both))
    if domains and any(domains):
        result["domains"] = {
            name: {"images": len(rows), "metrics": _compared(*(judged.part(rows) for judged in both))}
            for name, rows in _rows_of(domains).items()
        }
    return result | {"tokenizer": tokenizer, "missing": missing}


@dataclass(frozen=True)
class _Judged:
    """The measures of one set of captions, and the words that CIDEr needs again for a part of the photos."""

    measures: dict[str, Measure | Variety]
    references: list[list[str]]
    captions: list[str]

    def part(self, rows: Sequence[int]) -> dict[str, Measure | Variety]:
        parts = {name: measure.part(rows) for name, measure in self.measures.items()}
        return parts | cider([self.references[row] for row in rows], [self.captions[row] for row in rows])


def _judge(
    references: Sequence[Texts],
    systems: Sequence[Texts],
    neighbors: Sequence[Sequence[Texts] | None],
    judges: Sequence[Judge],
    java: bool,
) -> tuple[list[_Judged], dict[str, Any], dict[str, str]]:
    """The measures of each set of captions, what their words were made with, and the metrics left out, with reasons."""
    _check(references, systems, neighbors)
    missing: dict[str, str] = {}
    words, judged_words, tokenizer = _tokenized(references, systems, java, missing)
    if any(near is None for near in neighbors):
        missing["copied-neighbor"] = "the captions come without the neighbours that were retrieved for them"
    judged = []
    for captions, texts, near in zip(systems, judged_words, neighbors, strict=True):
        measures = word_measures(words, texts)
        for metric, compute in (("METEOR", meteor), ("SPICE", spice)):
            if metric not in missing:
                try:
                    measures |= compute(words, texts)
                except InputError as error:
                    missing[metric] = str(error)
        measures |= variety(texts)
        if "copied-neighbor" not in missing:
            measures |= copied_neighbors(captions, near)
        for judge in judges:
            measures |= judge(references, captions)
        judged.append(_Judged(measures, words, texts))
    return judged, tokenizer, missing


def _tokenized(
    references: Sequence[Texts], systems: Sequence[Texts], java: bool, missing: dict[str, str]
) -> tuple[list[list[str]], list[list[str]], dict[str, Any]]:
    """The words of references and captions, and what made them; `missing` is told of what Java cannot give."""
    texts = [text for part in (*references, *systems) for text in part]
    fault = java_fault() if java else "the programs in Java were not asked for"
    words, tokenizer = None, PYTHON_TOKENIZER
    if fault is None:
        try:
            words, tokenizer = java_tokenize(texts), JAVA_TOKENIZER
        except InputError as error:
            fault = str(error)
    faults = {"METEOR": fault, "SPICE": fault or spice_fault()}
    missing |= {metric: reason for metric, reason in faults.items() if reason}
    following = iter(words if words is not None else map(tokenize, texts))
    parts = [[next(following) for _ in part] for part in (*references, *systems)]
    return parts[: len(references)], parts[len(references) :], tokenizer


def _check(references: Sequence[Texts], systems: Sequence[Texts], neighbors: Sequence[Sequence[Texts] | None]) -> None:
    if not len(references):
        raise InputError("there is no photo to score; give references and captions")
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"photo {row} has no list of references; give each photo at least one")
    for captions in systems:
        if len(captions) != len(references) or not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"{len(captions)} captions for {len(references)} photos; give a text for each")
    for near in neighbors:
        if near is not None and len(near) != len(references):
            raise InputError(f"{len(near)} lists of neighbours for {len(references)} photos; give one for each")


def _rows_of(domains: Sequence[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, domain in enumerate(domains):
        rows.setdefault(domain or "no domain", []).append(row)
    return rows


def _shown(found: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in found.items()}


def _compared(first: Mapping[str, Measure | Variety], second: Mapping[str, Measure | Variety]) -> dict[str, Any]:
    ours, theirs = estimates(first), estimates({name: second[name] for name in second if name in first})
    return {
        name: {
            "first": ours[name].to_json(),
            "second": theirs[name].to_json(),
            "difference": (ours[name] - theirs[name]).to_json(),
        }
        for name in theirs
    }
