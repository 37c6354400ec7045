"""What comes with the package: the starter, a small captioner with its CLIP, and its caption index."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcap_rag.errors import InputError

STARTER = "starter"  # its name as a captioner, as a CLIP model and as an index
_PACKAGE = Path(__file__).parent


def starter_checkpoint() -> Path:
    """The folder of the captioner called `starter`."""
    return _PACKAGE / "models" / STARTER


def starter_clip() -> Path:
    """The open_clip model folder of the CLIP called `starter`."""
    return starter_checkpoint() / "clip"


def index_homes() -> list[Path]:
    """Where the indexes lie that come with the package: in it, or at the top of a source checkout."""
    return [_PACKAGE / "indexes"] + ([_PACKAGE.parent / "index"] if _is_checkout() else [])


def is_shipped(folder: Path) -> bool:
    """Whether a checkpoint or an index is the one that comes with the package."""
    homes = [_PACKAGE / "models", *index_homes()]
    return folder.name == STARTER and folder.parent.resolve() in [home.resolve() for home in homes]


@contextmanager
def mending(folder: Path) -> Iterator[None]:
    """Makes the error about a missing, altered or unknown file in `folder` say how to get it back, if we shipped it."""
    try:
        yield
    except InputError as error:
        if not is_shipped(folder):
            raise
        raise damaged(str(error).rpartition("; ")[0] or str(error)) from error


def damaged(problem: str) -> InputError:
    """The error for a file of the starter that cannot be used."""
    again = "git restore clipcap_rag index" if _is_checkout() else "pip install --force-reinstall --no-deps clipcap-rag"
    return InputError(f"the starter is damaged: {problem}; get its files back with: {again}")


def _is_checkout() -> bool:
    return (_PACKAGE.parent / "pyproject.toml").is_file()
