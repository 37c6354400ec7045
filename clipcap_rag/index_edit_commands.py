"""The commands of `clipcap-rag index` that change an index, and the one that looks for what should be changed."""

import math
from argparse import ArgumentParser, Namespace

from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, add_captions, add_compute, add_json, make_config
from clipcap_rag.output import DONE, print_json
from clipcap_rag.sources import CaptionRecord, SourceOptions

_CLIP_HELP = "CLIP model, where the one named in the index has moved"


def _add_wait(parser: ArgumentParser) -> None:
    text = "longest time to wait for another command that writes the index; 0 does not wait (default: no limit)"
    parser.add_argument("--wait", type=float, default=math.inf, metavar="SECONDS", help=text)


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    text = "a caption to add; may be repeated"
    parser.add_argument("--caption", action="append", default=[], metavar="TEXT", help=text)
    parser.add_argument("--image-id", metavar="ID", help="the image that the --caption belongs to")
    parser.add_argument("--source", metavar="NAME", help="where the --caption comes from")
    text = "what else is to be kept with the --caption; may be repeated"
    parser.add_argument("--meta", action="append", default=[], metavar="KEY=VALUE", help=text)
    add_captions(parser, required=False)
    _add_wait(parser)
    parser.add_argument("--clip", help=_CLIP_HELP)
    add_compute(parser, batch_size=256)


def add(given: Namespace) -> int:
    """Add captions to an index; files that were being added when a run was killed continue when it is run again."""
    if bool(given.caption) == bool(given.captions):
        raise InputError("give either --caption or --captions")
    if given.captions and (given.image_id or given.source or given.meta):
        raise InputError("--image-id, --source and --meta go with --caption; files say these themselves")
    meta = dict(_key_and_value(text) for text in given.meta)
    records = [CaptionRecord(text, given.image_id, None, given.source, meta) for text in given.caption]
    from clipcap_rag.index_editor import add_caption_files, add_captions, index_encoder

    encoder = index_encoder(given.index, given.clip, given.device, given.dtype)
    if records:
        edit = add_captions(given.index, records, encoder, wait=given.wait)
    else:
        edit = add_caption_files(
            given.index,
            given.captions,
            encoder,
            source_options=make_config(SourceOptions, given),
            batch_size=given.batch_size,
            skip_bad=given.skip_bad,
            wait=given.wait,
        )
    first, last = edit.caption_ids[0], edit.caption_ids[-1]
    ids = f"id {first}" if first == last else f"ids {first} to {last}"
    print(f"{edit.path}: {_captions(len(edit.caption_ids))} added, {ids}; revision {edit.revision}")
    return DONE


def remove_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    text = "captions by their id, as index search --json shows it"
    parser.add_argument("--caption-id", nargs="+", default=[], metavar="ID", help=text)
    parser.add_argument("--text", action="append", default=[], help="captions of exactly this text; may be repeated")
    text = "captions whose image_id, source, caption_id, caption or meta.KEY is VALUE; all conditions have to fit"
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE", help=text)
    _add_wait(parser)


def remove(given: Namespace) -> int:
    """Remove captions from an index; nothing else is written again until index compact."""
    from clipcap_rag.index_editor import remove_captions
    from clipcap_rag.index_filter import parse_where

    conditions = [f"caption_id={value}" for value in given.caption_id] + [f"caption={text}" for text in given.text]
    edit = remove_captions(given.index, parse_where(conditions + given.where), wait=given.wait)
    print(f"{edit.path}: {_captions(len(edit.caption_ids))} removed; revision {edit.revision}")
    return DONE


def update_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    parser.add_argument("--caption-id", required=True, metavar="ID", help="the caption that is to be changed")
    parser.add_argument("--caption", required=True, metavar="TEXT", help="its new words")
    _add_wait(parser)
    parser.add_argument("--clip", help=_CLIP_HELP)
    add_compute(parser)


def update(given: Namespace) -> int:
    """Give a caption of an index other words; its id and what is kept with it stay."""
    from clipcap_rag.index_editor import index_encoder, update_caption

    encoder = index_encoder(given.index, given.clip, given.device, given.dtype)
    edit = update_caption(given.index, given.caption_id, given.caption, encoder, wait=given.wait)
    print(f"{edit.path}: caption {given.caption_id} updated; revision {edit.revision}")
    return DONE


def compact_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    text = "how it is searched from now on: auto, Flat, or a FAISS factory key (default: as its largest segment is)"
    parser.add_argument("--index-key", metavar="TEXT", help=text)
    _add_wait(parser)


def compact(given: Namespace) -> int:
    """Make an index one segment and free the space of removed captions."""
    from clipcap_rag.index_editor import compact_index
    from clipcap_rag.index_store import read_index_manifest

    edit = compact_index(given.index, given.index_key, wait=given.wait)
    print(f"{edit.path}: {_captions(read_index_manifest(edit.path)['rows'])}, one segment; revision {edit.revision}")
    return DONE


def add_images_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    text = "feature set of the photos that the captions describe, found by image_id"
    parser.add_argument("--features", required=True, metavar="DIR", help=text)
    _add_wait(parser)


def add_images(given: Namespace) -> int:
    """Store the embeddings of the photos that captions describe, for --route auto, image and both."""
    from clipcap_rag.index_images import add_images as add

    edit = add(given.index, given.features, wait=given.wait)
    print(f"{edit.path}: {edit.photos} photos of {_captions(edit.captions)}; revision {edit.revision}")
    return DONE


def lint_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="photos that it should have words for")
    parser.add_argument("--features", metavar="DIR", help="a feature set of such photos instead")
    text = "leave out what needs the CLIP model: captions that are too long for it, and --images"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--clip", help=_CLIP_HELP)
    add_json(parser, "print one JSON object")
    add_compute(parser)


def lint(given: Namespace) -> int:
    """Look for duplicates, cut captions, outliers and, with photos, for what the index has no words for."""
    if given.images and (given.features or given.quick):
        raise InputError("--images goes neither with --features nor with --quick")
    from clipcap_rag.index_lint import lint_index

    report = lint_index(
        given.index,
        images=given.images,
        features=given.features,
        quick=given.quick,
        clip=given.clip,
        device=given.device,
        dtype=given.dtype,
    )
    if given.json:
        print_json(report.to_json())
    else:
        print(report.table())
    return DONE


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"--meta {text!r} cannot be read; write KEY=VALUE")
    return key, value


def _captions(count: int) -> str:
    return f"{count} caption{'' if count == 1 else 's'}"
