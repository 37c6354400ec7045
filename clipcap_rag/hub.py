"""The Hugging Face hub: repositories as local folders, fetched once and found again without a network."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from clipcap_rag.artifact import check_files, read_json
from clipcap_rag.errors import InputError
from clipcap_rag.progress import say

# huggingface_hub is imported where it is used: that takes a moment, and most commands do without it.

PREFIX, CARD = "hf-hub:", "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
LANGUAGE_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
_DATA = {".json", ".safetensors", ".txt", ".model", ".md", ".arrow", ".npy", ".faiss"}  # none of them holds code
_NAME = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?:@([\w][\w./-]*))?")


def is_data(name: str) -> bool:
    """Whether a path inside a repository stays there and is of a kind that holds no code."""
    path = PurePosixPath(name)
    return path.suffix in _DATA and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def is_name(name: str) -> bool:
    """Whether this can be the name of a repository: ORG/NAME or NAME."""
    return "@" not in name and _NAME.fullmatch(name) is not None


def artifact_name(folder: Path) -> str:
    """The name of a folder, or of the repository whose copy in the cache it is."""
    path = folder.resolve()
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def fetch(name: str, files: Sequence[str], repo_type: str = "model") -> Path:
    """The folder in the cache of the hub with `files` of a repository; without a network, what was fetched before.

    The hub is asked once, with a time limit, before anything else: left to itself its library asks six times for each
    file and waits 23 s in between.

    Args:
        name: ORG/NAME or NAME, with or without hf-hub: before it and @REVISION (branch, tag or commit) behind it.
        files: names or patterns of the files that are wanted; one that is not there is left out.
        repo_type: model or dataset.

    Raises:
        InputError: there is no such repository or revision, or it may not be read, or there is no network and no copy.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    matched = _NAME.fullmatch(name.removeprefix(PREFIX))
    if not matched:
        raise InputError(f"{name!r} is neither a folder nor a name on the hub; give a folder, or ORG/NAME of the hub")
    repo, revision = matched.groups()
    wanted = {"repo_type": repo_type, "revision": revision, "allow_patterns": list(files)}
    try:
        HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(snapshot_download(repo, **wanted))
    except Exception as error:  # whatever a network, a server or a full disk makes the library raise
        try:
            folder = Path(snapshot_download(repo, local_files_only=True, **wanted))
        except Exception:
            raise _refusal(name, error) from error
        if not constants.HF_HUB_OFFLINE:
            say(f"{name} cannot be asked for on the hub ({_reason(error)}); using the copy fetched before")
        return folder


def fetch_artifact(name: str, manifest: str, kind: str, repo_type: str = "model") -> Path:
    """The folder of a checkpoint or index: the files that its manifest names, checked against it, and no others.

    Args:
        name: as `fetch` takes it.
        manifest: file name of the manifest.
        kind: what the manifest must be of.

    Raises:
        InputError: as `fetch`; or the repository is no `kind`, names files that can hold code, or differs from its
            manifest.
    """
    folder = fetch(name, [manifest, CARD], repo_type)
    stored = read_json(folder / manifest, kind) if (folder / manifest).is_file() else {}
    if stored.get("kind") != kind:
        raise InputError(f"{name} is not a {kind} of clipcap-rag; give one that `clipcap-rag push` made")
    files = stored.get("files")
    strange = [file for file in files if not is_data(file)] if isinstance(files, dict) else ["no files"]
    if strange:
        raise InputError(f"the {kind} {name} lists {strange[0]}, which no {kind} has; use another one")
    missing = [glob.escape(file) for file in files if not (folder / file).is_file()]
    if missing:
        fetch(f"{name.partition('@')[0]}@{folder.name}", missing, repo_type)  # the same commit as the manifest
    try:
        check_files(folder, files, kind)
    except InputError as error:
        problem = str(error).rpartition("; ")[0]
        again = f"remove {folder.parents[1]} and run the same command again"
        raise InputError(f"{name} is damaged ({problem}); {again}, and if that does not help tell its owner") from error
    return folder


def _refusal(name: str, error: Exception) -> InputError:
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: the hub has no such revision; give a branch, a tag or a commit after @")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name} is only for those who accept its terms; do so on its page of the hub and {login}")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return InputError(f"{name} is not on the hub, or not for everybody; check the spelling, or {login}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name!r} is no name on the hub; write ORG/NAME")
    return InputError(
        f"{name} is not in the cache of the hub and cannot be fetched ({_reason(error)}); "
        "run this once with a network connection, or give a folder"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no further word').splitlines()[0].rstrip('.')}"
