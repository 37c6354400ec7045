"""The command `clipcap-rag caption`: its flags, and its results as lines for people or JSON."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from clipcap_rag.config import GenerationConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, MODEL_HELP, add_compute, add_config, add_json, count, make_config, positive
from clipcap_rag.output import print_json, status_of
from clipcap_rag.progress import say
from clipcap_rag.shipped import STARTER


def caption_flags(parser: ArgumentParser) -> None:
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("images", nargs="*", default=[], metavar="IMAGE", help="photos, folders of photos, or globs")
    text = "CLIP embeddings of photos instead: a .npy file of rows, or a feature set"
    inputs.add_argument("--embeddings", metavar="PATH", help=text)
    text = "sentences instead, written anew as if their CLIP embeddings were those of photos"
    inputs.add_argument("--text", nargs="+", metavar="TEXT", help=text)
    text = f"{MODEL_HELP} (default: starter, the one that comes with the package)"
    parser.add_argument("--model", default=STARTER, metavar="MODEL", help=text)
    retrieval = parser.add_argument_group("retrieval")
    text = (
        "index to use instead of the model's own; may be repeated; NAME:WEIGHT orders its captions by weight x cosine, "
        f"NAME:WEIGHT:MOST gives at most so many neighbours; {INDEX_HELP}"
    )
    retrieval.add_argument("--index", action="append", help=text)
    retrieval.add_argument("--no-retrieval", action="store_true", help="caption without neighbours")
    text = "neighbour captions per photo; 0 is --no-retrieval (default: as the model was trained)"
    retrieval.add_argument("--num-neighbors", type=count, metavar="N", help=text)
    retrieval.add_argument("--index-device", default="auto", help="auto, cpu or gpu (default: auto)")
    add_config(parser, RetrievalConfig, "what is retrieved")
    add_config(parser, GenerationConfig, "writing")
    output = parser.add_argument_group("output")
    add_json(output, "print one JSON object per photo as it is done, with all candidates")
    text = "lines per photo, the best captions first (default: 1)"
    output.add_argument("--num-captions", type=positive, default=1, metavar="N", help=text)
    output.add_argument("--verbose", action="store_true", help="show neighbours and candidates with their scores")
    text = "show, for each vector of the prefix, the words nearest to it"
    output.add_argument("--explain-prefix", action="store_true", help=text)
    text = "show what changes without each neighbour, and the words that image and neighbours support"
    output.add_argument("--explain", action="store_true", help=text)
    text = "mark captions that are not sure, by a folder of clipcap-rag calibrate; LEVEL instead of its own"
    output.add_argument("--abstain", metavar="DIR[:LEVEL]", help=text)
    text = "add the CLIP text embedding of the caption to --json"
    output.add_argument("--caption-embedding", action="store_true", help=text)
    text = "auto, cpu, cuda, cuda:N, several with commas, or all GPUs; a process for each"
    add_compute(parser, batch_size=64, workers=0, device=text)


def caption(given: Namespace) -> int:
    """Caption photos, with retrieval, without, or with another index swapped in."""
    generation = make_config(GenerationConfig, given)
    _refuse_contradictions(given, generation)
    errors, few = [], 0
    with closing(_results(given, generation)) as results:
        for result in results:
            errors.append(result.error)
            if given.json:
                more = {"caption_embedding": _listed(result.caption_embedding)} if given.caption_embedding else {}
                print_json(result.to_json() | more)
            elif result.error is None:
                _print_result(result, given.num_captions, given.verbose)
                few += len(result.candidates) < given.num_captions
            else:
                say(f"error: {result.error}")
    if few:
        say(f"{few} of {len(errors)} have fewer than {given.num_captions} different captions; raise --temperature")
    return status_of(errors)


def _refuse_contradictions(given: Namespace, generation: GenerationConfig) -> None:
    if given.no_retrieval and (given.index or given.num_neighbors):
        raise InputError("--no-retrieval contradicts --index and --num-neighbors; give one of them")
    if given.caption_embedding and not given.json:
        raise InputError("--caption-embedding has no place in a line for people; add --json")
    if given.json and given.num_captions > 1:
        raise InputError("--json gives all candidates in any case; leave out --num-captions")
    if given.num_captions > generation.captions_per_image:
        raise InputError(
            f"--num-captions is {given.num_captions} but {generation.captions_per_image} are written with --decoding "
            f"{generation.decoding}; raise --candidates of sample or --num-beams of beam"
        )


def _results(given: Namespace, generation: GenerationConfig) -> Iterator[Any]:
    from clipcap_rag.hardware import pick_devices

    devices, inputs = pick_devices(given.device), _inputs(given)
    if len(devices) > 1:
        from clipcap_rag.many_devices import caption_on

        captions = partial(caption_on, devices, given.model, dtype=given.dtype, index_device=given.index_device)
    else:
        from clipcap_rag.captioner import Captioner

        captions = Captioner.from_pretrained(given.model, devices[0], given.dtype, given.index_device).stream
    return captions(
        **inputs,
        index=None if given.no_retrieval else given.index or "default",
        num_neighbors=given.num_neighbors,
        generation=generation,
        batch_size=given.batch_size,
        workers=given.workers,
        explain_prefix=given.explain_prefix,
        explain=given.explain,
        abstention=_abstention(given.abstain),
        retrieval=make_config(RetrievalConfig, given),
    )


def _inputs(given: Namespace) -> dict[str, Any]:
    if given.text:
        return {"texts": given.text}
    if given.embeddings:
        from clipcap_rag.caption_inputs import StoredEmbeddings

        return {"embeddings": StoredEmbeddings.open(given.embeddings)}
    from clipcap_rag.images import expand_images

    return {"images": expand_images(given.images)}


def _abstention(argument: str | None) -> Any:
    if argument is None:
        return None
    from clipcap_rag.abstention import Abstention

    return Abstention.open(argument)


def _listed(embedding: Any) -> list[float] | None:
    return None if embedding is None else embedding.tolist()


def _print_result(result: Any, captions: int, verbose: bool) -> None:
    mark = "not sure: " if result.confidence and result.confidence.abstained else ""
    for candidate in result.candidates[:captions]:
        print(f"{result.image}: {mark}{candidate.caption}", flush=True)
    for number, words in enumerate(result.prefix_words or []):
        listed = ", ".join(f"{word.word!r} {word.similarity:.2f}" for word in words)
        print(f"    prefix {number}  {listed}")
    if result.evidence:
        _print_evidence(result)
    if not verbose:
        return
    if result.confidence:
        print(f"    sure {result.confidence.sure:6.3f}")
    for neighbor in result.neighbors:
        by = " by photo" if neighbor.route == "image" else ""
        print(f"    near {neighbor.score:6.3f}  {neighbor.caption}  [{neighbor.index} {neighbor.row}{by}]")
    for candidate in result.candidates:
        detail = f"CLIP {candidate.clip_similarity:.3f}, log-probability {candidate.log_probability:.1f}"
        print(f"    rank {candidate.score:6.3f}  {candidate.caption}  ({detail})")


def _print_evidence(result: Any) -> None:
    found = result.evidence
    for number, (neighbor, without) in enumerate(zip(found.neighbors, found.left_out, strict=True), 1):
        print(f"    neighbour {number}  {neighbor.score:.3f}  {neighbor.caption}")
        print(f"        {_without('it', without, result.caption)}")
    if found.all_left_out:
        print(f"    {_without('all neighbours', found.all_left_out, result.caption)}")
    for word in found.words:
        having = ", ".join(str(place + 1) for place in word.in_neighbors) or "none"
        added = f"image {word.from_image:+.1f}, neighbours {word.from_neighbors:+.1f} nats"
        print(f"    word {word.word:<14} {word.supported_by:<10} {added}; in neighbours {having}")


def _without(what: str, without: Any, caption: str) -> str:
    same = without.caption == caption
    return f"without {what} {without.change:+.2f} nats: {'the same caption' if same else without.caption or 'no words'}"
