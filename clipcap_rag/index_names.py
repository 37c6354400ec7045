"""Where caption indexes are found: by path, or by name in the places that are searched for it."""

import os
from pathlib import Path

from clipcap_rag import hub, shipped
from clipcap_rag.artifact import staging_path
from clipcap_rag.errors import InputError
from clipcap_rag.index_store import KIND, MANIFEST


def resolve_index(name_or_path: str | Path) -> Path:
    """The directory of an index: a path, a bare name looked up in the places of `index_homes`, or hf-hub:ORG/NAME.

    Raises:
        InputError: nothing is there; the sentence lists the names that are known.
    """
    if str(name_or_path).startswith(hub.PREFIX):
        return hub.fetch_artifact(str(name_or_path), MANIFEST, KIND, "dataset")
    path = Path(name_or_path).expanduser()
    if (path / MANIFEST).is_file():
        return path
    bare = len(path.parts) == 1 and path.name not in ("", "..")
    for home in index_homes() if bare else ():
        if (home / path / MANIFEST).is_file():
            return home / path
    if str(path) == shipped.STARTER:
        raise shipped.damaged("its caption index is missing")
    if path.name and staging_path(path).exists():
        raise InputError(f"caption index {path} is unfinished; run the command that began it again to complete it")
    if path.exists():
        raise InputError(
            f"{path} is not a caption index: it has no {MANIFEST}; give the folder that `index build` wrote"
        )
    known = sorted({file.parent.name for home in index_homes() for file in home.glob(f"*/{MANIFEST}")})
    names = f"known names are {', '.join(known)}" if known else "none is known by name"
    raise InputError(
        f"there is no caption index {str(name_or_path)!r}; {names}; give a name, or the path of an index folder"
    )


def index_homes() -> list[Path]:
    """Where bare names are looked up: $CLIPCAP_RAG_INDEX_DIR, ./index, then the indexes that come with the package."""
    given = os.environ.get("CLIPCAP_RAG_INDEX_DIR")
    homes = [Path(given).expanduser()] if given else []
    return [*homes, Path("index"), *shipped.index_homes()]
