"""Naming what only the index knows: nouns that captioner and index lack are said once phrases were added.

Trains on photos and captions without some nouns, captions the validation photos with an index without them, adds ten
phrases for each noun to the index and captions again. What is done is kept: a stopped run continues. Precision counts
a named noun as right if at least two of the photo's captions have it, or one of them (lenient).
"""

import argparse
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_rag.artifact import new_directory, save_array, write_json
from clipcap_rag.caption_inputs import StoredEmbeddings
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig, ModelConfig, TrainConfig
from clipcap_rag.features import FeatureSet, write_tables
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_editor import add_captions
from clipcap_rag.metrics import caption_metrics
from clipcap_rag.progress import say
from clipcap_rag.training import train

NOUNS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_PATTERNS = {noun: re.compile(known["pattern"], re.IGNORECASE) for noun, known in NOUNS.items()}
_KEPT_BACK = (*_PATTERNS.values(), re.compile(r"\bswing", re.IGNORECASE))


def names(noun: str, caption: str) -> bool:
    """Whether a caption has the noun, its plural or a compound of it."""
    return _PATTERNS[noun].search(caption) is not None


def keep_back(features: FeatureSet, out: Path) -> None:
    """The feature set without the captions that have a noun, and without the photos that then have none."""
    captions = [
        [text for text in own if not any(kept.search(text) for kept in _KEPT_BACK)] for own in features.captions
    ]
    rows = [row for row, own in enumerate(captions) if own]
    with new_directory(out) as folder:
        save_array(folder / "embeddings.npy", np.asarray(features.embeddings)[rows])
        columns = ([column[row] for row in rows] for column in (features.image_ids, features.images, features.digests))
        fields = {"encoder": features.encoder, "errors": [], "bad_lines": [], "bad_line_count": 0}
        write_tables(folder, *columns, [captions[row] for row in rows], fields)


def write_captions_file(features: FeatureSet, file: Path) -> None:
    """The captions of a feature set as JSON Lines."""
    lines = zip(features.images, features.image_ids, features.captions, strict=True)
    rows = (json.dumps({"image": image, "image_id": name, "captions": own}) for image, name, own in lines)
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def score(references: list[list[str]], captions: list[str]) -> dict[str, Any]:
    """CIDEr, and for each noun and all together how many photos show it, are said to, and both."""
    nouns = {}
    for noun in NOUNS:
        shown = np.array([sum(names(noun, text) for text in own) for own in references])
        said = np.array([names(noun, caption) for caption in captions])
        nouns[noun] = {
            "shown": int((shown >= 2).sum()),
            "said": int(said.sum()),
            "right": int((said & (shown >= 2)).sum()),
            "lenient": int((said & (shown >= 1)).sum()),
        }
    total = {key: sum(counts[key] for counts in nouns.values()) for key in ("shown", "said", "right", "lenient")}
    return {"CIDEr": caption_metrics(references, captions)["CIDEr"], "nouns": nouns, "all": total}


def line(name: str, counts: dict[str, int]) -> str:
    """Recall and precision of one noun, in percent."""
    recall = 100 * counts["right"] / max(1, counts["shown"])
    precision, lenient = (100 * counts[key] / max(1, counts["said"]) for key in ("right", "lenient"))
    return (
        f"{name:<40} shown {counts['shown']:4d} said {counts['said']:4d} recall {recall:5.1f} "
        f"precision {precision:5.1f} lenient {lenient:5.1f}"
    )


def main() -> None:
    """Runs the stages that are not done yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, help="feature set of the training photos")
    parser.add_argument("--validation-features", required=True, help="feature set of the photos to caption")
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--text-neighbors", type=int, default=4)
    parser.add_argument("--text-dropout", type=float, default=0.3)
    parser.add_argument("--num-neighbors", type=int, default=100, help="neighbours for each photo")
    parser.add_argument("--modes", nargs="+", default=["off", "prompt", "bias"])
    parser.add_argument("--decodings", nargs="+", default=["greedy", "sample"])
    given = parser.parse_args()
    out, shown = given.out, FeatureSet.open(given.validation_features)
    out.mkdir(parents=True, exist_ok=True)
    features, index, grown = out / "features", out / "index" / "without", out / "index" / "with"
    if not features.exists():
        keep_back(FeatureSet.open(given.features), features)
    if not index.exists():
        write_captions_file(FeatureSet.open(features), out / "captions.jsonl")
        build_caption_index([out / "captions.jsonl"], FeatureSet.open(features).encoder["clip"], index)
    if not (out / "run" / "loss.png").exists() or not json.loads((out / "run" / "run.json").read_text())["finished"]:
        train(
            features,
            index,
            given.language_model,
            out / "run",
            validation_features=given.validation_features,
            model_config=ModelConfig(mapper_layers=2, mapper_dropout=0.1, language_model_tuning="layers"),
            train_config=TrainConfig(
                epochs=given.epochs,
                batch_size=20,
                learning_rate=1e-3,
                lm_learning_rate=5e-4,
                image_noise=0.5,
                neighbor_noise=0.3,
                pool_sampling=0.2,
                random_neighbors=0.05,
                text_neighbors=given.text_neighbors,
                text_dropout=given.text_dropout,
            ),
        )
    if not grown.exists():
        with new_directory(grown) as folder:
            shutil.copytree(index, folder, dirs_exist_ok=True)
        add_captions(grown, [phrase for known in NOUNS.values() for phrase in known["phrases"]])
    captioner, photos = Captioner.from_pretrained(out / "run"), StoredEmbeddings.open(given.validation_features)
    for decoding in given.decodings:
        for mode in given.modes:
            settings = GenerationConfig(decoding=decoding, retrieved_text=mode, new_word_share=0.01)
            for where in (index, grown):
                file = out / f"{decoding}-{mode}-{where.name}.json"
                if not file.exists():
                    results = captioner.caption(
                        embeddings=photos, index=where, num_neighbors=given.num_neighbors, generation=settings
                    )
                    captions = [result.caption or "" for result in results]
                    near = [[found.caption for found in result.neighbors] for result in results]
                    write_json(file, score(shown.captions, captions) | {"captions": captions, "neighbors": near})
                found = json.loads(file.read_text())
                print(
                    line(f"{decoding} {mode} {where.name}, CIDEr {100 * found['CIDEr']:.1f}", found["all"]), flush=True
                )
                for noun, counts in found["nouns"].items():
                    say(line(f"    {noun}", counts))


if __name__ == "__main__":
    main()
