"""The command `clipcap-rag calibrate`."""

from argparse import ArgumentParser, Namespace

from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, MODEL_HELP, add_compute, add_config, add_json, add_out, count, make_config
from clipcap_rag.output import DONE, print_json


def calibrate_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    text = "feature set of photos that were not trained on, some hundreds or more"
    parser.add_argument("--features", required=True, metavar="DIR", help=text)
    parser.add_argument("--index", help=f"index to caption with (default: the model's own); {INDEX_HELP}")
    parser.add_argument("--no-retrieval", action="store_true", help="calibrate captions without neighbours")
    text = "neighbour captions per photo (default: as the model was trained)"
    parser.add_argument("--num-neighbors", type=count, metavar="N", help=text)
    text = "CIDEr from which a caption counts as good, such as 0.5 for 50 points (default: the median of the captions)"
    parser.add_argument("--good", type=float, metavar="X", help=text)
    text = "share of the photos whose captions stay sure; it sets the level below which one is not (default: 0.8)"
    parser.add_argument("--keep", type=float, default=0.8, metavar="X", help=text)
    add_out(parser)
    add_json(parser, "print what was measured as JSON instead of a table")
    add_config(parser, GenerationConfig, "writing")
    add_compute(parser)


def calibrate(given: Namespace) -> int:
    """Learn from photos with reference captions when a captioner may be sure: caption --abstain reads it."""
    if given.no_retrieval and (given.index or given.num_neighbors):
        raise InputError("--no-retrieval contradicts --index and --num-neighbors; give one of them")
    generation = make_config(GenerationConfig, given)
    from clipcap_rag.calibration import calibrate as run_calibration
    from clipcap_rag.risk_coverage import table

    measured = run_calibration(
        given.model,
        given.features,
        given.out,
        index=None if given.no_retrieval else given.index or "default",
        num_neighbors=given.num_neighbors,
        generation=generation,
        good=given.good,
        keep=given.keep,
        device=given.device,
        dtype=given.dtype,
        overwrite=given.overwrite,
    )
    if given.json:
        print_json(measured)
    else:
        print(table(measured))
        print(f"{given.out}: below {measured['level']:.2f} a caption is not sure; use caption --abstain {given.out}")
    return DONE
