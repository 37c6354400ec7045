"""Lint: planted faults are found and counted, and an index without them has none."""

import json

import numpy as np
import pytest

from clipcap_rag.cli import main
from clipcap_rag.errors import InputError
from clipcap_rag.features import extract_features
from clipcap_rag.index_builder import build_caption_index
from clipcap_rag.index_editor import add_captions, index_encoder, remove_captions
from clipcap_rag.index_lint import lint_index


@pytest.fixture(scope="module")
def street(tmp_path_factory, tiny_clip, tiny_captions):
    """An index of 32 different captions of a real CLIP model, the model, and photos of which one is like no caption."""
    folder = tmp_path_factory.mktemp("street")
    (folder / "street.txt").write_text("\n".join(tiny_captions) + "\n")
    clip = f"local-dir:{tiny_clip}"
    build_caption_index([folder / "street.txt"], clip, folder / "street", device="cpu", dtype="float32")
    return folder / "street"


def counts(report) -> dict[str, int]:
    return {finding.name: finding.count for finding in report.findings}


def test_planted_faults_are_found(street, tmp_path):
    import shutil

    index = shutil.copytree(street, tmp_path / "street")
    clean = counts(lint_index(index, device="cpu", dtype="float32"))
    assert clean["repeats of a caption"] == clean["without a word"] == clean["not of unit length"] == 0
    assert clean["cut at 32 tokens"] == 0
    encoder = index_encoder(index, None, "cpu", "float32")
    long = "a kite over a hill " * 10
    planted = ["A brown dog, rests quietly by the sea!", "?!", long, "to be removed", "to be removed"]
    add_captions(index, planted, encoder)
    remove_captions(index, {"caption": ["to be removed"]})
    report = lint_index(index, device="cpu", dtype="float32")
    found = counts(report)
    assert (report.captions, found["repeats of a caption"], found["without a word"]) == (35, 1, 1)
    assert found["cut at 32 tokens"] == 1
    assert "2 times: a brown dog rests quietly by the sea" in report.table()
    exact = " ".join(["kite"] * 29)
    assert encoder.tokenizer([exact])[0, 30] != 0 and encoder.tokenizer([exact])[0, 31] == 0


def test_near_duplicates_and_outliers_by_their_vectors(tmp_path):
    from clipcap_rag.index_store import SegmentWriter, caption_batch, write_index_manifest

    random = np.random.default_rng(0)
    centre = random.normal(size=32)
    vectors = centre + 0.8 * random.normal(size=(200, 32))
    vectors[7] = vectors[150] + 0.001  # of other words
    vectors[99] = -centre
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[11] = np.nan
    with SegmentWriter(tmp_path / "kites" / "segments" / "000001", 32) as writer:
        names = [f"kite number {row}" for row in range(200)]
        empty = [None] * 200
        columns = {"caption": names, "caption_id": names, "image_id": empty, "source": empty, "meta": [{}] * 200}
        writer.append(caption_batch(columns), vectors)
    entries = [{"name": "000001", "rows": 200, "search": None}]
    encoder = {"clip": "tiny", "dim": 32, "probes": {}}
    write_index_manifest(tmp_path / "kites", revision=1, encoder=encoder, segments=entries, provenance={}, licence=None)
    report = lint_index(tmp_path / "kites", quick=True)
    assert counts(report) == {
        "repeats of a caption": 0, "without a word": 0, "not of unit length": 1, "near duplicates": 2,
        "far from every other": 1,
    }  # fmt: skip
    shown = report.table()
    assert "kite number 7 | kite number 150" in shown and "kite number 11" in shown and "kite number 99" in shown


def test_coverage_of_photos_from_files_and_from_features(street, photo_folder, tiny_clip, tmp_path, capsys):
    captions = tmp_path / "captions.jsonl"
    names = sorted(path.name for path in photo_folder.iterdir())
    captions.write_text("".join(json.dumps({"image": name, "caption": "a photo"}) + "\n" for name in names))
    clip = f"local-dir:{tiny_clip}"
    options = {"device": "cpu", "dtype": "float32"}
    features = extract_features([captions], photo_folder, clip, tmp_path / "features", workers=0, **options)
    by_features = lint_index(street, features=features.path, quick=True)
    by_files = lint_index(street, images=[photo_folder, tmp_path / "none.jpg"], **options)
    assert by_features.typical_cosine == pytest.approx(by_files.typical_cosine, abs=1e-3)
    assert by_files.findings[-1].looked_at == by_features.findings[-1].looked_at == 8
    assert counts(by_files)["unreadable photos"] == 1
    assert main(["index", "lint", str(street), "--features", str(features.path), "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["typical_cosine"] == by_features.typical_cosine and len(printed["findings"]) == 6
    assert main(["index", "lint", str(street), "--images", str(photo_folder), "--quick"]) == 2
    with pytest.raises(InputError, match="quick"):
        lint_index(street, images=[photo_folder], quick=True)
