"""The commands `clipcap-rag evaluate` and `clipcap-rag evaluate compare`: captions scored, and written first."""

from argparse import ArgumentParser, Namespace
from typing import Any

from clipcap_rag.config import EvaluationConfig, GenerationConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import (
    INDEX_HELP,
    MODEL_HELP,
    add_compute,
    add_config,
    add_json,
    flag_name,
    given_fields,
    make_config,
    positive,
)
from clipcap_rag.judging import JudgingConfig
from clipcap_rag.output import DONE, print_result
from clipcap_rag.sources import SourceOptions

_WRITING = ("features", "num_neighbors", "baseline", "training_features", "out", "report", "report_photos")


def evaluate_flags(parser: ArgumentParser) -> None:
    text = "captions to score: COCO results [{image_id, caption}] or JSON Lines as caption --json prints them"
    parser.add_argument("predictions", nargs="?", metavar="PREDICTIONS", help=text)
    text = "caption file of their photos, in any format that index build reads"
    parser.add_argument("references", nargs="?", metavar="REFERENCES", help=text)
    text = f"captioner to score, with --features; or the one that wrote PREDICTIONS; {MODEL_HELP}"
    parser.add_argument("--model", metavar="MODEL", help=text)
    text = "feature set of photos that were not trained on; may be repeated"
    parser.add_argument("--features", action="append", metavar="DIR", help=text)
    text = (
        "index to caption with (default: the model's own), or whose entries PREDICTIONS may have copied; "
        f"may be repeated; {INDEX_HELP}"
    )
    parser.add_argument("--index", action="append", help=text)
    text = "neighbour captions per photo (default: as the model was trained)"
    parser.add_argument("--num-neighbors", type=positive, metavar="N", help=text)
    text = "another checkpoint for the table, captioned without retrieval; may be repeated"
    parser.add_argument("--baseline", action="append", metavar="NAME=MODEL", help=text)
    text = "feature set of photos whose captions an index may hold, for the leak study (default: those in the index)"
    parser.add_argument("--training-features", metavar="DIR", help=text)
    text = "folder for results.json and the predictions; what is there already is not made again"
    parser.add_argument("--out", metavar="DIR", help=text)
    text = "folder for report.html, a page to look at with photos, tables and curves, and report.json"
    parser.add_argument("--report", metavar="DIR", help=text)
    text = "photos on that page: half of them the best captioned, half the worst (default: 200)"
    parser.add_argument("--report-photos", type=positive, metavar="N", help=text)
    _judging_flags(parser)
    add_config(parser, RetrievalConfig, "what is retrieved")
    add_config(parser, EvaluationConfig, "studies of a captioner")
    add_config(parser, GenerationConfig, "writing", omit=("decoding",))
    add_compute(parser)


def _judging_flags(parser: ArgumentParser) -> None:
    add_json(parser, "print the result as JSON instead of a table")
    add_config(parser, JudgingConfig, "judging PREDICTIONS")
    add_config(parser, SourceOptions, "reading REFERENCES")


def evaluate(given: Namespace) -> int:
    """Score captions against references, or a captioner on photos with references.

    With PREDICTIONS and REFERENCES it scores what any captioner wrote. With --model, --features and --out it writes
    captions and scores those: with each index and without, with worse and worse neighbours, by every decoding, with and
    without what an index knows of the photos; --report makes a page to look at. The same command again continues where
    it was killed.
    """
    return _score(given) if given.predictions else _caption(given)


def _score(given: Namespace) -> int:
    if not given.references:
        raise InputError(f"{given.predictions} needs references; give the caption file of its photos after it")
    writing = {name: getattr(given, name) for name in _WRITING}
    for config in (RetrievalConfig, EvaluationConfig, GenerationConfig):
        writing |= given_fields(config, given)
    _refuse(writing, "writing captions")
    judging, options = make_config(JudgingConfig, given), make_config(SourceOptions, given)
    from clipcap_rag.score_table import score_table
    from clipcap_rag.scored_files import score_files

    result = score_files(
        given.predictions,
        given.references,
        options=options,
        judging=judging,
        indexes=given.index or [],
        captioner=given.model,
        device=given.device,
        dtype=given.dtype,
    )
    print_result(result, given.json, score_table)
    return DONE


def _caption(given: Namespace) -> int:
    if not (given.model and given.features and given.out):
        raise InputError("give PREDICTIONS and REFERENCES, or --model, --features and --out")
    judging = given_fields(JudgingConfig, given)
    photos = judging.pop("photos", None)
    _refuse(judging | given_fields(SourceOptions, given), "PREDICTIONS and REFERENCES")
    if not given.report:
        _refuse({"photos": photos, "report_photos": given.report_photos}, "--report")
    config, generation = make_config(EvaluationConfig, given), make_config(GenerationConfig, given)
    from clipcap_rag.baselines import named_checkpoints
    from clipcap_rag.evaluation import evaluate as run_evaluation
    from clipcap_rag.evaluation_table import table
    from clipcap_rag.progress import say
    from clipcap_rag.report import check_report, write_report

    if given.report:
        check_report(given.report, photos)
    result = run_evaluation(
        given.model,
        given.features,
        given.out,
        indexes=given.index or ["default"],
        num_neighbors=given.num_neighbors,
        baselines=named_checkpoints(given.baseline or []),
        training_features=given.training_features,
        generation=generation,
        config=config,
        retrieval=make_config(RetrievalConfig, given),
        device=given.device,
        dtype=given.dtype,
    )
    print_result(result, given.json, table)
    if given.report:
        say(f"wrote {write_report(given.out, given.report, photos, given.report_photos or 200)}")
    return DONE


def _refuse(values: dict[str, Any], purpose: str) -> None:
    """Raises InputError for the first flag that was given although it has no part in what is asked for."""
    for name, value in values.items():
        if value is not None:
            raise InputError(f"{flag_name(name)} is for {purpose}, which this command line does not do; leave it out")


def compare_flags(parser: ArgumentParser) -> None:
    text = "captions as evaluate takes them, or the JSON that it printed about them"
    parser.add_argument("first", metavar="A", help=text)
    parser.add_argument("second", metavar="B", help="likewise, of the same photos")
    text = "caption file of the photos (default: the one that the JSON of A or B names)"
    parser.add_argument("references", nargs="?", metavar="REFERENCES", help=text)
    parser.add_argument("--model", metavar="MODEL", help=f"the captioner of A and B, if it is one; {MODEL_HELP}")
    text = f"index whose entries they may have copied; may be repeated; {INDEX_HELP}"
    parser.add_argument("--index", action="append", help=text)
    _judging_flags(parser)
    add_compute(parser)


def compare(given: Namespace) -> int:
    """Compare two captioners on the same photos: the paired difference A - B of every metric, with its interval."""
    judging = make_config(JudgingConfig, given)
    options = make_config(SourceOptions, given) if given_fields(SourceOptions, given) else None
    from clipcap_rag.score_table import difference_table
    from clipcap_rag.scored_files import compare_files

    result = compare_files(
        given.first,
        given.second,
        given.references,
        options=options,
        judging=judging,
        indexes=given.index or [],
        captioner=given.model,
        device=given.device,
        dtype=given.dtype,
    )
    print_result(result, given.json, difference_table)
    return DONE
