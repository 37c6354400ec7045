"""What a CLIP model makes of images and texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Embeddings:
    """CLIP embeddings of N inputs.

    Attributes:
        vectors: [N, D] float32, of length 1, or 0 for an image that could not be read.
        norms: [N] float32, the lengths that the tower gave.
        trunk: [N, T] float32, features of the image tower (`image_tower`), None where they were not asked for.
    """

    vectors: np.ndarray
    norms: np.ndarray
    trunk: np.ndarray | None = None

    @classmethod
    def of(cls, raw: np.ndarray, trunk: np.ndarray | None = None) -> "Embeddings":
        """Those that the tower gave as they are, [N, D], and features [N, T], as float32."""
        raw = np.asarray(raw, np.float32)
        norms = np.linalg.norm(raw, axis=1)
        trunk = None if trunk is None else np.asarray(trunk, np.float32)
        return cls(raw / np.where(norms > 0, norms, 1)[:, None], norms, trunk)

    @property
    def raw(self) -> np.ndarray:
        """[N, D] float32 as the tower gave them; ClipCap's published MLP weights want these."""
        return self.vectors * self.norms[:, None]

    def part(self, rows: slice | Sequence[int]) -> "Embeddings":
        """Those of some of the inputs."""
        return Embeddings(self.vectors[rows], self.norms[rows], None if self.trunk is None else self.trunk[rows])

    @staticmethod
    def joined(parts: "Sequence[Embeddings]") -> "Embeddings":
        """Those of all parts, of which all or none have features of the trunk."""
        trunk = None if any(part.trunk is None for part in parts) else np.concatenate([part.trunk for part in parts])
        vectors, norms = (np.concatenate([getattr(part, name) for part in parts]) for name in ("vectors", "norms"))
        return Embeddings(vectors, norms, trunk)


@dataclass(frozen=True)
class EncodedImages:
    """Embeddings of images.

    Attributes:
        embeddings: one per image; zero where there is an error.
        errors: per image None, or a sentence that says why it could not be encoded.
        digests: per image the hash of its content (`images.image_digest`), empty where it could not be read.
    """

    embeddings: Embeddings
    errors: list[str | None]
    digests: list[bytes]
