"""The main job on real photos with a real small CLIP and GPT-2, from caption files to captions."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipcap_rag.cli import main
from clipcap_rag.encoder import Encoder
from clipcap_rag.features import FeatureSet
from clipcap_rag.metrics import recall_at
from clipcap_rag.neighbors import LISTED

pytestmark = [
    pytest.mark.photos,
    pytest.mark.skipif("CLIPCAP_RAG_DATA" not in os.environ, reason="CLIPCAP_RAG_DATA does not name the photos"),
]


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def head(source: Path, out: Path, count: int) -> Path:
    with open(source, encoding="utf-8") as file:
        out.write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    return out


def job(folder: Path, photos: int, unseen: int, *settings) -> SimpleNamespace:
    """Indexes, features and a captioner trained on the first `photos`; features of `unseen` others."""
    data = Path(os.environ["CLIPCAP_RAG_DATA"])
    clip, images = data / "bench_clip", data / "flickr8k/images"
    own = head(data / "flickr8k/captions_train.jsonl", folder / "train.jsonl", photos)
    dev = head(data / "flickr8k/captions_dev.jsonl", folder / "dev.jsonl", unseen)
    other = folder / "other.jsonl"
    last = (data / "flickr8k/captions_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[-100:]
    other.write_text("".join(last), encoding="utf-8")
    run("index", "build", "--captions", own, "--clip", clip, "--out", folder / "own")
    run("index", "build", "--captions", other, "--clip", clip, "--out", folder / "other")
    run("extract", "--captions", own, "--images", images, "--clip", clip, "--out", folder / "train")
    run("extract", "--captions", dev, "--images", images, "--clip", clip, "--out", folder / "dev")
    start = ("--features", folder / "train", "--index", folder / "own", "--language-model", data / "bench_gpt2")
    run("train", *start, "--out", folder / "run", "--validation-features", folder / "dev", *settings)
    unseen_photos = [images / name for name in FeatureSet.open(folder / "dev").images]
    return SimpleNamespace(folder=folder, data=data, photos=unseen_photos)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    return job(tmp_path_factory.mktemp("photos"), 200, 40, "--epochs", 1, "--mapper-layers", 1)


def captions(small, capfd, *flags) -> list[dict]:
    capfd.readouterr()
    run("caption", *small.photos[:6], "--model", small.folder / "run", "--json", *flags)
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_captions_with_retrieval_on_off_and_swapped(small, capfd):
    on = captions(small, capfd)
    off = captions(small, capfd, "--no-retrieval")
    swapped = captions(small, capfd, "--index", small.folder / "other")
    for results in (on, off, swapped):
        assert [result["image"] for result in results] == [str(photo) for photo in small.photos[:6]]
        assert all(result["caption"] and result["error"] is None for result in results)
        assert all(len(result["caption"].split()) >= 3 for result in results)
    assert all(len(result["neighbors"]) == LISTED for result in on + swapped)
    assert not any(result["neighbors"] for result in off)
    assert {neighbor["index"] for result in swapped for neighbor in result["neighbors"]} == {"other"}
    assert [result["candidates"] for result in on] != [result["candidates"] for result in off]
    assert captions(small, capfd) == on


def test_evaluation_of_unseen_photos(small, tmp_path, capfd):
    words = ("--model", small.folder / "run", "--features", small.folder / "dev", "--out", tmp_path / "evaluation")
    run("evaluate", *words, "--decodings", "greedy", "--random-neighbors", "--index", small.folder / "own")
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    scores = {(row["neighbors"], row["decoding"]): row["metrics"]["CIDEr"]["value"] for row in result["rows"]}
    expected = {(name, "greedy") for name in ("own", "none", "random of own")}
    assert set(scores) == expected | {("own", f"{which} caption") for which in ("nearest", "consensus")}
    assert all(0 < score < 2 for score in scores.values())
    assert result["features"][0]["excluded_rows"]["own"] == 0


def test_the_real_clip_finds_captions(small):
    features = FeatureSet.open(small.folder / "dev")
    texts = [text for found in features.captions for text in found]
    owner = [row for row, found in enumerate(features.captions) for _ in found]
    encoder = Encoder.load(str(small.data / "bench_clip"), dtype="float32")
    recall = recall_at(features.unit_embeddings(), encoder.encode_text(texts).vectors, owner, (1, 10))
    assert recall["R@1"] > 0.5 and recall["R@10"] > 0.9  # among the captions of 40 photos
    again = encoder.encode_image(small.photos[:4]).embeddings.raw
    np.testing.assert_allclose(again, features.embeddings[:4], rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_an_epoch_on_all_photos_beats_the_nearest_caption(tmp_path):
    whole = job(tmp_path, 6000, 1000, "--epochs", 1)
    words = ("--model", whole.folder / "run", "--features", whole.folder / "dev", "--out", tmp_path / "evaluation")
    run("evaluate", *words, "--decodings", "greedy")
    result = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    scores = {(row["neighbors"], row["decoding"]): row["metrics"]["CIDEr"]["value"] for row in result["rows"]}
    assert scores["own", "greedy"] > scores["own", "nearest caption"] > 0.2
    assert scores["own", "greedy"] > scores["none", "greedy"] - 0.01
