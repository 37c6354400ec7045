"""Which indexes a captioner retrieves from: its own, none, others by name or path, several with weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import RetrievalConfig
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.progress import say
from clipcap_rag.retriever import Retriever
from clipcap_rag.shipped import STARTER

IndexChoice = str | Path | CaptionIndex | Sequence[str | Path | CaptionIndex] | None


@dataclass(frozen=True)
class Choice:
    """An index to retrieve from.

    Attributes:
        index: name, path or open index.
        weight: what its cosines are multiplied with where several indexes are put in order.
        most: at most so many neighbours of a photo come from it; None is no limit.
    """

    index: str | Path | CaptionIndex
    weight: float = 1.0
    most: int | None = None

    @classmethod
    def of(cls, index: str | Path | CaptionIndex) -> "Choice":
        """From `NAME`, `NAME:WEIGHT` or `NAME:WEIGHT:MOST`; what exists as a path is one, whatever its name."""
        if isinstance(index, CaptionIndex) or Path(index).exists():
            return cls(index)
        name, weight, most = re.fullmatch(r"(.+?)(?::([\d.]+(?:e-?\d+)?)(?::(\d+))?)?", str(index), re.DOTALL).groups()
        try:
            return cls(name, float(weight or 1), None if most is None else int(most))
        except ValueError:  # a name that ends like 1.2.3
            return cls(index)


class OpenIndexes:
    """The indexes that a captioner has opened, each once."""

    def __init__(self, checkpoint: Checkpoint, device: str, base: Path | None = None):
        """device: where they are searched, as `CaptionIndex.open` takes it; base: the folder of relative paths."""
        self.checkpoint, self.device, self._base = checkpoint, device, base or Path()
        self._opened: dict[str, CaptionIndex] = {}

    def open(self, index: str | Path | CaptionIndex) -> CaptionIndex:
        """Opens an index, once, and checks that the checkpoint's CLIP made it."""
        if isinstance(index, CaptionIndex):
            opened = index
        else:
            opened = self._opened.get(str(index)) or CaptionIndex.open(index, self.device)
            self._opened[str(index)] = opened
        check_same_encoder(self.checkpoint.encoder, "the model", opened.encoder, f"the index {opened.path}")
        return opened

    def retriever(
        self, index: IndexChoice, num_neighbors: int | None = None, retrieval: RetrievalConfig | None = None
    ) -> tuple[Retriever, int]:
        """The retriever over the chosen indexes and the number of neighbours; all as `Captioner.caption` takes them.

        Raises:
            InputError: an index is missing, is of another CLIP model, or is given to a mapper without neighbours;
                nothing is retrieved but `retrieval` says what; or as `Retriever`.
        """
        k = self.checkpoint.num_neighbors if num_neighbors is None else num_neighbors
        if k < 0:
            raise InputError(f"num_neighbors is {k}; it must be 0 or more")
        if isinstance(index, str) and index == "default":
            index = self._default() if k else None
        elif index is not None and not self.checkpoint.model.mapper.uses_neighbors:
            raise InputError(
                f"this model's {self.checkpoint.config.mapper} mapper looks at no neighbours; "
                "drop --index or train one with --mapper retrieval"
            )
        if index is None or k == 0:
            if retrieval not in (None, RetrievalConfig()):
                raise InputError("there is no retrieval here for a route, where or deny to guide; leave them out")
            return Retriever([]), 0
        choices = [index] if isinstance(index, (str, Path, CaptionIndex)) else list(index)
        chosen = [Choice.of(choice) for choice in choices]
        retriever = Retriever(
            [self.open(choice.index) for choice in chosen],
            [choice.weight for choice in chosen],
            [choice.most for choice in chosen],
            retrieval,
            photos_vote=self.checkpoint.raises_words,
        )
        available = retriever.allowed.available
        if num_neighbors is not None and k > available:
            say(f"{k} neighbours were asked for but {available} captions may be retrieved; using these")
        return retriever, k

    def _default(self) -> str | None:
        recorded = self.checkpoint.index
        if recorded is None:
            return None
        if recorded["path"] == STARTER:
            return STARTER
        beside = self._base / recorded["path"]  # a pushed checkpoint may bring its index along
        if beside.is_dir():
            return str(beside)
        raise InputError(
            f"the index this model was trained with, {recorded['path']}, is gone; "
            "pass --index NAME|PATH for another, or --no-retrieval"
        )
