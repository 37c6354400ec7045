"""From the string that names a CLIP model to the model; the only importer of open_clip."""

import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clipcap_rag import hub
from clipcap_rag.errors import InputError
from clipcap_rag.image_loader import Preprocess
from clipcap_rag.shipped import STARTER, mending, starter_checkpoint, starter_clip

# open_clip is imported where it is used: that takes seconds, and comparing two records needs none of it.

_LOCAL, _HUB = "local-dir:", hub.PREFIX
_CONFIG, _WEIGHTS = "open_clip_config.json", ("*.safetensors", "*.bin", "*.pth")


def parse_clip(clip: str, base: Path | None = None) -> tuple[str, str | None]:
    """Splits NAME, NAME:TAG, local-dir:PATH, the path of a folder or hf-hub:ORG/NAME into what open_clip calls them.

    `starter`, the model that comes with the package, stays what it is.

    Weights that were trained with QuickGELU get the variant of the architecture that computes it (`ViT-B-32:openai` is
    `ViT-B-32-quickgelu:openai`): open_clip itself only warns and gives wrong embeddings. NAME alone takes the openai
    tag if there is one, else the only tag. A folder that is called like a model is reached as local-dir:PATH.

    Args:
        clip: the string.
        base: the folder that a relative PATH is looked up in first, then the current one.

    Returns:
        The name, with local-dir:PATH absolute, and the tag, None for folders and the hub.

    Raises:
        InputError: the string names no model or no weights; the message lists what there is.
    """
    if clip == STARTER:
        return STARTER, None
    if clip.startswith(_LOCAL):
        return _LOCAL + str(_model_folder(clip.removeprefix(_LOCAL), base)), None
    if clip.startswith(_HUB):
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", clip.removeprefix(_HUB)):
            raise InputError(f"{clip!r} names no model of the hub; write hf-hub:ORG/NAME")
        return clip, None
    import open_clip

    name, colon, tag = clip.partition(":")
    models = open_clip.list_models()
    spelled = re.sub(r"@(\d+)(px)?$", r"-\1", name.replace("/", "-"))  # OpenAI writes ViT-B/32 and ViT-L/14@336px
    if spelled in models:
        return _with_quick_gelu(spelled, _tag(spelled, tag if colon else None))
    if clip and _path(clip, base).is_dir():
        return _LOCAL + str(_model_folder(clip, base)), None
    lower = {model.lower(): model for model in models}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=4)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise InputError(
        f"{clip!r} is neither a model of open_clip nor a folder; {hint}Write starter, NAME, NAME:TAG, "
        "local-dir:PATH or hf-hub:ORG/NAME"
    )


def stored_clip(clip: str, folder: Path) -> str:
    """The string to store in `folder`: a model folder inside it is named relative to it, so that both move together."""
    if not clip.startswith(_LOCAL):
        return clip
    path, home = Path(clip.removeprefix(_LOCAL)).resolve(), folder.resolve()
    return _LOCAL + path.relative_to(home).as_posix() if path.is_relative_to(home) else clip


def _tag(name: str, tag: str | None) -> str:
    """The tag as open_clip spells it, or the one that is meant when none is given."""
    from open_clip import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    if not tags:
        raise InputError(
            f"open_clip has no weights for {name}; choose another model or give a folder as local-dir:PATH"
        )
    if tag is None and ("openai" in tags or len(tags) == 1):
        return "openai" if "openai" in tags else tags[0]
    spelled = (tag or "").lower().replace("-", "_")
    if spelled in tags:
        return spelled
    choice = ", ".join(f"{name}:{known}" for known in tags)
    problem = f"{name} has several sets of weights" if tag is None else f"{name} has no weights called {tag!r}"
    raise InputError(f"{problem}; choose one of {choice}")


def _with_quick_gelu(name: str, tag: str) -> tuple[str, str]:
    from open_clip import get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model

    variant = f"{name}-quickgelu"
    wanted = get_pretrained_cfg(name, tag).get("quick_gelu") and not get_model_config(name).get("quick_gelu")
    return (variant, tag) if wanted and tag in list_pretrained_tags_by_model(variant) else (name, tag)


def _path(path: str, base: Path | None) -> Path:
    wanted = Path(path).expanduser()
    beside = base / wanted if base is not None else wanted
    return Path(os.path.abspath(beside if beside.exists() else wanted))


def _model_folder(path: str, base: Path | None) -> Path:
    """The absolute path of a folder that has the files of a model."""
    folder = _path(path, base)
    if not path or not folder.is_dir():
        raise InputError(f"there is no CLIP model folder {folder}; put it back or name another one with --clip")
    if not (folder / _CONFIG).is_file():
        raise InputError(f"{folder} is not a CLIP model: {_CONFIG} is missing; copy it there or name another folder")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise InputError(f"{folder} has no weights ({', '.join(_WEIGHTS)}); copy them there or name another folder")
    return folder


def open_model(
    name: str, tag: str | None
) -> tuple[int, torch.nn.Module, Callable[[list[str]], torch.Tensor], Preprocess]:
    """Width, model, tokenizer and preprocessing of what `parse_clip` found; no file of it can run code.

    Raises:
        InputError: it is not on this machine and cannot be fetched, or its files are faulty.
    """
    import open_clip

    if name == STARTER:
        with mending(starter_checkpoint()):
            return open_model(*parse_clip(f"{_LOCAL}{starter_clip()}"))
    _find_on_hub(name, tag)
    try:
        config = open_clip.get_model_config(name)
        _refuse_code(config, name)
        quick_gelu = tag is not None and bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
        with _weights_only(), warnings.catch_warnings():
            # of roberta-ViT-B-32 only the architecture knows that it has QuickGELU, and that is enough
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, tag, force_quick_gelu=quick_gelu, require_pretrained=True
            )
            tokenizer = open_clip.get_tokenizer(name)
        return config["embed_dim"], model, tokenizer, preprocess
    except InputError:
        raise
    except Exception as error:  # whatever a faulty file or a missing network makes open_clip and its parts raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if name.startswith(_LOCAL):
            remedy = "copy the folder again or name another one"
        else:
            remedy = (
                "fetch it once with a network connection, or give a folder with "
                f"{_CONFIG} and weights as local-dir:PATH"
            )
        raise InputError(
            f"the CLIP model {name if tag is None else f'{name}:{tag}'} cannot be loaded ({reason}); {remedy}"
        ) from error


def _find_on_hub(name: str, tag: str | None) -> None:
    """Makes a model that is neither here nor to be had fail at once: open_clip would try for over a minute."""
    import open_clip

    # of the models that have a tag, open_clip notes REPOSITORY/FILE
    repository = name if tag is None else open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rpartition("/")[0]
    if not repository or repository.startswith(_LOCAL):
        return
    try:
        hub.fetch(repository, [_CONFIG])
    except InputError as error:
        shown = name if tag is None else f"{name}:{tag}"
        raise InputError(f"the CLIP model {shown} cannot be loaded because {error}") from error


def random_model(name: str) -> tuple[int, torch.nn.Module, Callable[[list[str]], torch.Tensor], Preprocess]:
    """What `open_model` gives, with random weights: for measuring speed where the real ones cannot be fetched."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return open_clip.get_model_config(name)["embed_dim"], model, open_clip.get_tokenizer(name), preprocess


def _refuse_code(config: dict[str, Any], name: str) -> None:
    """Model files are data: settings that would let a tokenizer or tower run code that came with it are refused."""
    if "trust_remote_code" in json.dumps(config):
        raise InputError(f"{name} wants to run code of its own (trust_remote_code in {_CONFIG}); use another model")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Keeps torch.load from running code, also where open_clip tries a second time without weights_only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
