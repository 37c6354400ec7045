"""Files scored and compared: what the result says of them, and what keeps it from being made."""

import hashlib
import json

import pytest

from clipcap_rag.errors import InputError
from clipcap_rag.judging import JudgingConfig
from clipcap_rag.scored_files import compare_files, score_files
from clipcap_rag.sources import SourceOptions

WORDS = JudgingConfig(java=False)


@pytest.fixture
def files(tmp_path):
    """References of six photos in a Karpathy file, predictions of two captioners in two formats."""
    texts = ["a red kite", "two boats lie there", "an old cat", "a dog in snow", "three tall trees", "a cup of tea"]
    images = [
        {"filename": f"p{n}.jpg", "cocoid": 100 + n, "split": "test" if n < 5 else "train",
         "sentences": [{"raw": text}, {"raw": f"{text} again"}]}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    references, first, second = (tmp_path / name for name in ("karpathy.json", "first.json", "second.jsonl"))
    references.write_text(json.dumps({"images": images}))
    first.write_text(json.dumps([{"image_id": 100 + n, "caption": text} for n, text in enumerate(texts[:5])]))
    rows = [
        {"image": f"photos/p{n}.jpg", "caption": "a red kite", "neighbors": [{"caption": "A red kite ."}]}
        for n in range(5)
    ]
    second.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return references, first, second


TEST = SourceOptions(split="test")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_result_names_split_and_hashes(files):
    references, first, second = files
    result = score_files(first, references, options=TEST, judging=WORDS)
    assert result["predictions"] == {"path": str(first), "sha256": sha256(first)}
    named = result["references"]
    assert (named["sha256"], named["split"], named["photos"], named["captions"]) == (sha256(references), "test", 5, 10)
    assert result["images"] == 5 and result["unpredicted"] == result["unreferenced"] == 0
    assert result["metrics"]["BLEU-1"]["value"] == pytest.approx(1)
    result = score_files(second, references, options=TEST, judging=WORDS)
    assert result["metrics"]["copied-neighbor"]["value"] == 1
    json.dumps(result, allow_nan=False)


def test_missing_photos_stop_it_or_are_counted(files):
    references, first, _ = files
    with pytest.raises(InputError, match="1 photos have no caption: p5"):
        score_files(first, references, judging=WORDS)
    result = score_files(first, references, judging=JudgingConfig(java=False, allow_missing=True))
    assert (result["images"], result["unpredicted"], result["unreferenced"]) == (5, 1, 0)


def test_comparison_of_predictions_and_of_results(files, tmp_path):
    references, first, second = files
    result = compare_files(first, second, references, options=TEST, judging=WORDS)
    assert result["metrics"]["CIDEr"]["difference"]["low"] > 0
    assert (result["first"]["path"], result["second"]["path"]) == (str(first), str(second))
    stored = []
    for name, path in (("a", first), ("b", second)):
        stored.append(tmp_path / f"{name}-result.json")
        stored[-1].write_text(json.dumps(score_files(path, references, options=TEST, judging=WORDS)))
    assert compare_files(*stored, judging=WORDS) == result
    assert compare_files(stored[0], second, judging=WORDS) == result
    turned = compare_files(second, first, references, options=TEST, judging=WORDS)
    value = result["metrics"]["CIDEr"]["difference"]["value"]
    assert turned["metrics"]["CIDEr"]["difference"]["value"] == pytest.approx(-value)


def test_comparison_on_the_photos_that_both_have(files, tmp_path):
    references, first, second = files
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(second.read_text().splitlines(keepends=True)[1:3]))
    judging = JudgingConfig(java=False, allow_missing=True)
    result = compare_files(first, fewer, references, options=TEST, judging=judging)
    assert (result["images"], result["unpredicted"]) == (2, 3)
    with pytest.raises(InputError, match="3 photos have no caption"):
        compare_files(first, fewer, references, options=TEST, judging=WORDS)


def test_results_that_no_longer_fit_are_refused(files, tmp_path):
    references, first, second = files
    stored = tmp_path / "result.json"
    stored.write_text(json.dumps(score_files(first, references, options=TEST, judging=WORDS)))
    with pytest.raises(InputError, match="two files of predictions need REFERENCES"):
        compare_files(first, second, judging=WORDS)
    references.write_text(references.read_text() + " ")
    with pytest.raises(InputError, match=r"karpathy\.json has changed since"):
        compare_files(stored, second, judging=WORDS)
    first.unlink()
    with pytest.raises(InputError, match=r"first\.json, which is not there"):
        compare_files(stored, second, judging=WORDS)
    stored.write_text(json.dumps({"predictions": 3, "references": None, "metrics": {}}))
    with pytest.raises(InputError, match="does not name the files"):
        compare_files(stored, second, judging=WORDS)
    with pytest.raises(InputError, match=r"no file of predictions or results .*none\.json"):
        compare_files(tmp_path / "none.json", second, references, judging=WORDS)


def test_objects_and_copies_of_an_index(files, tmp_path, world):
    references, first, _ = files
    instances, synonyms = tmp_path / "instances.json", tmp_path / "synonyms.txt"
    images = [{"id": 100 + n, "file_name": f"p{n}.jpg"} for n in range(5)]
    categories = [{"id": n, "name": name} for n, name in enumerate(["kite", "boat", "feline"])]
    document = {"images": images, "annotations": [{"image_id": 100, "category_id": 0}], "categories": categories}
    instances.write_text(json.dumps(document))
    synonyms.write_text("feline, cat\n")
    judging = JudgingConfig(java=False, instances=str(instances), synonyms=str(synonyms))
    chosen = [{"image_id": 100 + n, "caption": "a cat flies a kite"} for n in range(5)]
    first.write_text(json.dumps(chosen))
    result = score_files(first, references, options=TEST, judging=judging, indexes=[str(world.index.path)])
    # the kite is in one photo, the cat in the references of another: in each photo something is not there
    assert result["metrics"]["CHAIR-s"]["value"] == 1
    assert result["metrics"]["CHAIR-i"]["value"] == pytest.approx(8 / 10)
    assert result["metrics"]["copied-index"]["value"] == 0
    instances.write_text(json.dumps(document | {"images": images[1:]}))
    with pytest.raises(InputError, match="does not list 1 of the photos: p0"):
        score_files(first, references, options=TEST, judging=judging)


def test_clip_scores_of_files(tmp_path, world):
    chosen = [
        {"image": name, "caption": texts[0]}
        for name, texts in zip(world.features.images, world.features.captions, strict=True)
    ]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    judging = JudgingConfig(java=False, clip=world.clip, photos=str(world.photos))
    cpu = {"device": "cpu", "dtype": "float32"}
    result = score_files(predictions, world.captions, judging=judging, captioner=str(world.run), **cpu)
    for metric in ("CLIPScore", "RefCLIPScore"):
        assert 0 <= result["metrics"][metric]["low"] <= result["metrics"][metric]["value"] <= 2.5
    assert result["clip_score"]["independent"] is False
