"""The commands of `clipcap-rag convert` for other people's weights."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace

from clipcap_rag.flags import CLIP_HELP, add_compute, add_out
from clipcap_rag.output import DONE


def clipcap_flags(parser: ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help="state dict of a ClipCap model, a .pt file")
    add_out(parser)
    parser.add_argument("--clip", metavar="MODEL", help=CLIP_HELP)
    text = "GPT-2-family model for its tokenizer, and its weights if WEIGHTS has none: a folder or a hub id"
    parser.add_argument("--language-model", metavar="MODEL", help=text)
    text = "whether it was trained on unit-length image embeddings (--normalize_prefix)"
    parser.add_argument("--normalize", action=BooleanOptionalAction, help=text)
    text = "text whose first token ends a caption, ' .' where points stand alone; empty for none (default: .)"
    parser.add_argument("--stop-token", default=".", metavar="TEXT", help=text)
    add_compute(parser)


def clipcap(given: Namespace) -> int:
    """Make a captioner of ClipCap's weights.

    What the weights do not tell (--clip, --language-model, --normalize) is known of those that ClipCap's authors
    published, and must be given for others.
    """
    from clipcap_rag.clipcap_weights import convert_clipcap

    checkpoint = convert_clipcap(
        given.weights,
        given.out,
        given.overwrite,
        clip=given.clip,
        language_model=given.language_model,
        normalize=given.normalize,
        stop_token=given.stop_token,
        device=given.device,
        dtype=given.dtype,
    )
    config = checkpoint.config
    print(
        f"{given.out}: {config.mapper} mapper from {checkpoint.encoder['clip']} ({config.clip_dim} wide, "
        f"{'unit length' if config.normalize else 'raw'}) to {config.prefix_length} prefix vectors for "
        f"{checkpoint.language_model}; caption photos with: clipcap-rag caption PHOTO --model {given.out} "
        "--decoding clipcap"
    )
    return DONE
