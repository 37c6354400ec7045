"""COCO and Karpathy files: JSON documents that are in memory as a whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcap_rag.errors import InputError
from clipcap_rag.lines import BadLines, open_bytes, parse_json, short

_LARGEST_JSON = 2 * 2**30  # bytes


def read_document(path: Path, format: str, split: str | None, bad: BadLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """The annotations or images of a COCO or Karpathy file: their places and unchecked values.

    Args:
        format: coco, karpathy, or auto for what the file shows.
        split: splits to take from a Karpathy file, with commas between them; None takes all.

    Raises:
        InputError: it is no such file, too large or of another format, or has no such split.
    """
    document = load_document(path)
    if isinstance(document, list):
        document = {"annotations": document}
    lists = {key: document[key] for key in ("images", "annotations")
             if isinstance(document, dict) and isinstance(document.get(key), list)}  # fmt: skip
    if "annotations" in lists:
        kind, entries = "coco", _coco(path, lists["annotations"], lists.get("images", []), bad)
    elif any(isinstance(image, dict) and "sentences" in image for image in lists.get("images", [])):
        kind, entries = "karpathy", _karpathy(path, lists["images"], split, bad)
    else:
        raise InputError(f"{path} has neither COCO annotations nor Karpathy images with sentences; check the file")
    if format not in ("auto", kind):
        raise InputError(f"{path} is a {kind} file; pass --format {kind}")
    if split is not None and kind == "coco":
        raise InputError(f"{path} is a COCO file, which has no splits; leave --split out")
    yield from entries


def load_document(path: Path) -> Any:
    """The JSON of a whole file, gzipped or not.

    Raises:
        InputError: it cannot be read, is too large or is no JSON.
    """
    with open_bytes(path) as stream:
        content = stream.read(_LARGEST_JSON + 1)
    if len(content) > _LARGEST_JSON:
        raise InputError(f"{path} holds more than {_LARGEST_JSON >> 30} GB of JSON; convert it to JSON Lines")
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); if it is JSON Lines pass --format jsonl") from error


def _coco(path: Path, annotations: list, images: list, bad: BadLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """Annotations with the file names and ids of their images and, in nocaps, their domains.

    Where a file lists no images the ids in the annotations are all there is.
    """
    images = [image for image in images if isinstance(image, dict)]
    files = {str(image.get("id")): image.get("file_name") for image in images}
    domains = {str(image.get("id")): image["domain"] for image in images if image.get("domain")}
    for number, annotation in enumerate(annotations):
        place = f"{path}:annotations[{number}]"
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(annotation, dict):
            bad.report(f"{place}: not an object")
        elif files and str(image_id) not in files:
            bad.report(f"{place}: image_id {short(image_id)} is not among the images")
        else:
            image = files.get(str(image_id))
            meta = {"coco_id": str(image_id)} if image else {}
            meta |= {"domain": domains[str(image_id)]} if str(image_id) in domains else {}
            values = {"captions": annotation.get("caption"), "image": image, "image_id": None if image else image_id}
            yield place, values | {"meta": meta}


def _karpathy(path: Path, images: list, split: str | None, bad: BadLines) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images of the splits, each with its sentences, under `filepath/filename`."""
    present = {image["split"] for image in images if isinstance(image, dict) and isinstance(image.get("split"), str)}
    wanted = present if split is None else {name.strip() for name in split.split(",")}
    if wanted - present:
        names = ", ".join(sorted(present)) or "none"
        raise InputError(f"{path} has no split {', '.join(sorted(wanted - present))!r}; its splits are: {names}")
    for number, image in enumerate(images):
        place = f"{path}:images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
            bad.report(f"{place}: no object with a list of sentences")
        elif split is not None and not isinstance(image.get("split"), str):
            bad.report(f"{place}: split is {short(image.get('split'))}, not a string")
        elif split is None or image["split"] in wanted:
            folder, file = image.get("filepath"), image.get("filename")
            file = f"{folder}/{file}" if folder and isinstance(file, str) else file
            meta = {"split": image["split"]} if "split" in image else {}
            meta |= {"coco_id": image["cocoid"]} if "cocoid" in image else {}
            values = {"captions": [_sentence(sentence) for sentence in image["sentences"]], "image": file}
            yield place, values | {"meta": meta}


def _sentence(sentence: Any) -> Any:
    if not isinstance(sentence, dict):
        return sentence
    tokens = sentence.get("tokens")
    return sentence.get("raw") or (" ".join(map(str, tokens)) if isinstance(tokens, list) else None)
