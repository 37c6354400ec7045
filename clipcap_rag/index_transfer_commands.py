"""The commands `clipcap-rag index import` and `index export`: indexes of other projects in and out."""

from argparse import ArgumentParser, Namespace

from clipcap_rag.config import EXPORT_FORMATS, ImportConfig, IndexConfig
from clipcap_rag.flags import CLIP_HELP, INDEX_HELP, add_compute, add_config, add_out, make_config
from clipcap_rag.output import DONE


def import_flags(parser: ArgumentParser) -> None:
    text = "a folder or file; an antarctic cache also as its text and its .npy file, or what both begin with"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=text)
    parser.add_argument("--clip", required=True, help=CLIP_HELP)
    add_out(parser)
    add_config(parser, ImportConfig, "reading")
    text = "count and list bad captions instead of stopping at the first"
    parser.add_argument("--skip-bad", action="store_true", help=text)
    parser.add_argument("--licence", metavar="TEXT", help="terms of the captions, kept with the index")
    add_config(parser, IndexConfig, "searching")
    add_compute(parser, batch_size=256)


def import_(given: Namespace) -> int:
    """Make a caption index of another project's; its embeddings are kept where --clip made them."""
    from clipcap_rag.index_import import import_index

    index = import_index(
        given.paths,
        given.clip,
        given.out,
        import_config=make_config(ImportConfig, given),
        index_config=make_config(IndexConfig, given),
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        skip_bad=given.skip_bad,
        overwrite=given.overwrite,
        licence=given.licence,
    )
    origin = index.files.manifest["provenance"]["import"]
    print(f"{index.path}: {len(index)} captions of {origin['format']}, embeddings {origin['embeddings']}")
    return DONE


def export_flags(parser: ArgumentParser) -> None:
    parser.add_argument("index", help=INDEX_HELP)
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="whose layout to write")
    add_out(parser)


def export(given: Namespace) -> int:
    """Write an index in another project's layout: captions and float32 embeddings."""
    from clipcap_rag.index_export import export_index

    folder = export_index(given.index, given.format, given.out, overwrite=given.overwrite)
    print(f"{folder}: {given.format} layout")
    return DONE
