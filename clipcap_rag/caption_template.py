"""The sentence around a caption that CLIP reads in its place, such as `a photo of {}`."""

from collections.abc import Sequence
from typing import Any

from clipcap_rag.errors import InputError

PLAIN = "{}"


def check_template(template: str) -> None:
    """Raises InputError unless `template` has exactly one place for the caption."""
    if template.count(PLAIN) != 1 or not template.isprintable():
        raise InputError(
            f"the template {template!r} must be plain text with {PLAIN} in it once, such as 'a photo of {PLAIN}'"
        )


def fill_template(template: str, captions: Sequence[str]) -> list[str]:
    """The texts to encode for `captions`."""
    return [template.replace(PLAIN, caption) for caption in captions]


def template_of(manifest: dict[str, Any]) -> str:
    """The template in which the captions of an index were encoded, from its index.json; whoever adds some uses it."""
    return str(manifest["provenance"].get("template", PLAIN))
