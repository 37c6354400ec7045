"""Which indexes a captioner retrieves from: its own, none, others by name or path, several with weights."""

from collections.abc import Sequence
from pathlib import Path

from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.progress import say
from clipcap_rag.retriever import Retriever, index_choice
from clipcap_rag.shipped import STARTER

IndexChoice = str | Path | CaptionIndex | Sequence[str | Path | CaptionIndex] | None


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

    def retriever(self, index: IndexChoice, num_neighbors: int | None = None) -> tuple[Retriever, int]:
        """The retriever over the chosen indexes and the number of neighbours; both as `Captioner.caption` takes them.

        Raises:
            InputError: an index is missing, is of another CLIP model, or is given to a mapper without neighbours.
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
            return Retriever([]), 0
        choices = [index] if isinstance(index, (str, Path, CaptionIndex)) else list(index)
        named = [(choice, 1.0) if isinstance(choice, CaptionIndex) else index_choice(str(choice)) for choice in choices]
        retriever = Retriever([self.open(choice) for choice, _ in named], [weight for _, weight in named])
        held = sum(len(opened) for opened in retriever.indexes)
        if k > held:
            say(f"{k} neighbours were asked for but the index holds {held} captions; using what there is")
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
