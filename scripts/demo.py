"""Runs the main job on real photos in a few minutes: indexes, features, training, captions on, off and swapped."""

import itertools
import json
import os
import shlex
import sys
from pathlib import Path

from clipcap_rag.cli import main

OUT = Path("runs/demo")
PHOTOS, SHOWN = 1500, 6  # photos to train on, unseen photos to caption
SMALL = {"--epochs": 2, "--mapper-layers": 2, "--batch-size": 20, "--learning-rate": 1e-3, "--lm-learning-rate": 5e-4}
NEEDED = {
    "flickr8k/captions_train.jsonl": 'one {"image": "name.jpg", "image_id": "name", "captions": ["...", ...]} per line',
    "flickr8k/captions_dev.jsonl": "the same for photos that are not trained on",
    "flickr8k/images": "the photos that these two files name",
    "captions/cc3m_val.jsonl.gz": 'captions for a second index, one {"caption": "..."} per line',
    "bench_clip": "a CLIP model as open_clip saves it: open_clip_config.json and the weights",
    "bench_gpt2": "a GPT-2 model as transformers saves it",
}


def run(*arguments: str | Path | float, done: bool = False) -> None:
    """Shows a command and runs it, unless an earlier demo has done it; ends the demo where it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ clipcap-rag {shlex.join(words)}", flush=True)
    if done:
        print("done by an earlier demo")
    elif status := main(words):
        sys.exit(status)


def first_lines(source: Path, count: int) -> list[str]:
    with open(source, encoding="utf-8") as file:
        return list(itertools.islice(file, count))


def demo(data: Path) -> None:
    clip, images, captions = data / "bench_clip", data / "flickr8k/images", OUT / "train.jsonl"
    own, other, features, model = (OUT / name for name in ("flickr8k-index", "cc3m-index", "features", "model"))
    OUT.mkdir(parents=True, exist_ok=True)
    captions.write_text("".join(first_lines(data / "flickr8k/captions_train.jsonl", PHOTOS)), encoding="utf-8")
    dev = first_lines(data / "flickr8k/captions_dev.jsonl", SHOWN)
    unseen = [images / json.loads(line)["image"] for line in dev]
    run("index", "build", "--captions", captions, "--clip", clip, "--out", own, done=own.exists())
    foreign = data / "captions/cc3m_val.jsonl.gz"
    run("index", "build", "--captions", foreign, "--clip", clip, "--out", other, done=other.exists())
    source = ("--captions", captions, "--images", images, "--clip", clip)
    run("extract", *source, "--out", features, done=features.exists())
    start = ("--features", features, "--index", own, "--language-model", data / "bench_gpt2")
    trained = (model / "run.json").exists() and json.loads((model / "run.json").read_text())["finished"]
    run("train", *start, "--out", model, *itertools.chain(*SMALL.items()), done=trained)
    for choice in ((), ("--no-retrieval",), ("--index", other)):
        run("caption", *unseen, "--model", model, *choice)
    print(f"\nEverything is in {OUT}; remove it to start over. With --verbose the neighbours are shown too.")


def explain(given: str | None) -> None:
    """Says what the folder of photos and models must hold."""
    problem = f"{given} lacks some of it" if given else "CLIPCAP_RAG_DATA is not set"
    print(f"error: make demo needs a folder with photos, captions and two models; {problem}:", file=sys.stderr)
    for name, what in NEEDED.items():
        print(f"  {name:32}{what}", file=sys.stderr)
    print("Flickr8k is given out by its authors on request; other captioned photos in this shape do as well.\n"
          "Then run: CLIPCAP_RAG_DATA=/path/to/folder make demo", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    folder = os.environ.get("CLIPCAP_RAG_DATA")
    if not folder or not all((Path(folder) / name).exists() for name in NEEDED):
        explain(folder)
        sys.exit(2)
    demo(Path(folder))
