"""Captions photos that installed packages bring along, with the starter: with retrieval and without."""

import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

from clipcap_rag import Captioner, CaptionResult

PHOTOS = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "gradio": tuple(f"media_assets/images/{name}" for name in ("cheetah1.jpg", "lion.jpg", "tower.jpg")),
}
SHOWN = 4  # neighbours of each photo


def photos() -> list[Path]:
    """Those of the photos that are on this machine."""
    found = []
    for package, files in PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            print(f"{package} is not installed, so its photos are left out; make demo installs it", file=sys.stderr)
            continue
        found += [path for file in files if (path := Path(spec.origin).parent / file).is_file()]
    return found


def show(photo: Path, on: CaptionResult, off: CaptionResult) -> str:
    """Both captions of a photo, and the neighbours that made the difference."""
    rows = [("with retrieval", f"{on.candidates[0].clip_similarity:.3f}", on.caption)]
    rows += [("without", f"{off.candidates[0].clip_similarity:.3f}", off.caption)]
    rows += [("neighbour", f"{neighbor.score:.3f}", neighbor.caption) for neighbor in on.neighbors[:SHOWN]]
    lines = [f"{what:<16}{score:>7}  {textwrap.shorten(str(caption), 90)}" for what, score, caption in rows]
    return "\n".join([str(photo.name), *(f"  {line}" for line in lines)])


def main() -> None:
    """Captions each photo twice and prints a table; the numbers are CLIP similarities."""
    shown = photos()
    if not shown:
        sys.exit("error: no photo was found; run make demo, which installs matplotlib and gradio")
    captioner = Captioner.from_pretrained("starter")
    for photo, on, off in zip(shown, captioner.stream(shown), captioner.stream(shown, index=None), strict=True):
        print(show(photo, on, off), end="\n\n")
    print("The number is CLIP's similarity of the sentence to the photo. The same from the command line:\n")
    print(f"  .venv/bin/clipcap-rag caption {shown[0]} --verbose")


if __name__ == "__main__":
    main()
