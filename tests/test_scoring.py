"""Scores in memory: every figure there, domains alone, differences paired, nothing left out in silence."""

import shutil

import numpy as np
import pytest

from clipcap_rag.bootstrap import mean
from clipcap_rag.errors import InputError
from clipcap_rag.metrics import caption_metrics
from clipcap_rag.ptb_tokens import PYTHON_TOKENIZER
from clipcap_rag.score_table import difference_table, score_table
from clipcap_rag.scoring import paired_difference, score

SUBJECTS = ["a brown dog", "two children", "an old man", "a red bicycle", "a grey cat", "three boats"]
ENDS = ["by the sea", "in the snow", "on a bridge", "under trees"]
REFERENCES = [[f"{subject} rests {end}", f"{subject} is {end}"] for subject in SUBJECTS for end in ENDS]
GOOD = [texts[0].capitalize() + "." for texts in REFERENCES]
POOR = [f"{subject} sleeps" for subject in SUBJECTS for _ in ENDS]
DOMAINS = ["in-domain"] * 8 + ["out-domain"] * 16


def test_values_are_those_of_caption_metrics_and_lie_in_their_intervals():
    result = score(REFERENCES, POOR)
    assert result["images"] == 24 and result["empty_captions"] == 0
    for name, value in caption_metrics(REFERENCES, POOR).items():
        figure = result["metrics"][name]
        assert figure["value"] == pytest.approx(value, rel=1e-12)
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert result == score(REFERENCES, POOR)


def test_perfect_captions_beat_empty_ones():
    perfect, empty = score(REFERENCES, GOOD), score(REFERENCES, [""] * 24)
    assert perfect["metrics"]["BLEU-4"]["value"] == pytest.approx(1, abs=1e-6)
    assert perfect["metrics"]["ROUGE-L"]["value"] == 1
    assert perfect["metrics"]["CIDEr"]["value"] > 5
    assert empty["empty_captions"] == 24
    assert all(empty["metrics"][name]["value"] < 1e-9 for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))


def test_what_is_left_out_is_named_with_its_reason(monkeypatch, tmp_path):
    result = score(REFERENCES, POOR)
    assert result["tokenizer"] == PYTHON_TOKENIZER and 0.99 < PYTHON_TOKENIZER["agreement"] < 1
    assert set(result["missing"]) == {"METEOR", "SPICE", "copied-neighbor"}
    assert set(score(REFERENCES, POOR, neighbors=[[]] * 24)["missing"]) == {"METEOR", "SPICE"}
    monkeypatch.setenv("PATH", str(tmp_path))
    result = score(REFERENCES, POOR, java=True)
    assert "no java on the PATH" in result["missing"]["METEOR"] and "no java" in result["missing"]["SPICE"]
    assert result["tokenizer"] == PYTHON_TOKENIZER


def test_a_java_that_fails_leaves_the_other_figures(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    result = score(REFERENCES, POOR, java=True)
    assert "failed with status 1" in result["missing"]["METEOR"] and "SPICE" in result["missing"]
    assert result["metrics"] == score(REFERENCES, POOR)["metrics"]


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_with_java_there_is_meteor():
    result = score(REFERENCES, GOOD, java=True, domains=DOMAINS)
    assert result["metrics"]["METEOR"]["value"] == pytest.approx(1)
    assert result["domains"]["in-domain"]["metrics"]["METEOR"]["value"] == pytest.approx(1)
    assert result["tokenizer"]["agreement"] == 1
    assert "in Java" in score_table(result)


def test_domains_are_scored_as_if_alone():
    mixed = POOR[:8] + GOOD[8:]
    result = score(REFERENCES, mixed, domains=DOMAINS, neighbors=[[caption] for caption in mixed])
    assert list(result["domains"]) == ["in-domain", "out-domain"]
    for name, part in (("in-domain", slice(0, 8)), ("out-domain", slice(8, 24))):
        alone = score(REFERENCES[part], mixed[part], neighbors=[[caption] for caption in mixed[part]])
        assert result["domains"][name]["images"] == alone["images"]
        for metric, figure in alone["metrics"].items():
            assert result["domains"][name]["metrics"][metric] == pytest.approx(figure)
    assert "domains" not in score(REFERENCES, mixed, domains=[None] * 24)
    assert set(score(REFERENCES, mixed, domains=["x", *[None] * 23])["domains"]) == {"x", "no domain"}


def test_further_judges_are_heard():
    def shouting(references, captions):
        return {"shouting": mean([caption.isupper() for caption in captions])}

    result = score(REFERENCES, ["WHAT"] * 12 + POOR[12:], judges=[shouting], domains=DOMAINS)
    assert result["metrics"]["shouting"]["value"] == 0.5
    assert result["domains"]["in-domain"]["metrics"]["shouting"]["value"] == 1


def test_paired_differences_are_those_of_the_scores_and_narrower_than_unpaired_ones():
    random = np.random.default_rng(0)
    mixed = [good if random.random() < 0.7 else poor for good, poor in zip(GOOD, POOR, strict=True)]
    near = [[caption] for caption in mixed]
    result = paired_difference(REFERENCES, mixed, POOR, neighbors=(near, near), domains=DOMAINS)
    ours, theirs = score(REFERENCES, mixed, neighbors=near), score(REFERENCES, POOR, neighbors=near)
    for name, figures in result["metrics"].items():
        assert figures["first"] == ours["metrics"][name] and figures["second"] == theirs["metrics"][name]
        value = ours["metrics"][name]["value"] - theirs["metrics"][name]["value"]
        assert figures["difference"]["value"] == pytest.approx(value)
    assert result["metrics"]["CIDEr"]["difference"]["low"] > 0
    assert set(result["domains"]) == {"in-domain", "out-domain"}
    same = paired_difference(REFERENCES, mixed, mixed)
    assert all(set(figures["difference"].values()) == {0} for figures in same["metrics"].values())
    assert "copied-neighbor" in same["missing"]


@pytest.mark.parametrize(
    "references, captions, named",
    [
        ([], [], "no photo"),
        ([["a"], []], ["a", "b"], "photo 1 has no list of references"),
        (["a dog"], ["a"], "photo 0 has no list"),
        ([["a"]], [], "0 captions for 1 photos"),
        ([["a"]], [None], "1 captions for 1 photos; give a text"),
    ],
)
def test_impossible_input_is_one_sentence(references, captions, named):
    with pytest.raises(InputError, match=named):
        score(references, captions)


def test_tables_hold_every_figure():
    near = [[]] * 24
    result = score(REFERENCES, POOR, domains=DOMAINS, neighbors=near)
    table = score_table(result)
    assert "in-domain" in table and "METEOR is missing: " in table
    cider = result["metrics"]["CIDEr"]
    expected = f"{100 * cider['value']:.1f} [{100 * cider['low']:.1f}, {100 * cider['high']:.1f}]"
    assert any(line.startswith("CIDEr") and expected in line for line in table.splitlines())
    difference = difference_table(paired_difference(REFERENCES, GOOD, POOR, domains=DOMAINS))
    assert all(f"\n{name}" in difference for name in ("CIDEr", "vocabulary", "in-domain, 8 photos"))
