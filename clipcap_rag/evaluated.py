"""What an evaluation is about: photos with captions that people wrote, and a checkpoint that captions them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from clipcap_rag.captioner import Captioner
from clipcap_rag.checkpoint import MANIFEST, checkpoint_folder
from clipcap_rag.embeddings import Embeddings
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the hash of its manifest, which holds the hashes of its files."""

    captioner: Captioner
    identity: str

    @classmethod
    def open(cls, model: str | Path, device: str, dtype: str) -> Self:
        """Raises InputError as `Captioner.from_pretrained`."""
        folder = checkpoint_folder(model)
        captioner = Captioner.from_pretrained(folder, device, dtype)
        identity = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        return cls(captioner, f"{identity} {captioner.device.type} {captioner.dtype}")


@dataclass(frozen=True)
class Photos:
    """N photos that are captioned and judged.

    Attributes:
        name: what tables and folders call their feature set.
        features: where they come from.
        references: per photo, the captions that people wrote.
        digests: per photo, the hash that seeds its samples.
        embeddings: [N, D] of the images.
    """

    name: str
    features: FeatureSet
    image_ids: list[str]
    images: list[str]
    references: list[list[str]]
    digests: list[bytes]
    embeddings: Embeddings

    @classmethod
    def of(cls, features: FeatureSet, name: str, most: int = 0) -> Self:
        """The first `most` photos of a feature set; 0 takes all."""
        first = slice(0, most or None)
        columns = (features.image_ids, features.images, features.captions, features.digests)
        return cls(name, features, *(column[first] for column in columns), features.encoded(first))

    def __len__(self) -> int:
        return len(self.images)

    def check(self, subject: Subject, owner: str) -> None:
        """Raises InputError unless the CLIP model of a checkpoint made the embeddings."""
        record = subject.captioner.checkpoint.encoder
        check_same_encoder(record, owner, self.features.encoder, f"the feature set {self.features.path}")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell them all apart.

    Raises:
        InputError: two paths are the same.
    """
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if paths:
        twice = next(path for place, path in enumerate(paths) if parts.index(parts[place]) != place)
        raise InputError(f"{twice} is given twice; name each once")
    return []
