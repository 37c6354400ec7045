"""The decoding study: a set cut from more samples is what asking for so few gives, whoever orders it."""

import json

import pytest

from clipcap_rag.config import EvaluationConfig, GenerationConfig
from clipcap_rag.decoding_study import SCORERS
from clipcap_rag.evaluation import evaluate

SIZES = (2, 4, 9)


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoding")
    config = EvaluationConfig(studies="decoding", candidate_sizes=",".join(map(str, SIZES)))
    generation = GenerationConfig(max_new_tokens=8, temperature=1.5, top_p=1.0)
    found = evaluate(world.run, [world.features.path], out, generation=generation, config=config)
    return out, {row["decoding"]: row for row in found["rows"]}, generation


def lines(out, row):
    return [json.loads(line) for line in (out / row["predictions"]).read_text().splitlines()]


def texts(line):
    return [found["caption"] for found in line["candidates"]]


def test_all_decodings_are_there_with_their_times(study):
    _, rows, _ = study
    expected = {"greedy", "beam 2", "beam 3", "beam 4", "beam 5"}
    assert set(rows) == expected | {f"{size} by {scorer}" for size in SIZES for scorer in SCORERS}
    assert all(row["seconds_per_image"] > 0 for row in rows.values())
    for size in SIZES:
        assert rows[f"{size} by log-probability"]["seconds_per_image"] < rows[f"{size} by CLIP"]["seconds_per_image"]


def test_a_cut_set_is_what_so_few_samples_give(study, world, tmp_path):
    out, rows, generation = study
    for size in SIZES:
        settings = generation.replaced(candidates=size, num_beams=1)
        config = EvaluationConfig(decodings="sample", images=0)
        found = evaluate(world.run, [world.features.path], tmp_path / str(size), generation=settings, config=config)
        row = next(row for row in found["rows"] if row["decoding"] == "sample" and row["neighbors"] != "none")
        for one, other in zip(lines(tmp_path / str(size), row), lines(out, rows[f"{size} by both"]), strict=True):
            assert one["caption"] == other["caption"]
            assert texts(one) == texts(other)


def test_scorers_choose_by_what_their_names_say(study):
    out, rows, _ = study
    for line in lines(out, rows["9 by CLIP"]):
        assert line["caption"] == max(line["candidates"], key=lambda one: one["clip_similarity"])["caption"]
    for line in lines(out, rows["9 by log-probability"]):
        best = max(line["candidates"], key=lambda one: one["log_probability"] / len(one["tokens"]))
        assert line["caption"] == best["caption"]
    assert any(
        one["caption"] != other["caption"]
        for one, other in zip(lines(out, rows["9 by CLIP"]), lines(out, rows["9 by log-probability"]), strict=True)
    )


def test_more_samples_keep_the_first_ones(study):
    out, rows, _ = study
    few, many = (lines(out, rows[f"{size} by both"]) for size in (2, 9))
    for one, other in zip(few, many, strict=True):
        assert set(texts(one)) <= set(texts(other))
