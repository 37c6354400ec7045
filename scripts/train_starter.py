"""Trains the starter that comes with the package, from captioned photos and a CLIP to learn from.

Every stage leaves a folder in --work and is skipped when that is there; a killed one continues where it was. How long
each took is in stages.jsonl. Nothing is drawn anew from run to run: the seeds are fixed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.evaluation import evaluate
from clipcap_rag.features import extract_features
from clipcap_rag.hardware import pick_device
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.progress import say
from clipcap_rag.training import train
from starter import card, dual_encoder, language_model, phrases, release, texts, tokens, views

ROOT = Path(__file__).parents[1]
NEEDED = (
    "flickr8k/images",
    "flickr8k/captions_train.jsonl",
    "flickr8k/captions_dev.jsonl",
    "captions/flickr30k_minus_flickr8k.jsonl.gz",
    "bench_clip",
)
PASSES, CLIP_ROUNDS, LM_EPOCHS = 16, 70, 3
MODEL = ModelConfig(mapper_layers=2, mapper_heads=4, mapper_dropout=0.1)
TRAINING = TrainConfig(
    epochs=3, batch_size=20, learning_rate=1e-3, lm_learning_rate=5e-4, image_noise=0.5, neighbor_noise=0.3,
    pool_sampling=0.2, random_neighbors=0.05, num_neighbors=8,
)  # fmt: skip


def stages(data: Path, work: Path, device: str, workers: int) -> dict[str, Callable[[], object]]:
    """What is made, in order; the name of a stage is that of the folder in `work` that it leaves."""
    photos, dev = data / "flickr8k/images", data / "flickr8k/captions_dev.jsonl"
    captions, everything = work / "texts" / texts.CAPTIONS, work / "texts" / texts.EVERYTHING
    stores, clip = [data / "captions/flickr30k_minus_flickr8k.jsonl.gz"], f"local-dir:{work / 'clip'}"
    chosen = pick_device(device)
    made: dict[str, Callable[[], object]] = {
        "texts": lambda: texts.prepare(data, work / "texts"),
        "tokens": lambda: tokens.learn(everything, work / "tokens"),
        "views": lambda: views.make(captions, photos, data / "bench_clip", PASSES, work / "views", chosen, workers),
        "clip": lambda: dual_encoder.train(work, captions, stores, work / "clip", CLIP_ROUNDS, chosen),
        "language_model": lambda: language_model.train(
            everything, work / "tokens", work / "language_model", LM_EPOCHS, chosen
        ),
        "phrases": lambda: phrases.write(work / "phrases"),
        "flickr8k": lambda: build_caption_index([captions], clip, work / "flickr8k", device=device),
        "index": lambda: build_caption_index([work / "phrases" / phrases.FILE], clip, work / "index", device=device),
        "features": lambda: extract_features([captions], photos, clip, work / "features", device=device),
        "dev": lambda: extract_features([dev], photos, clip, work / "dev", device=device),
        "captioner": lambda: train(
            work / "features", work / "index", str(work / "language_model"), work / "captioner",
            model_config=MODEL, train_config=TRAINING, device=device,
        ),
        "release": lambda: release.release(work, ROOT),
        "starter_index": lambda: release.release_index(work, ROOT),
        "evaluation": lambda: evaluate(
            "starter", [work / "dev"], work / "evaluation", indexes=("starter", str(work / "flickr8k")), device=device
        ),
        "card": lambda: card.write(work, ROOT),
    }  # fmt: skip
    return made


def run(name: str, make: Callable[[], object], work: Path) -> None:
    """Runs a stage unless its folder is there, and notes how long it took."""
    if _done(work / name):
        return
    say(f"{name} ...")
    began = time.monotonic()
    make()
    seconds = round(time.monotonic() - began, 1)
    with (work / "stages.jsonl").open("a") as log:
        log.write(json.dumps({"stage": name, "seconds": seconds}) + "\n")
    say(f"{name}: {seconds} s")


def _done(folder: Path) -> bool:
    """Whether a stage left all it should; training and evaluation fill their folders bit by bit."""
    if folder.name == "captioner":
        return (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text())["finished"]
    return (folder / "results.json").is_file() if folder.name == "evaluation" else folder.is_dir()


def main() -> None:
    """Parses the flags and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(NEEDED)}")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/starter", help="folder for what is made")
    parser.add_argument("--stage", help="only this stage; those before it must be there")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that crop photos")
    given = parser.parse_args()
    lacking = [name for name in NEEDED if not (given.data / name).exists()]
    if lacking:
        sys.exit(f"error: {given.data} lacks {', '.join(lacking)}; give --data the folder that holds them")
    given.work.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    made = stages(given.data.resolve(), given.work.resolve(), given.device, given.workers)
    if given.stage not in (None, *made):
        parser.error(f"--stage {given.stage} is none of {', '.join(made)}")
    try:
        for name, make in made.items():
            if given.stage in (None, name):
                run(name, make, given.work)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
