"""Evaluation: every condition, decoding and study has its rows, and its numbers come from the captions it wrote."""

import json

import numpy as np
import pytest

from clipcap_rag.config import EvaluationConfig, GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.evaluation import evaluate
from clipcap_rag.evaluation_table import table
from clipcap_rag.metrics import caption_metrics

SHORT = GenerationConfig(candidates=3, max_new_tokens=8)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    config = EvaluationConfig(decodings="greedy,sample", random_neighbors=True, rerank_sweep=True)
    settings = {"indexes": ["default", str(world.other_index.path)], "baselines": {"rival": world.run}}
    found = evaluate(world.run, [world.features.path], out, generation=SHORT, config=config, **settings)
    return out, found


def row_of(found, neighbors, decoding):
    (row,) = [row for row in found["rows"] if (row["neighbors"], row["decoding"]) == (neighbors, decoding)]
    return row


def test_all_conditions_are_there(result, world):
    out, found = result
    names = [world.index.name, world.other_index.name, "none", f"random of {world.index.name}", "rival"]
    written = [(row["neighbors"], row["decoding"]) for row in found["rows"] if ", " not in row["decoding"]]
    expected = {(name, decoding) for name in names for decoding in ("greedy", "sample")}
    expected |= {(name, f"{which} caption") for name in names[:2] for which in ("nearest", "consensus")}
    assert sorted(written) == sorted(expected)
    assert json.loads((out / "results.json").read_text()) == found
    assert all(f"\n{name}" in table(found) for name in names)


def test_all_indexes_at_once(world, tmp_path):
    config = EvaluationConfig(decodings="greedy", together=True)
    indexes = [str(world.index.path), str(world.other_index.path)]
    found = evaluate(world.run, [world.features.path], tmp_path, indexes=indexes, generation=SHORT, config=config)
    names = [world.index.name, world.other_index.name]
    row = row_of(found, " + ".join(names), "greedy")
    sources = {neighbor["index"] for line in read(tmp_path / row["predictions"]) for neighbor in line["neighbors"]}
    assert sources == set(names)
    own_rows = found["features"][0]["excluded_rows"]
    assert own_rows[" + ".join(names)] == sum(own_rows[name] for name in names) > 0


def test_scores_are_those_of_the_predictions(result, world):
    out, found = result
    for neighbors in ("none", world.index.name):
        row = row_of(found, neighbors, "greedy")
        lines = read(out / row["predictions"])
        assert [line["image"] for line in lines] == world.features.images
        expected = caption_metrics(world.features.captions, [line["caption"] or "" for line in lines])
        assert {name: row["metrics"][name]["value"] for name in ("CIDEr", "BLEU-4")} == {
            name: pytest.approx(expected[name], abs=1e-9) for name in ("CIDEr", "BLEU-4")
        }
        assert row["seconds_per_image"] > 0


def test_a_weight_of_the_sweep_is_the_order_that_this_weight_gives(result, world, tmp_path):
    _, found = result
    weighted = GenerationConfig(candidates=3, max_new_tokens=8, log_probability_weight=0.0)
    config = EvaluationConfig(decodings="sample")
    again = evaluate(world.run, [world.features.path], tmp_path, generation=weighted, config=config)
    swept = row_of(found, world.index.name, "sample, weight 0")
    assert row_of(again, world.index.name, "sample")["metrics"] == swept["metrics"]


def test_own_captions_are_counted_and_never_retrieved(result, world):
    out, found = result
    own_rows = found["features"][0]["excluded_rows"]
    assert own_rows == {world.index.name: sum(map(len, world.features.captions)), world.other_index.name: 0}
    for neighbors in (world.index.name, f"random of {world.index.name}"):
        for line in read(out / row_of(found, neighbors, "greedy")["predictions"]):
            own = line["image"].rpartition(".")[0]
            rows = [neighbor["row"] for neighbor in line["neighbors"]]
            assert rows and own not in world.index.image_ids(rows)


def test_the_rival_sees_no_neighbours(result):
    out, found = result
    assert row_of(found, "rival", "greedy")["metrics"] == row_of(found, "none", "greedy")["metrics"]
    assert not any(line["neighbors"] for line in read(out / row_of(found, "rival", "greedy")["predictions"]))


def test_feature_sets_and_indexes_make_a_matrix(world, tmp_path):
    other = tmp_path / "elsewhere" / "features"
    other.parent.mkdir()
    other.symlink_to(world.features.path)
    with pytest.raises(InputError, match="given twice"):
        evaluate(world.run, [world.features.path, other], tmp_path / "out")
    other.unlink()
    from clipcap_rag.features import extract_features

    extract_features([world.captions], world.photos, world.clip, other, workers=0, device="cpu", dtype="float32")
    config = EvaluationConfig(decodings="greedy", images=3)
    found = evaluate(
        world.run, [world.features.path, other], tmp_path / "out", indexes=["default", str(world.other_index.path)],
        generation=SHORT, config=config,
    )  # fmt: skip
    names = [features["name"] for features in found["features"]]
    assert len(set(names)) == 2 and all(name.endswith("features") for name in names)
    shown = table(found)
    line = next(line for line in shown.splitlines() if line.startswith("none "))
    assert all(name in shown for name in names) and line.count(" / ") == 2
    assert {row["photos"] for row in found["rows"]} == {3}


def test_robustness_has_its_rows_and_effects(world, tmp_path):
    config = EvaluationConfig(studies="robustness", decodings="greedy")
    found = evaluate(world.run, [world.features.path], tmp_path, generation=SHORT, config=config)
    name, k = world.index.name, found["num_neighbors"]
    cider = {row["neighbors"]: row["metrics"]["CIDEr"]["value"] for row in found["rows"]}
    shown = {row["neighbors"]: row["shown"] for row in found["rows"]}
    assert shown["none"] == 0 and shown[f"nearest 2 of {name}"] == 2 and shown[f"random of {name}"] == k
    effects = {effect["effect"]: effect for effect in found["effects"]}
    benefit, harm = cider[f"nearest {k} of {name}"] - cider["none"], cider["none"] - cider[f"random of {name}"]
    assert effects["benefit"]["value"] == pytest.approx(benefit)
    assert effects["harm"]["value"] == pytest.approx(harm)
    assert all(effect["low"] <= effect["value"] <= effect["high"] for effect in found["effects"])
    assert "benefit, greedy" in table(found) and f"wrong majority of {name}" in table(found)


def test_leaks_are_found_and_scored(world, tmp_path):
    config = EvaluationConfig(studies="leaks", decodings="greedy", images=4)
    indexes = ["default", str(world.other_index.path)]
    settings = {"indexes": indexes, "num_neighbors": len(world.index), "generation": SHORT, "config": config}
    found = evaluate(world.run, [world.features.path], tmp_path, **settings)
    own, other = found["leaks"]
    assert own["ids"] == {"photos": 4, "captions": 16} and own["leaking"] == world.features.images[:4]
    assert other["leaking"] == [] and other["doubles"] is None
    rows = {row["neighbors"]: row for row in found["rows"]}
    for name, own_photos in (("leaks retrieved", True), ("leaking captions left out", False)):
        for line in read(tmp_path / rows[f"{world.index.name}, {name}"]["predictions"]):
            ids = set(world.index.image_ids([found["row"] for found in line["neighbors"]]))
            assert ids >= set(world.features.image_ids[4:])
            assert (line["image"].rpartition(".")[0] in ids) is own_photos
            assert bool(ids & set(world.features.image_ids[:4])) is own_photos
    assert f"none, leaking photos of {world.index.name} left out" not in rows  # none is left
    unleaked = rows[f"{world.other_index.name}, leaking photos of {world.other_index.name} left out"]
    assert unleaked["metrics"] == rows[f"{world.other_index.name}, leaks retrieved"]["metrics"]
    assert "16 captions with the same image id" in table(found)


def test_what_is_finished_is_not_written_again(world, tmp_path):
    given = {"generation": SHORT, "config": EvaluationConfig(decodings="greedy")}
    found = evaluate(world.run, [world.features.path], tmp_path, **given)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    gone = tmp_path / row_of(found, "none", "greedy")["predictions"]
    gone.unlink()
    (tmp_path / "results.json").unlink()
    again = evaluate(world.run, [world.features.path], tmp_path, **given)
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in found["rows"]]
    written = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert len(times) == 4 and written == {gone}
    evaluate(
        world.run, [world.features.path], tmp_path, generation=SHORT.replaced(max_new_tokens=3), config=given["config"]
    )
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert len(changed) == 2  # the baselines have nothing to do with these settings


def test_two_conditions_of_one_name_have_a_file_each(world, tmp_path):
    config = EvaluationConfig(studies="table,leaks", decodings="greedy")
    given = {"num_neighbors": 12, "generation": SHORT, "config": config}
    found = evaluate(world.run, [world.features.path], tmp_path, **given)
    for row in found["rows"]:
        shown = sum(len(line["neighbors"]) for line in read(tmp_path / row["predictions"]))
        assert shown / row["photos"] == row["shown"]
    with pytest.raises(InputError, match="row none already"):
        evaluate(world.run, [world.features.path], tmp_path, baselines={"none": world.run}, **given)


def test_a_study_without_what_it_needs(world, tmp_path):
    with pytest.raises(InputError, match="no study 'robust'"):
        EvaluationConfig(studies="robust")
    with pytest.raises(InputError, match="numbers from 1"):
        EvaluationConfig(candidate_sizes="4,0")
    config = EvaluationConfig(studies="robustness", decodings="greedy")
    with pytest.raises(InputError, match="pass --index"):
        evaluate(world.run, [world.features.path], tmp_path, indexes=[], generation=SHORT, config=config)


def test_the_same_seed_gives_the_same_result(world, tmp_path):
    config = EvaluationConfig(studies="robustness,table", decodings="sample", random_neighbors=True)
    first, second = (
        evaluate(world.run, [world.features.path], tmp_path / name, generation=SHORT, config=config) for name in "ab"
    )
    for one, other in zip(first["rows"], second["rows"], strict=True):
        assert one["metrics"] == other["metrics"]
    assert first["effects"] == second["effects"]
    assert not np.isnan([effect["value"] for effect in first["effects"]]).any()
