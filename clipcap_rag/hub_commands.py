"""The command that sends captioners and indexes to the Hugging Face hub."""

from argparse import ArgumentParser, Namespace

from clipcap_rag.flags import INDEX_HELP, MODEL_HELP
from clipcap_rag.output import DONE


def push_flags(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or the folder of a caption index")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="where it goes; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository that only you can read")
    text = f"send this index with the model, which then uses it: {INDEX_HELP}"
    parser.add_argument("--index", metavar="INDEX", help=text)
    parser.add_argument("--message", metavar="TEXT", help="commit message (default: Push by clipcap-rag)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent and send nothing")


def push(given: Namespace) -> int:
    """Send a captioner, or a caption index, to the Hugging Face hub for `--model` and `--index` hf-hub:ORG/NAME.

    What it needs goes with it: a CLIP model or frozen language model from a folder, and the index given by --index. The
    token is that of `hf auth login` or of HF_TOKEN.
    """
    from clipcap_rag.publication import listing, packed
    from clipcap_rag.publication import push as run_push

    if given.dry_run:
        with packed(given.model, given.repo, given.index) as (folder, repo_type):
            files = listing(folder)
            print((folder / "README.md").read_text(encoding="utf-8"))
        for name, size in files.items():
            print(f"{size / 1e6:10.3f} MB  {name}")
        print(f"{sum(files.values()) / 1e6:10.3f} MB  to the {repo_type} {given.repo}; nothing was sent")
        return DONE
    private = given.private or None
    print(run_push(given.model, given.repo, index=given.index, private=private, message=given.message))
    return DONE
