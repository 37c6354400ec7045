"""Evaluation: every condition and decoding has its row, and its numbers come from the captions it wrote."""

import json

import pytest

from clipcap_rag.config import EvaluationConfig, GenerationConfig
from clipcap_rag.evaluation import evaluate, table
from clipcap_rag.metrics import caption_metrics


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    config = EvaluationConfig(decodings="greedy,sample", random_neighbors=True, rerank_sweep=True)
    generation = GenerationConfig(candidates=3, max_new_tokens=8)
    indexes = ["default", str(world.other_index.path)]
    return out, evaluate(world.run, world.features.path, out, indexes=indexes, generation=generation, config=config)


def test_all_conditions_are_there(result, world):
    out, found = result
    names = [world.index.name, world.other_index.name, "none", f"random of {world.index.name}"]
    written = {(row["neighbors"], row["decoding"]) for row in found["rows"] if "weight" not in row["decoding"]}
    expected = {(name, decoding) for name in names for decoding in ("greedy", "sample")}
    expected |= {(name, "nearest caption") for name in names[:2]}
    assert written == expected
    assert json.loads((out / "results.json").read_text()) == found
    assert all(f"\n{name}" in "\n" + table(found) for name in names)


def test_scores_are_those_of_the_predictions(result, world):
    out, found = result
    lines = [json.loads(line) for line in (out / "none-greedy.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == world.features.images
    expected = caption_metrics(world.features.captions, [line["caption"] or "" for line in lines])
    row = next(row for row in found["rows"] if (row["neighbors"], row["decoding"]) == ("none", "greedy"))
    assert {name: row[name] for name in expected} == expected


def test_own_captions_are_counted_and_never_retrieved(result, world):
    out, found = result
    assert found["excluded_rows"][world.index.name] == sum(map(len, world.features.captions))
    for line in (out / f"{world.index.name}-greedy.jsonl").read_text().splitlines():
        prediction = json.loads(line)
        own = prediction["image"].rpartition(".")[0]
        rows = [neighbor["row"] for neighbor in prediction["neighbors"]]
        assert own not in world.index.image_ids(rows)
