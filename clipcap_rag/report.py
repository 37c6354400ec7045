"""An evaluation to look at: report.json with all that is shown, and report.html, a page that shows it anywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipcap_rag.artifact import disk_errors, read_json, refuse_unwritable, write_bytes, write_json
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.images import photo_finder
from clipcap_rag.progress import say, track
from clipcap_rag.report_gallery import gallery
from clipcap_rag.report_page import page, thumbnail
from clipcap_rag.report_tables import sections


def write_report(evaluation: str | Path, out: str | Path, photos: str | Path | None = None, most: int = 200) -> Path:
    """Makes a report of a finished evaluation.

    A photo that cannot be read is shown by its name and the reason.

    Args:
        evaluation: the folder that `evaluation.evaluate` filled.
        out: folder for report.json and report.html, which are replaced.
        photos: the folder of the photos, if it is not the one that they were extracted from.
        most: photos on the page for each feature set, half of them the best, half the worst.

    Returns:
        the page.

    Raises:
        InputError: there is no evaluation, `photos` does not exist, or `out` cannot be written.
    """
    evaluation, out = Path(evaluation), Path(out)
    check_report(out, photos)
    report = gather(evaluation, most)
    thumbnails: dict[str, dict[str, str]] = {}
    for shown, features in zip(report["galleries"], report["results"]["features"], strict=True):
        find = _finder(Path(photos) if photos else FeatureSet.open(features["path"]).folder)
        thumbnails[shown["features"]] = _thumbnails(shown, find)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", report)
        write_bytes(out / "report.html", page(report, thumbnails).encode())
    return out / "report.html"


def gather(evaluation: Path, most: int) -> dict[str, Any]:
    """What a report shows of an evaluation.

    Returns:
        {"results": as `evaluation.evaluate` returned them, "sections": of `report_tables.sections`, "galleries": of
        `report_gallery.gallery`, one for each feature set}.
    """
    results = read_json(evaluation / "results.json", "evaluation")
    galleries = [gallery(evaluation, results, features, most) for features in results["features"]]
    return {"results": results, "sections": sections(results), "galleries": galleries}


def check_report(out: str | Path, photos: str | Path | None) -> None:
    """Raises InputError if a report cannot be written to `out`, or there is no folder `photos`."""
    refuse_unwritable(Path(out) / "report.html")
    if photos and not Path(photos).is_dir():
        raise InputError(f"the folder {photos} does not exist; give --photos the one that holds the photos")


def _finder(folder: Path | None) -> Callable[[str], Path]:
    """A function from the name of a photo to its file."""
    if folder is not None and folder.is_dir():
        find = photo_finder(folder)
        return lambda name: find(name, Path(name).stem)

    def nowhere(name: str) -> Path:
        raise InputError(
            f"the folder of {name} is {'gone' if folder else 'not known'}; give --photos the one that holds it"
        )

    return nowhere


def _thumbnails(shown: dict[str, Any], find: Callable[[str], Path]) -> dict[str, str]:
    """By name the photos of a gallery that can be read; the entries of the others get a `problem`."""
    made: dict[str, str] = {}
    for entry in track(shown["entries"], "photos", len(shown["entries"]), "photo"):
        try:
            made[entry["image"]] = thumbnail(find(entry["image"]))
        except InputError as error:
            entry["problem"] = str(error)
    problems = [entry["problem"] for entry in shown["entries"] if "problem" in entry]
    if problems:
        total = len(shown["entries"])
        say(f"{len(problems)} of {total} photos of {shown['features']} cannot be shown; the first: {problems[0]}")
    return made
