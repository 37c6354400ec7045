"""Checkpoints and indexes made ready for other machines, and sent to the Hugging Face hub."""

import fnmatch
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcap_rag import checkpoint, index_store
from clipcap_rag.artifact import read_json, read_manifest, write_manifest
from clipcap_rag.checkpoint import checkpoint_folder
from clipcap_rag.config import ModelConfig
from clipcap_rag.encoder import check_same_encoder, parse_clip
from clipcap_rag.errors import InputError
from clipcap_rag.hub import CARD, LANGUAGE_MODEL_FILES, PREFIX, artifact_name, is_data, is_name
from clipcap_rag.index_names import resolve_index
from clipcap_rag.progress import say
from clipcap_rag.shipped import STARTER

_LOCAL = "local-dir:"
_MODEL_HEAD = """---
library_name: clipcap-rag
pipeline_tag: image-to-text
tags:
- image-captioning
- retrieval-augmented-generation
- clip
- gpt2
---

"""
_INDEX_HEAD = """---
task_categories:
- image-to-text
tags:
- image-captioning
- caption-index
- clipcap-rag
---

"""


@contextmanager
def packed(artefact: str | Path, repo: str, index: str | Path | None = None) -> Iterator[tuple[Path, str]]:
    """A temporary folder with everything that `artefact` needs on another machine, and the type of repository for it.

    A CLIP model or frozen language model that lies in a folder of this machine comes along, and so does `index`.
    Paths of this machine do not. Large files are links.

    Args:
        artefact: a captioner as `checkpoint_folder` takes it, or the folder of a caption index.
        repo: ORG/NAME, which the model card names.
        index: index to send with a captioner, which becomes its own.

    Raises:
        InputError: there is no such captioner or index, a file of it is missing or altered, or it needs a model whose
            weights are not in safetensors files; or `repo` can be no name.
    """
    if not is_name(repo):
        raise InputError(f"{repo!r} is no name on the hub; write --repo ORG/NAME")
    with tempfile.TemporaryDirectory(prefix="clipcap-rag-") as temporary:
        folder = Path(temporary)
        if (Path(artefact) / index_store.MANIFEST).is_file():
            if index is not None:
                raise InputError(f"{artefact} is an index itself; drop --index or give a model to push")
            _pack_index_alone(Path(artefact), folder, repo)
            yield folder, "dataset"
        else:
            _pack_checkpoint(checkpoint_folder(artefact), folder, repo, index)
            yield folder, "model"


def push(
    artefact: str | Path,
    repo: str,
    *,
    index: str | Path | None = None,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Sends a captioner, or a caption index as a data set, to the hub in one commit, and returns its address.

    The token is that of `hf auth login` or HF_TOKEN. A push that was cut off is repeated; large files that had arrived
    are not sent again.

    Args:
        artefact, repo, index: as `packed` takes them.
        private: visibility of a new repository; None leaves it to the hub.
        message: commit message.

    Raises:
        InputError: as `packed`; or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with packed(artefact, repo, index) as (folder, repo_type):
        files = [CommitOperationAdd(name, folder / name) for name in listing(folder)]
        try:
            api = HfApi()
            address = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*commit a data file")  # the index of a model
                api.create_commit(repo, files, commit_message=message or "Push by clipcap-rag", repo_type=repo_type)
        except Exception as error:  # whatever a network or a server makes the library raise
            raise _refusal(repo, error) from error
    return str(address)


def listing(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder` by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _refusal(repo: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return InputError(
            f"the hub does not let you write {repo} ({reason}); log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write there"
        )
    return InputError(f"{repo} could not be pushed ({type(error).__name__}: {reason}); run the same command again")


def _pack_checkpoint(source: Path, folder: Path, repo: str, index: str | Path | None) -> None:
    manifest = read_manifest(source, checkpoint.MANIFEST, checkpoint.KIND, checkpoint.VERSION)
    card = (source / CARD).read_text(encoding="utf-8") if (source / CARD).is_file() else "# Captioner\n"
    names = [name for name in manifest["files"] if is_data(name) and name != CARD]
    _link(source, folder, [name for name in names if index is None or not name.startswith("index/")])
    encoder, language_model = manifest["encoder"], manifest["language_model"]
    before = encoder["clip"], language_model["name"]
    encoder["clip"] = _pack_clip(encoder["clip"], source, folder)
    language_model["name"] = _pack_language_model(manifest, source, folder)
    language_model["config"].pop("_name_or_path", None)
    for old, new in zip(before, (encoder["clip"], language_model["name"]), strict=True):
        card = card.replace(f" {old} (", f" {new} (")
    recorded = manifest["index"]
    if index is not None:
        chosen = resolve_index(index)
        stored = read_json(chosen / index_store.MANIFEST, index_store.KIND)
        check_same_encoder(encoder, "the model", stored.get("encoder", {}), f"the index {chosen}")
        name = artifact_name(chosen)
        _pack_index(chosen, folder / "index" / name, encoder["clip"].replace(_LOCAL, f"{_LOCAL}../../"))
        manifest["index"] = {"path": f"index/{name}", "name": name, "revision": stored["revision"]}
        card += f"\nIts index {name} is included; licence of the captions: {stored['licence'] or 'not stated'}.\n"
    elif recorded and recorded["path"] != STARTER and not _inside(recorded["path"], source):
        say(f"the index {recorded['path']} does not go with the model; push it too with --index {recorded['path']}")
        manifest["index"] = recorded | {"path": recorded["name"]}
    _sign(folder, checkpoint.MANIFEST, manifest)
    use = f'captioner = Captioner.from_pretrained("{PREFIX}{repo}")\nprint(captioner.caption("photo.jpg")[0].caption)'
    code = f"```python\nfrom clipcap_rag import Captioner\n\n{use}\n```"
    _write_card(folder, _MODEL_HEAD, card, code)


def _pack_index(source: Path, folder: Path, clip: str | None = None) -> None:
    """clip: how the index is to name its CLIP model; None packs it with the index."""
    manifest = read_manifest(source, index_store.MANIFEST, index_store.KIND, index_store.VERSION)
    _link(source, folder, [name for name in manifest["files"] if is_data(name) and name != CARD])
    encoder = manifest["encoder"]
    encoder["clip"] = clip or _pack_clip(encoder["clip"], source, folder)
    _sign(folder, index_store.MANIFEST, manifest)


def _pack_index_alone(source: Path, folder: Path, repo: str) -> None:
    _pack_index(source, folder)
    manifest = read_json(folder / index_store.MANIFEST, index_store.KIND)
    card = (
        f"# Caption index\n\n{manifest['rows']:,} captions for clipcap-rag, embedded by {manifest['encoder']['clip']} "
        f"({manifest['encoder']['dim']} wide). Licence of the captions: {manifest['licence'] or 'not stated'}.\n"
    )
    code = f"```bash\nclipcap-rag caption photo.jpg --model MODEL --index {PREFIX}{repo}\n```"
    _write_card(folder, _INDEX_HEAD, card, code)


def _pack_clip(clip: str, source: Path, folder: Path) -> str:
    """Puts a CLIP model that lies outside of `source` into `folder`; how it is to be named from there."""
    if not clip.startswith(_LOCAL) or _inside(clip.removeprefix(_LOCAL), source):
        return clip
    home = Path(parse_clip(clip, source)[0].removeprefix(_LOCAL))
    _link_weights(home, folder / "clip", [path.name for path in home.iterdir() if path.is_file()])
    return f"{_LOCAL}clip"


def _pack_language_model(manifest: dict[str, Any], source: Path, folder: Path) -> str:
    """The same for a language model, which is only needed where its weights are not in the checkpoint."""
    name = manifest["language_model"]["name"]
    if ModelConfig.from_json(manifest["model"]).tunes_language_model:
        return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name
    if _inside(name, source):
        return name
    if not Path(name).is_dir():
        if is_name(name):
            return name
        raise InputError(f"the model needs the language model {name}, which is gone; put it back")
    names = [path.name for path in Path(name).iterdir() if path.is_file()]
    wanted = [file for file in names if any(fnmatch.fnmatchcase(file, pattern) for pattern in LANGUAGE_MODEL_FILES)]
    _link_weights(Path(name), folder / "language_model", wanted)
    return "language_model"


def _inside(path: str, source: Path) -> bool:
    return not Path(path).is_absolute() and (source / path).is_dir()


def _link_weights(source: Path, folder: Path, names: list[str]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{source} has no weights in a safetensors file, the only kind that is pushed; convert them")
    _link(source, folder, [name for name in names if is_data(name) and name != CARD])


def _link(source: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((source / name).resolve())


def _sign(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Writes the manifest; the card comes later, because people edit cards on the hub."""
    fields = {key: value for key, value in manifest.items() if key not in ("kind", "format_version", "files")}
    write_manifest(folder, name, manifest["kind"], manifest["format_version"], fields)


def _write_card(folder: Path, head: str, card: str, code: str) -> None:
    """Adds what the hub reads and how to use it; a card that has a head of its own stays as it is."""
    text = card if card.startswith("---\n") else f"{head}{card.rstrip()}\n\n## Use\n\n{code}\n"
    (folder / CARD).write_text(text, encoding="utf-8")
