"""The commands of `clipcap-rag prepare`: published data sets into captions, photos and feature sets to work with."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from clipcap_rag.config import DownloadConfig
from clipcap_rag.flags import CLIP_HELP, add_compute, add_config, add_json, add_out, make_config
from clipcap_rag.output import DONE, SOME_FAILED, print_json
from clipcap_rag.progress import say
from clipcap_rag.sources import SourceOptions

if TYPE_CHECKING:
    from clipcap_rag.splits import PreparedSplits

_SHOWN = 20  # names of missing photos on the screen; splits.json has all
_SKIP_BAD = "count and list bad captions instead of stopping at the first"


def _add_photos(parser: ArgumentParser) -> None:
    text = "folder of the photos, or of their folders; without it photos are not looked for"
    parser.add_argument("--images", metavar="DIR", help=text)
    text = f"also make a feature set per split; {CLIP_HELP}"
    parser.add_argument("--clip", help=text)
    add_out(parser)
    parser.add_argument("--skip-bad", action="store_true", help=_SKIP_BAD)
    add_json(parser, "print one JSON object")
    add_compute(parser, batch_size=32, workers=2)


def coco_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--karpathy", required=True, metavar="FILE", help="dataset_coco.json of the Karpathy splits")
    _add_photos(parser)


def coco(given: Namespace) -> int:
    """Prepare COCO: captions of the Karpathy splits, restval counted as train, and features of their photos."""
    return _prepare(given, given.karpathy)


def flickr_flags(parser: ArgumentParser) -> None:
    text = "token file such as Flickr8k.token.txt, or a Karpathy file such as dataset_flickr30k.json"
    parser.add_argument("--captions", required=True, metavar="FILE", help=text)
    for split in ("train", "val", "test"):
        text = f"list of the photos of {split}, for a token file"
        parser.add_argument(f"--{split}", metavar="FILE", help=text)
    _add_photos(parser)


def flickr(given: Namespace) -> int:
    """Prepare Flickr8k or Flickr30k: captions of the splits, and features of their photos."""
    lists = {name: getattr(given, name) for name in ("train", "val", "test") if getattr(given, name)}
    return _prepare(given, given.captions, lists={name: Path(path) for name, path in lists.items()})


def nocaps_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--captions", required=True, metavar="FILE", help="the JSON file of nocaps with its captions")
    _add_photos(parser)


def nocaps(given: Namespace) -> int:
    """Prepare the validation photos of nocaps: captions with in-domain, near-domain or out-domain in their meta."""
    return _prepare(given, given.captions, whole="val")


def _prepare(given: Namespace, captions: str, **splits: object) -> int:
    from clipcap_rag.splits import prepare_splits

    made = prepare_splits(
        captions,
        given.out,
        images=given.images,
        clip=given.clip,
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        workers=given.workers,
        skip_bad=given.skip_bad,
        overwrite=given.overwrite,
        **splits,
    )
    if given.json:
        print_json(made.to_json())
    else:
        _print_splits(made)
    failed = made.bad_line_count + sum(len(split.missing) + len(split.unreadable) for split in made.splits.values())
    return SOME_FAILED if failed else DONE


def _print_splits(made: "PreparedSplits") -> None:
    for name, split in made.splits.items():
        print(f"{made.path / name}.jsonl: {split.photos} photos, {split.captions} captions, {split.hash}")
        for photo in split.missing[:_SHOWN]:
            say(f"missing: {photo}")
        if split.missing:
            say(f"{len(split.missing)} photos of {name} are missing and left out")
        for error in split.unreadable:
            say(f"error: {error}")
    if made.unlisted:
        say(f"{made.unlisted} photos with captions are in none of the lists and left out")
    if made.bad_line_count:
        say(f"{made.bad_line_count} bad captions are left out, the first are: {'; '.join(made.bad_lines)}")


def conceptual_flags(parser: ArgumentParser) -> None:
    text = "list of URLs with captions, tar or Parquet file, folder that img2dataset made, or hf:ORG/NAME[:SPLIT]"
    parser.add_argument("source", metavar="SOURCE", help=text)
    text = "word that begins the names of the photos; give each source its own (default: train)"
    parser.add_argument("--split", dest="first_word", default="train", metavar="WORD", help=text)
    add_out(parser)
    text = "take up a finished folder again, or an unfinished one, and try what failed once more"
    parser.add_argument("--retry-failed", action="store_true", help=text)
    parser.add_argument("--skip-bad", action="store_true", help=_SKIP_BAD)
    add_json(parser, "print one JSON object instead of a table")
    add_config(parser, DownloadConfig, "fetching")
    add_config(parser, SourceOptions, "reading captions", omit=("format", "split"))


def conceptual(given: Namespace) -> int:
    """Fetch the photos of Conceptual Captions, or unpack captioned photos of other sources, into a folder.

    The list of URLs is the published TSV file, a caption and a URL a line. A killed run continues where it was.
    """
    from clipcap_rag.gather import gather_photos

    made = gather_photos(
        given.source,
        given.out,
        given.first_word,
        config=make_config(DownloadConfig, given),
        source_options=make_config(SourceOptions, given),
        skip_bad=given.skip_bad,
        retry_failed=given.retry_failed,
        overwrite=given.overwrite,
    )
    if given.json:
        print_json(made.to_json())
    else:
        for outcome, count in made.outcomes.items():
            print(f"{count:>10}  {outcome}")
        if made.bad_line_count:
            print(f"{made.bad_line_count:>10}  bad lines, the first: {made.bad_lines[0]}")
        print(f"{made.path}: {made.photos} photos, {made.captions} captions")
    return SOME_FAILED if made.failed else DONE
