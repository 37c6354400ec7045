"""Published caption files with splits into one caption file, and one feature set where wanted, per split."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_rag.artifact import file_record, refuse_existing, resumable_directory, write_bytes, write_manifest
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet, extract_features
from clipcap_rag.images import IMAGE_EXTENSIONS, photo_finder
from clipcap_rag.lines import BadLines, read_lines
from clipcap_rag.sources import CaptionRecord, SourceOptions, read_captions

KIND, VERSION = "prepared splits", 1
_MANIFEST = "splits.json"
_TRAINED_ON = {"restval": "train"}  # Karpathy's rest of COCO's validation photos, which everyone trains on


@dataclass(frozen=True)
class Split:
    """The photos of a split: how many, their captions, the hash of their file, which are missing or unreadable."""

    photos: int
    captions: int
    hash: str
    missing: list[str]
    unreadable: list[str]


@dataclass(frozen=True)
class PreparedSplits:
    """The splits by name, and how many photos with captions are in none of them."""

    path: Path
    splits: dict[str, Split]
    unlisted: int
    bad_lines: list[str]
    bad_line_count: int

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["path"]
        return values


def prepare_splits(
    captions: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    clip: str | None = None,
    lists: dict[str, Path] | None = None,
    whole: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 32,
    workers: int = 2,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> PreparedSplits:
    """Writes `out/SPLIT.jsonl`, a line per photo with image, image_id, captions and meta, and `out/features-SPLIT`.

    The split of a photo is what a Karpathy file says, with restval counted as train, or the list that names it. Photos
    that are not below `images` are left out and named in the result. A killed run continues where it was.

    Args:
        captions: a Karpathy file (Karpathy and Fei-Fei 2015), a token file of Flickr8k or Flickr30k, or a COCO file
            such as that of nocaps, whose domains are kept in meta.
        images: the folder of the photos; without it nothing is looked for.
        clip: CLIP model string; without it no features are made.
        lists: files with a photo name a line, for captions without splits.
        whole: the split of all photos, for captions without splits.
        skip_bad: count and list bad captions instead of stopping at the first.

    Raises:
        InputError: bad captions, a photo in no or in two splits' lists, no photo of a split is there, or `out` exists.
    """
    captions, out = Path(captions), Path(out)
    folder = None if images is None else Path(images)
    if folder is None and clip is not None:
        raise InputError(f"the CLIP model {clip} has nothing to encode; give --images the folder of the photos")
    if folder is not None and not folder.is_dir():
        raise InputError(f"the image folder {folder} does not exist; give --images the folder of the photos")
    if captions.is_dir():
        raise InputError(f"{captions} is a folder; give the caption file in it")
    refuse_existing(out, overwrite)
    bad, named = BadLines(skip_bad), _read_lists(lists or {})
    photos: dict[str, dict[str, list[CaptionRecord]]] = {split: {} for split in lists or {}}
    unlisted = set()
    for record in read_captions([captions], SourceOptions(), bad):
        split = _split_of(record, captions, named, whole)
        if split is None:
            unlisted.add(record.image_id)
            continue
        records = photos.setdefault(split, {}).setdefault(record.image_id, [])
        records.append(record)
        if record.image != records[0].image:
            raise InputError(f"{records[0].image} and {record.image} in {captions} have one name; rename one of them")
    job = {"captions": file_record(captions), "images": str(folder), "clip": clip, "dtype": dtype, "lists": named}
    with resumable_directory(out, job, overwrite) as staging:
        splits = {}
        for name, entries in photos.items():
            present, missing = _find(list(entries.values()), folder)
            if not present:
                such = f"below {folder}, such as {missing[0]}" if missing else f"among those of {captions}"
                raise InputError(f"no photo of the split {name} is {such}; check --images and the lists")
            file = staging / f"{name}.jsonl"
            write_bytes(file, "".join(map(_line, present)).encode())
            unreadable = []
            if clip is not None:
                compute = {"device": device, "dtype": dtype, "batch_size": batch_size, "workers": workers}
                unreadable = _extract(file, folder, clip, staging / f"features-{name}", **compute)
            count = sum(map(len, present))
            splits[name] = Split(len(present), count, file_record(file)["hash"], missing, unreadable)
        made = PreparedSplits(out, splits, len(unlisted), bad.listed, bad.count)
        write_manifest(staging, _MANIFEST, KIND, VERSION, made.to_json())
    return made


def _read_lists(lists: dict[str, Path]) -> dict[str, str]:
    """The split of each listed photo, by the stem of its name."""
    splits: dict[str, str] = {}
    for split, path in lists.items():
        for number, line in read_lines(Path(path), BadLines()):
            stem = _stem(line.strip())
            if splits.setdefault(stem, split) != split:
                raise InputError(f"{path}:{number}: {line.strip()} is in {splits[stem]}, too; take it out of one list")
    return splits


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in IMAGE_EXTENSIONS else path.name


def _split_of(record: CaptionRecord, path: Path, named: dict[str, str], whole: str | None) -> str | None:
    """The split of a caption's photo; None where there are lists and none holds it."""
    said = record.meta.get("split")
    if record.image_id is None:
        raise InputError(f"{path} has captions without photos, such as {record.caption!r}; give a file that names them")
    if said and (named or whole):
        raise InputError(f"{path} says the splits of its photos itself; leave the lists out")
    if said:
        return _TRAINED_ON.get(said, said)
    if not named and not whole:
        raise InputError(f"{path} does not say the splits of its photos; give a Karpathy file or lists of the splits")
    return whole or named.get(_stem(record.image or record.image_id))


def _find(photos: list[list[CaptionRecord]], folder: Path | None) -> tuple[list[list[CaptionRecord]], list[str]]:
    """The captions of the photos that are there, and the names of the others; without a folder all count as there."""
    if folder is None:
        return photos, []
    find, present, missing = photo_finder(folder), [], []
    for records in photos:
        name, key = records[0].image, records[0].image_id
        if find(name, PurePosixPath(name).stem).is_file() if name else find(key, key).is_file():
            present.append(records)
        else:
            missing.append(name or key)
    return present, missing


def _line(records: list[CaptionRecord]) -> str:
    """The JSON line of a photo."""
    first = records[0]
    row = {"image": first.image, "image_id": first.image_id, "captions": [record.caption for record in records]}
    meta = {key: value for key, value in first.meta.items() if key != "split"}
    return json.dumps(row | ({"meta": meta} if meta else {}), ensure_ascii=False) + "\n"


def _extract(captions: Path, images: Path, clip: str, out: Path, **compute: Any) -> list[str]:
    """Makes a feature set, unless a killed run has; returns what could not be read."""
    features = FeatureSet.open(out) if out.exists() else extract_features([captions], images, clip, out, **compute)
    return features.errors
