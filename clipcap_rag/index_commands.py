"""The commands of `clipcap-rag index`: build, look into, search and check a caption index."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from clipcap_rag.caption_template import PLAIN
from clipcap_rag.config import IndexConfig, RetrievalConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import (
    CLIP_HELP,
    INDEX_HELP,
    add_captions,
    add_compute,
    add_config,
    add_json,
    add_out,
    make_config,
    positive,
)
from clipcap_rag.ngrams import PhraseOptions
from clipcap_rag.output import DONE, print_json, status_of
from clipcap_rag.progress import say
from clipcap_rag.sources import SourceOptions


def build_flags(parser: ArgumentParser) -> None:
    add_captions(parser)
    parser.add_argument("--clip", required=True, help=CLIP_HELP)
    add_out(parser)
    parser.add_argument("--licence", metavar="TEXT", help="terms of the captions, kept with the index")
    add_config(parser, PhraseOptions, "phrases")
    text = "what is encoded for a caption, {} in its place; the caption is kept without (default: {})"
    parser.add_argument("--template", default=PLAIN, metavar="TEXT", help=text)
    add_config(parser, IndexConfig, "searching")
    text = "feature set of photos to tune an inexact search with (default: stored captions with noise)"
    parser.add_argument("--query-features", metavar="DIR", help=text)
    add_compute(parser, batch_size=256)


def build(given: Namespace) -> int:
    """Build a caption index from caption files; a killed build continues when it is run again."""
    from clipcap_rag.index_builder import build_caption_index

    index = build_caption_index(
        given.captions,
        given.clip,
        given.out,
        source_options=make_config(SourceOptions, given),
        phrase_options=make_config(PhraseOptions, given),
        template=given.template,
        index_config=make_config(IndexConfig, given),
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        skip_bad=given.skip_bad,
        overwrite=given.overwrite,
        licence=given.licence,
        query_features=given.query_features,
    )
    print(f"{index.path}: {len(index)} captions, {index.dim} wide, by {index.encoder['clip']}")
    return DONE


def info_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    add_json(parser, "print the manifest as JSON")


def info(given: Namespace) -> int:
    """Show what an index holds and what made it."""
    from clipcap_rag.index_names import resolve_index
    from clipcap_rag.index_store import open_files

    files = open_files(resolve_index(given.index))
    manifest = files.manifest
    if given.json:
        print_json(manifest)
        return DONE
    encoder, live = manifest["encoder"], int(files.live.sum())
    print(f"{files.path}\n  captions    {live}" + (f" ({files.rows - live} removed)" if files.rows > live else ""))
    print(f"  encoder     {encoder['clip']}, {files.dim} wide\n  revision    {manifest['revision']}")
    for segment in manifest["segments"]:
        search = segment.get("search") or {}
        print(f"  segment     {segment['name']}: {segment['rows']} rows, {search.get('key', 'exact search')}")
    if files.images is not None:
        known = "" if files.images.trunk is None else f"; {files.images.trunk.shape[1]} trunk features of each"
        print(f"  photos      {len(files.images)}, for --route image and auto{known}")
    print(f"  on disk     {sum(file['bytes'] for file in manifest['files'].values()) / 1e6:.1f} MB")
    print(f"  licence     {manifest['licence'] or 'not stated'}")
    for caption in files.captions(files.live.nonzero()[0][:3]):
        print(f"  e.g.        {caption}")
    return DONE


def search_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    parser.add_argument("text", nargs="*", help="sentences to search with")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="photos to search with instead")
    text = "captions per query (default: 10)"
    parser.add_argument("--num-neighbors", type=positive, default=10, metavar="N", help=text)
    parser.add_argument("--clip", help="CLIP model, where the one named in the index has moved")
    parser.add_argument("--index-device", default="auto", help="auto, cpu or gpu (default: auto)")
    text = "clusters of an IVF index that are looked at (default: as tuned when it was built)"
    parser.add_argument("--nprobe", type=positive, metavar="N", help=text)
    text = "candidates that an HNSW index looks at (default: as tuned when it was built)"
    parser.add_argument("--ef-search", type=positive, metavar="N", help=text)
    add_config(parser, RetrievalConfig, "what is found")
    add_json(parser, "print one JSON object per query")
    add_compute(parser)


def search(given: Namespace) -> int:
    """Find the captions nearest to sentences or photos, as a captioner does: captions of the same words count once."""
    if bool(given.text) == bool(given.images):
        raise InputError("give either sentences or --images to search with")
    from clipcap_rag.caption_index import CaptionIndex
    from clipcap_rag.encoder import Encoder, check_encoder
    from clipcap_rag.images import expand_images
    from clipcap_rag.retriever import Retriever

    index = CaptionIndex.open(given.index, given.index_device, given.nprobe, given.ef_search)
    encoder = Encoder.load(given.clip or index.encoder["clip"], given.device, given.dtype, base=index.path)
    check_encoder(index.encoder, encoder, f"the index {index.path}")
    if given.text:
        names, errors = given.text, [None] * len(given.text)
        queries = encoder.encode_text(given.text).vectors
    else:
        paths = expand_images(given.images)
        encoded = encoder.encode_image(paths)
        names, errors, queries = [str(path) for path in paths], encoded.errors, encoded.embeddings.vectors
    retriever = Retriever([index], config=make_config(RetrievalConfig, given))
    for name, error, found in zip(names, errors, retriever.search(queries, given.num_neighbors).listed(), strict=True):
        found = found if error is None else []
        ids = index.files.caption_ids([neighbor.row for neighbor in found])
        neighbors = [
            {"caption_id": caption_id, **asdict(neighbor)} for caption_id, neighbor in zip(ids, found, strict=True)
        ]
        if given.json:
            print_json({"query": name, "neighbors": neighbors, "error": error})
        elif error is None:
            print(name)
            for neighbor in neighbors:
                print(f"  {neighbor['score']:6.3f}  {neighbor['caption']}")
        else:
            say(f"error: {error}")
    return status_of(errors)


def verify_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    text = "check files, ids and vectors only, without loading the CLIP model"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--clip", help="CLIP model, where the one named in the index has moved")
    add_compute(parser)


def verify(given: Namespace) -> int:
    """Check an index: its files, its vectors, and that its CLIP model still gives them."""
    from clipcap_rag.index_check import verify_index

    sample = 0 if given.quick else 256
    check = verify_index(given.index, given.clip, given.device, given.dtype, sample)
    again = f", {check.encoded} captions encoded again, smallest cosine {check.smallest_cosine:.4f}"
    print(f"{check.path}: sound; {check.rows} rows{again if check.encoded else ''}")
    return DONE
