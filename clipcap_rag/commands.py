"""The commands: each takes the parsed flags, calls one library function, prints what came of it."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from clipcap_rag import (
    calibrate_commands,
    caption_commands,
    convert_commands,
    evaluate_commands,
    feature_commands,
    hub_commands,
    index_commands,
    index_edit_commands,
    index_transfer_commands,
    prepare_commands,
    tag_commands,
    training_commands,
)
from clipcap_rag.flags import (
    CLIP_HELP,
    add_captions,
    add_compute,
    add_json,
    add_out,
    make_config,
)
from clipcap_rag.output import DONE, SOME_FAILED, print_json
from clipcap_rag.progress import say
from clipcap_rag.sources import SourceOptions


@dataclass(frozen=True)
class Command:
    """What a command adds to its parser and the function that runs it; that function's docstring is its help."""

    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def _extract_flags(parser: ArgumentParser) -> None:
    add_captions(parser)
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the photos that the captions name")
    parser.add_argument("--clip", required=True, help=CLIP_HELP)
    text = (
        "also store what the image tower sees before its projection, in seven views of each photo: an index that is "
        "given such photos finds those that look alike better; takes seven times as long"
    )
    parser.add_argument("--trunk", action="store_true", help=text)
    add_out(parser)
    add_compute(parser, batch_size=32, workers=2)


def extract(given: Namespace) -> int:
    """Encode a folder of captioned photos once, for training and evaluation."""
    from clipcap_rag.features import extract_features

    features = extract_features(
        given.captions,
        given.images,
        given.clip,
        given.out,
        source_options=make_config(SourceOptions, given),
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        workers=given.workers,
        trunk=given.trunk,
        skip_bad=given.skip_bad,
        overwrite=given.overwrite,
    )
    for error in features.errors:
        say(f"error: {error}")
    captions = sum(map(len, features.captions))
    left_out = f"; {len(features.errors)} photos could not be read and are left out" if features.errors else ""
    print(f"{features.path}: {len(features)} photos, {captions} captions{left_out}")
    return SOME_FAILED if features.errors else DONE


def _bench_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for bench.json and bench.png")
    text = "part of it: encoding, writing, searching, learning or whole; may be repeated (default: all)"
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help=text)
    text = "small sizes, to see that everything runs; the ratios then mean nothing"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_json(parser, "print one JSON object per comparison instead of a table")


def bench(given: Namespace) -> int:
    """Measure speed side by side with the slow way of doing the same, at real sizes with random weights."""
    from clipcap_rag.bench import bench as run_bench
    from clipcap_rag.bench_protocol import line

    results, failures = run_bench(given.out, groups=given.group, quick=given.quick, device=given.device)
    for result in results:
        if given.json:
            print_json(result.to_json())
        else:
            print(line(result))
    for name, reason in failures.items():
        say(f"error: {name}: {reason}")
    return SOME_FAILED if failures else DONE


def _doctor_flags(parser: ArgumentParser) -> None:
    add_json(parser, "print one JSON object")


def doctor(given: Namespace) -> int:
    """Show versions, devices, memory and indexes, and what is wrong with the installation."""
    from clipcap_rag.doctor import examine

    diagnosis = examine()
    print(json.dumps(diagnosis.to_json(), ensure_ascii=False, indent=1) if given.json else diagnosis.table())
    return SOME_FAILED if diagnosis.problems else DONE


COMMANDS = {
    "index build": Command(index_commands.build_flags, index_commands.build),
    "index info": Command(index_commands.info_flags, index_commands.info),
    "index search": Command(index_commands.search_flags, index_commands.search),
    "index add": Command(index_edit_commands.add_flags, index_edit_commands.add),
    "index add-images": Command(index_edit_commands.add_images_flags, index_edit_commands.add_images),
    "index remove": Command(index_edit_commands.remove_flags, index_edit_commands.remove),
    "index update": Command(index_edit_commands.update_flags, index_edit_commands.update),
    "index compact": Command(index_edit_commands.compact_flags, index_edit_commands.compact),
    "index lint": Command(index_edit_commands.lint_flags, index_edit_commands.lint),
    "index verify": Command(index_commands.verify_flags, index_commands.verify),
    "index import": Command(index_transfer_commands.import_flags, index_transfer_commands.import_),
    "index export": Command(index_transfer_commands.export_flags, index_transfer_commands.export),
    "prepare coco": Command(prepare_commands.coco_flags, prepare_commands.coco),
    "prepare flickr": Command(prepare_commands.flickr_flags, prepare_commands.flickr),
    "prepare nocaps": Command(prepare_commands.nocaps_flags, prepare_commands.nocaps),
    "prepare conceptual": Command(prepare_commands.conceptual_flags, prepare_commands.conceptual),
    "extract": Command(_extract_flags, extract),
    "train": Command(training_commands.train_flags, training_commands.train),
    "sweep": Command(training_commands.sweep_flags, training_commands.sweep),
    "caption": Command(caption_commands.caption_flags, caption_commands.caption),
    "tag": Command(tag_commands.tag_flags, tag_commands.tag),
    "calibrate": Command(calibrate_commands.calibrate_flags, calibrate_commands.calibrate),
    "evaluate": Command(evaluate_commands.evaluate_flags, evaluate_commands.evaluate),
    "evaluate compare": Command(evaluate_commands.compare_flags, evaluate_commands.compare),
    "convert features": Command(feature_commands.features_flags, feature_commands.features),
    "convert pickle": Command(feature_commands.pickle_flags, feature_commands.pickle),
    "convert clipcap": Command(convert_commands.clipcap_flags, convert_commands.clipcap),
    "push": Command(hub_commands.push_flags, hub_commands.push),
    "bench": Command(_bench_flags, bench),
    "doctor": Command(_doctor_flags, doctor),
}
