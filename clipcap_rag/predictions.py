"""What captioners wrote, the photos with references, and which caption belongs to which photo."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_rag.errors import InputError
from clipcap_rag.images import IMAGE_EXTENSIONS
from clipcap_rag.json_documents import load_document
from clipcap_rag.lines import BadLines, open_bytes, parse_json, read_lines, short
from clipcap_rag.sources import SourceOptions, read_captions

_NAMED = 3  # photos that a sentence names before it counts the others


@dataclass(frozen=True)
class Prediction:
    """A caption, the names its photo may be known by, and the captions that were retrieved, None where nobody says."""

    place: str
    keys: tuple[str, ...]
    caption: str
    neighbors: list[str] | None = None


@dataclass
class Photo:
    """A photo with references.

    Attributes:
        image_id: what captions are joined on: the id that its file gives, else the stem of its name.
        coco_id: its number in a COCO file, another name for it.
        domain: in nocaps in-domain, near-domain or out-domain.
    """

    image_id: str
    image: str | None = None
    coco_id: str | None = None
    domain: str | None = None
    captions: list[str] = field(default_factory=list)

    @property
    def keys(self) -> tuple[str, ...]:
        named = (self.image_id, self.image and PurePosixPath(self.image).stem, self.coco_id)
        return tuple(dict.fromkeys(key for key in named if key))


@dataclass(frozen=True)
class Joined:
    """The photos that have a caption and references, with both; the names of those that lack one of them."""

    photos: list[Photo]
    predictions: list[Prediction]
    unpredicted: list[str]
    unreferenced: list[str]

    @property
    def references(self) -> list[list[str]]:
        return [photo.captions for photo in self.photos]

    @property
    def captions(self) -> list[str]:
        return [prediction.caption for prediction in self.predictions]

    @property
    def neighbors(self) -> list[list[str]] | None:
        """The retrieved captions of each photo, None unless all predictions name theirs."""
        found = [prediction.neighbors for prediction in self.predictions]
        return None if any(near is None for near in found) else found

    @property
    def domains(self) -> list[str | None]:
        return [photo.domain for photo in self.photos]


def read_references(path: Path, options: SourceOptions) -> list[Photo]:
    """The photos of a caption file in any format of `sources`, in order of first appearance.

    Raises:
        InputError: it cannot be read, a line is bad, captions name no photo, or two photos share a name.
    """
    photos: dict[str, Photo] = {}
    for record in read_captions([path], options, BadLines()):
        if record.image_id is None:
            raise InputError(f"{path} has captions without photos, such as {short(record.caption)}; name their photos")
        fresh = Photo(record.image_id, record.image, record.meta.get("coco_id"), record.meta.get("domain"))
        photo = photos.setdefault(record.image_id, fresh)
        if photo.image != record.image:
            raise InputError(f"{photo.image} and {record.image} in {path} have one name; give each an image_id")
        photo.captions.append(record.caption)
    return list(photos.values())


def read_predictions(path: Path) -> list[Prediction]:
    """Captions from a COCO result file, `[{"image_id", "caption"}]`, or from JSON Lines of such or of our objects.

    Raises:
        InputError: it cannot be read, or an entry has no photo, no caption or what is none.
    """
    found = [_prediction(place, entry) for place, entry in _entries(path)]
    if not found:
        raise InputError(f"{path} holds no caption; give what a captioner wrote")
    return found


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise InputError(f"there is no file of predictions {path}; check the path")
    with open_bytes(path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[":
        for number, entry in enumerate(load_document(path)):
            yield f"{path}[{number}]", entry
        return
    for number, line in read_lines(path, BadLines()):
        try:
            yield f"{path}:{number}", parse_json(line)
        except ValueError as error:
            wanted = 'a list of {"image_id", "caption"} or JSON Lines'
            raise InputError(f"{path}:{number}: not JSON ({error}); give {wanted}") from error


def _prediction(place: str, entry: Any) -> Prediction:
    if not isinstance(entry, dict):
        raise InputError(f"{place}: {short(entry)} is no object; give image_id and caption")
    image_id, image, caption = (entry.get(key) for key in ("image_id", "image", "caption"))
    if type(image_id) not in (int, str, type(None)) or not isinstance(image, str | None):
        raise InputError(f"{place}: image_id {short(image_id)} or image {short(image)} is no name of a photo; mend it")
    names = ["" if image_id is None else str(image_id), *(_stem(name) for name in (image_id, image) if name)]
    keys = tuple(dict.fromkeys(name for name in names if name))
    if not keys:
        raise InputError(f"{place}: neither image_id nor image names the photo; add one of them")
    if entry.get("error") is not None:
        raise InputError(f"{place}: the photo has the error {short(entry['error'])} and no caption; caption it again")
    if "caption" not in entry or not isinstance(caption, str | None):
        raise InputError(f"{place}: caption is {short(caption)}, not a text; mend it")
    near = entry.get("neighbors")
    if near is not None:
        texts = (
            [item.get("caption") if isinstance(item, dict) else None for item in near]
            if isinstance(near, list)
            else None
        )
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: neighbors is no list of objects with a caption; mend it or leave it out")
        near = texts
    return Prediction(place, keys, _text(place, caption or ""), near)


def _stem(name: str | int) -> str:
    path = PurePosixPath(str(name))
    return path.stem if path.suffix.lower() in IMAGE_EXTENSIONS else path.name


def _text(place: str, caption: str) -> str:
    """A caption with single spaces; what is no text cannot go to the tokenizer."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: caption {short(caption)} holds a character that is no text; mend it") from error
    return " ".join(caption.split())


def join(predictions: Sequence[Prediction], photos: Sequence[Photo], allow_missing: bool = False) -> Joined:
    """Puts captions and photos together, in the order of the photos, by image_id, stem of the file name or COCO id.

    Args:
        allow_missing: leave out photos without caption and captions without references, and name them in the result.

    Raises:
        InputError: some are missing, no photo has both, or a photo has two captions.
    """
    ids = {photo.image_id: row for row, photo in enumerate(photos)}
    others: dict[str, set[int]] = {}
    for row, photo in enumerate(photos):
        for key in photo.keys:
            others.setdefault(key, set()).add(row)
    chosen: dict[int, Prediction] = {}
    unreferenced = []
    for prediction in predictions:
        row = _row_of(prediction, ids, others)
        if row is None:
            unreferenced.append(prediction.keys[0])
        elif row in chosen:
            places = f"{chosen[row].place} and {prediction.place}"
            raise InputError(f"{places} both caption the photo {photos[row].image_id}; leave one of them out")
        else:
            chosen[row] = prediction
    unpredicted = [photo.image_id for row, photo in enumerate(photos) if row not in chosen]
    for names, lack in ((unpredicted, "caption"), (unreferenced, "references")):
        if names and not allow_missing:
            raise InputError(
                f"{len(names)} photos have no {lack}: {listed(names)}; "
                "add them, name the --split, or pass --allow-missing to score the others"
            )
    if not chosen:
        raise InputError("no photo has both a caption and references; join them on image_id or the file's stem")
    rows = sorted(chosen)
    return Joined([photos[row] for row in rows], [chosen[row] for row in rows], unpredicted, unreferenced)


def _row_of(prediction: Prediction, ids: dict[str, int], others: dict[str, set[int]]) -> int | None:
    """The photo of a prediction: the one with that image_id, else the only one with that other name."""
    for key in prediction.keys:
        rows = {ids[key]} if key in ids else others.get(key, set())
        if len(rows) > 1:
            raise InputError(f"{prediction.place}: {key} is the name of {len(rows)} photos; give their image_id")
        if rows:
            return next(iter(rows))
    return None


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
