"""What good neighbours bring, what bad ones cost, and what is copied from them: effects, each with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clipcap_rag.bootstrap import Measure, estimates, ratio
from clipcap_rag.evaluated import Photos
from clipcap_rag.metrics import cider
from clipcap_rag.neighbor_conditions import Condition
from clipcap_rag.prediction_files import Predictions
from clipcap_rag.ptb_tokens import tokenize


def effects(
    photos: Photos, conditions: Mapping[str, Condition], written: Mapping[str, Predictions], k: int
) -> Iterator[dict[str, Any]]:
    """Benefit, harm and copying, each as a difference of two conditions on the same photos with a 95 % interval.

    Args:
        conditions, written: by the names that `neighbor_conditions.robustness` gives.
    """
    references = [[tokenize(text) for text in texts] for texts in photos.references]
    words = {name: [tokenize(caption) for caption in found.captions] for name, found in written.items()}
    majority = [
        [tokenize(text) for text in captions[1:]] for captions in conditions["wrong majority"].neighbors.captions
    ]
    ciders = {name: cider(references, words[name])["CIDEr"] for name in (f"nearest {k}", "none", "random")}
    copies = {name: copied_words(words[name], majority, references) for name in ("wrong majority", "none")}
    for effect, metric, first, second, measures in (
        ("benefit", "CIDEr", f"nearest {k}", "none", ciders),
        ("harm", "CIDEr", "none", "random", ciders),
        ("copying", "copied words", "wrong majority", "none", copies),
    ):
        of, minus = estimates({first: measures[first], second: measures[second]}).values()
        yield {
            "effect": effect,
            "metric": metric,
            "of": {"neighbors": conditions[first].name, **of.to_json()},
            "minus": {"neighbors": conditions[second].name, **minus.to_json()},
            **(of - minus).to_json(),
        }


def copied_words(
    captions: Sequence[str], majority: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> Measure:
    """The share of the words of all captions that some caption of a photo's majority has and no reference of it has.

    All texts are words joined by spaces.
    """
    copied, total = [], []
    for caption, others, own in zip(captions, majority, references, strict=True):
        foreign = set(" ".join(others).split()) - set(" ".join(own).split())
        copied.append(sum(word in foreign for word in caption.split()))
        total.append(len(caption.split()))
    return ratio(copied, total)
