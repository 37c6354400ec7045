"""The commands of `clipcap-rag convert` for other people's feature files."""

from argparse import ArgumentParser, Namespace

from clipcap_rag.flags import CLIP_HELP, add_compute, add_out
from clipcap_rag.output import DONE


def features_flags(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="pickle of ClipCap's parse_*.py or of clip-text-decoder")
    parser.add_argument("--clip", required=True, help=f"the model that made the embeddings: {CLIP_HELP}")
    add_out(parser)
    text = "count and list bad captions instead of stopping at the first"
    parser.add_argument("--skip-bad", action="store_true", help=text)
    add_compute(parser)


def features(given: Namespace) -> int:
    """Make a feature set of a feature pickle of ClipCap or clip-text-decoder; nothing in it is executed."""
    from clipcap_rag.clipcap_features import import_pickle

    made = import_pickle(
        given.file,
        given.clip,
        given.out,
        device=given.device,
        dtype=given.dtype,
        skip_bad=given.skip_bad,
        overwrite=given.overwrite,
    )
    print(f"{made.path}: {len(made)} photos, {sum(map(len, made.captions))} captions")
    return DONE


def pickle_flags(parser: ArgumentParser) -> None:
    parser.add_argument("features", metavar="FEATURES", help="feature set to convert")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, called .pkl")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    text = "GPT-2-family model whose tokens go into FILE_tokens.pkl beside it (default: ClipCap makes them itself)"
    parser.add_argument("--language-model", metavar="MODEL", help=text)


def pickle(given: Namespace) -> int:
    """Write a feature set as the pickle that ClipCap trains on."""
    from clipcap_rag.clipcap_pickle import export_pickle

    for file in export_pickle(
        given.features, given.out, language_model=given.language_model, overwrite=given.overwrite
    ):
        print(file)
    return DONE
