"""What captions are judged with beside their references."""

from dataclasses import dataclass

from clipcap_rag.config import Config, option
from clipcap_rag.errors import InputError

_NEEDS = (("clip", "photos"), ("photos", "clip"), ("synonyms", "instances"))


@dataclass(frozen=True)
class JudgingConfig(Config):
    """The metrics that need more than words, and what to do about photos without caption or references."""

    java: bool = option(True, "use the tokenizer, METEOR and SPICE of coco-caption, in Java, where they can run")
    clip: str | None = option(None, "CLIP model for CLIPScore and RefCLIPScore, best one the captioner never used")
    photos: str | None = option(
        None, "folder of the photos, for CLIPScore; or for --report, if it is not the one they were extracted from"
    )
    instances: str | None = option(None, "COCO instances file of the photos, for CHAIR")
    synonyms: str | None = option(None, "more names of the instances, for CHAIR: lines of category, name, name")
    allow_missing: bool = option(False, "score the photos that have both caption and references, and count the others")

    def __post_init__(self) -> None:
        super().__post_init__()
        for given, other in _NEEDS:
            if getattr(self, given) and not getattr(self, other):
                raise InputError(f"--{given} {getattr(self, given)} is of no use without --{other}; give both")
