"""The command `clipcap-rag caption`: its flags, and its results as lines for people or JSON."""

from argparse import ArgumentParser, Namespace
from typing import Any

from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, add_compute, add_config, add_json, count, make_config
from clipcap_rag.output import print_json, status_of
from clipcap_rag.progress import say
from clipcap_rag.shipped import STARTER


def caption_flags(parser: ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photos, folders of photos, or globs")
    text = "a training run or checkpoint (default: starter, the one that comes with the package)"
    parser.add_argument("--model", default=STARTER, metavar="DIR", help=text)
    retrieval = parser.add_argument_group("retrieval")
    text = f"index to use instead of the model's own, NAME:WEIGHT for a weight; may be repeated; {INDEX_HELP}"
    retrieval.add_argument("--index", action="append", help=text)
    retrieval.add_argument("--no-retrieval", action="store_true", help="caption without neighbours")
    text = "neighbour captions per photo; 0 is --no-retrieval (default: as the model was trained)"
    retrieval.add_argument("--num-neighbors", type=count, metavar="N", help=text)
    retrieval.add_argument("--index-device", default="auto", help="auto, cpu or gpu (default: auto)")
    add_config(parser, GenerationConfig, "writing")
    output = parser.add_argument_group("output")
    add_json(output, "print one JSON object per photo as it is done")
    output.add_argument("--verbose", action="store_true", help="show neighbours and candidates with their scores")
    add_compute(parser, batch_size=16, workers=0)


def caption(given: Namespace) -> int:
    """Caption photos, with retrieval, without, or with another index swapped in."""
    if given.no_retrieval and (given.index or given.num_neighbors):
        raise InputError("--no-retrieval contradicts --index and --num-neighbors; give one of them")
    generation = make_config(GenerationConfig, given)
    from clipcap_rag.captioner import Captioner
    from clipcap_rag.images import expand_images

    images = expand_images(given.images)
    captioner = Captioner.from_pretrained(given.model, given.device, given.dtype, given.index_device)
    errors = []
    for result in captioner.stream(
        images,
        index=None if given.no_retrieval else given.index or "default",
        num_neighbors=given.num_neighbors,
        generation=generation,
        batch_size=given.batch_size,
        workers=given.workers,
    ):
        errors.append(result.error)
        if given.json:
            print_json(result.to_json())
        elif result.error is None:
            _print_result(result, given.verbose)
        else:
            say(f"error: {result.error}")
    return status_of(errors)


def _print_result(result: Any, verbose: bool) -> None:
    print(f"{result.image}: {result.caption}", flush=True)
    if not verbose:
        return
    for neighbor in result.neighbors:
        print(f"    near {neighbor.score:6.3f}  {neighbor.caption}  [{neighbor.index} {neighbor.row}]")
    for candidate in result.candidates:
        detail = f"CLIP {candidate.clip_similarity:.3f}, log-probability {candidate.log_probability:.1f}"
        print(f"    rank {candidate.score:6.3f}  {candidate.caption}  ({detail})")
