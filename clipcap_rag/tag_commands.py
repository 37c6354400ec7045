"""The command `clipcap-rag tag`: photos to the nearest entries of an index."""

from argparse import ArgumentParser, Namespace

from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, add_compute, add_json, positive
from clipcap_rag.output import DONE, print_json, status_of
from clipcap_rag.progress import say


def tag_flags(parser: ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photos, folders of photos, or globs")
    parser.add_argument("--index", required=True, help=INDEX_HELP)
    parser.add_argument("-k", type=positive, default=10, metavar="N", help="entries per photo (default: 10)")
    parser.add_argument("--clip", help="CLIP model, where the one named in the index has moved")
    parser.add_argument("--index-device", default="auto", help="auto, cpu or gpu (default: auto)")
    output = parser.add_argument_group("output").add_mutually_exclusive_group()
    add_json(output, "print one JSON object per photo as it is done")
    text = "write PHOTO.jpg.knn for each PHOTO.jpg, one entry a line; photos that have theirs are left out"
    output.add_argument("--sidecar", action="store_true", help=text)
    parser.add_argument("--out", metavar="DIR", help="folder for the files of --sidecar, instead of beside the photos")
    parser.add_argument("--overwrite", action="store_true", help="with --sidecar: write files that are there again")
    add_compute(parser, batch_size=32, workers=0)


def tag(given: Namespace) -> int:
    """Tag photos with the nearest entries of an index, such as one of phrases mined from text."""
    if (given.out or given.overwrite) and not given.sidecar:
        raise InputError("--out and --overwrite are for files; give --sidecar, too")
    from clipcap_rag.tagging import Tagger, side_files, write_tags

    files = side_files(given.images, given.out)
    if given.sidecar and not given.overwrite:
        wanted = {image: file for image, file in files.items() if not file.exists()}
        if len(files) > len(wanted):
            say(f"{len(files) - len(wanted)} photos have their tags already; --overwrite makes them again")
        files = wanted
    if not files:
        return DONE
    tagger = Tagger.load(given.index, given.clip, given.device, given.dtype, given.index_device)
    errors = []
    images = list(files)
    tagged = tagger.tag_images(images, given.k, given.batch_size, given.workers)
    for image, tags in zip(images, tagged, strict=True):
        errors.append(tags.error)
        if given.json:
            print_json(tags.to_json())
        elif tags.error is not None:
            say(f"error: {tags.error}")
        elif given.sidecar:
            write_tags(files[image], tags)
        else:
            print(tags.image)
            for found in tags.tags:
                print(f"  {found.score:6.3f}  {found.caption}")
    return status_of(errors)
