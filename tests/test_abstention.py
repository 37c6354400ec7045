"""Abstention: signals by hand, probabilities that come true, and files that do not fit are refused."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from clipcap_rag.abstention import Abstention, Logistic, circumstances, signals
from clipcap_rag.artifact import new_directory
from clipcap_rag.config import GenerationConfig, ModelConfig
from clipcap_rag.errors import InputError
from clipcap_rag.rerank import Candidate
from clipcap_rag.risk_coverage import reliability

D = 4
CHECKPOINT = SimpleNamespace(config=ModelConfig(clip_dim=D, lm_dim=32), training={"scores": {"CIDEr": 0.3}})


def candidate(embedding, log_probability=-6.0, tokens=(1, 2, 3)):
    embedding = np.array(embedding, np.float32)
    return Candidate("a dog", float(embedding[0]), log_probability, 0.0, tokens, embedding)


def test_signals_by_hand():
    image = np.array([1, 0, 0, 0], np.float32)
    background = np.array([[0.0, 1, 0, 0], [0.2, 0, 0, 1], [0.4, 0, 1, 0]], np.float32)
    candidates = [candidate([0.6, 0.8, 0, 0]), candidate([0.8, 0.6, 0, 0]), candidate([0, 0, 1, 0])]
    found = signals(image, candidates, np.array([0.3, 0.5], np.float32), background)
    spread = np.std([0, 0.2, 0.4])
    assert found == pytest.approx(
        {"agreement": 0.96 / 2, "nearness": 0.4, "similarity": (0.6 - 0.2) / spread, "log_probability": -2}, rel=1e-5
    )
    alone = signals(image, candidates[:1], np.empty(0), background)
    assert alone["agreement"] == 1.0 and "nearness" not in alone


def synthetic(count, seed):
    random = np.random.default_rng(seed)
    values = random.normal([5, -2, 0.3], [2, 1, 0.01], (count, 3))
    odds = 0.4 + 1.5 * (values[:, 0] - 5) / 2 - 0.8 * (values[:, 1] + 2)  # the third says nothing
    return values, random.random(count) < 1 / (1 + np.exp(-odds))


def test_probabilities_come_true_on_what_was_not_fitted():
    logistic = Logistic.fit(*synthetic(4000, 0))
    assert logistic.weights == pytest.approx([1.5, -0.8, 0], abs=0.12) and logistic.bias == pytest.approx(0.4, abs=0.12)
    values, good = synthetic(4000, 1)
    error, bins = reliability(logistic(values), good)
    assert error < 0.03
    assert [row["good"] for row in bins] == sorted(row["good"] for row in bins)
    rising = logistic(np.column_stack([np.linspace(-5, 15, 50), np.full(50, -2.0), np.full(50, 0.3)]))
    assert (np.diff(rising) > 0).all() and 0 < rising[0] < 0.01 and 0.99 < rising[-1] < 1
    again = Logistic.fit(*synthetic(4000, 0))
    assert again.weights.tolist() == logistic.weights.tolist()


def test_a_signal_that_never_varies_says_nothing():
    values, good = synthetic(300, 2)
    values[:, 2] = 1.0
    logistic = Logistic.fit(values, good)
    assert logistic.weights[2] == 0
    assert logistic(values + [0, 0, -0.5]) == pytest.approx(logistic(values))


def test_perfect_signals_give_finite_weights():
    logistic = Logistic.fit(np.arange(20.0)[:, None], np.arange(20) >= 10)
    assert np.isfinite(logistic.weights).all() and logistic(np.array([[0.0], [19.0]])) == pytest.approx([0, 1], abs=0.1)


@pytest.mark.parametrize("good, which", [(True, "all"), (False, "none")])
def test_captions_of_one_kind_teach_nothing(good, which):
    with pytest.raises(InputError, match=f"{which} of 5 captions"):
        Logistic.fit(np.ones((5, 1)), np.full(5, good))


@pytest.fixture
def abstention():
    logistic = Logistic(np.array([0.9, 0.5, -2.0]), np.array([0.1, 2.0, 0.5]), np.array([0.7, 1.2, 0.4]), 0.1)
    background = np.eye(D, dtype=np.float32)
    made_for = circumstances(CHECKPOINT, GenerationConfig(), 8)
    names = ("agreement", "similarity", "log_probability")
    return Abstention(names, logistic, background, 0.4, made_for, {"photos": 200})


@pytest.fixture
def folder(abstention, tmp_path):
    with new_directory(tmp_path / "calibration") as staging:
        abstention.write(staging)
    return tmp_path / "calibration"


def test_what_is_written_is_read(abstention, folder):
    opened = Abstention.open(folder)
    given = np.array([0.8, 0.6, 0, 0], np.float32), [candidate([0.6, 0.8, 0, 0])], np.array([0.7])
    assert opened.confidence(*given) == abstention.confidence(*given)
    assert (opened.level, opened.measured) == (0.4, {"photos": 200})
    sure = opened.confidence(*given).sure
    assert 0.1 < sure < 0.9
    for level, abstained in ((sure - 0.01, False), (sure + 0.01, True)):
        assert Abstention.open(f"{folder}:{level:.6f}").confidence(*given).abstained is abstained


def test_a_signal_that_is_missing_is_told(abstention):
    reads_index = dataclasses.replace(abstention, names=("agreement", "nearness", "similarity"))
    with pytest.raises(InputError, match="no neighbour"):
        reads_index.confidence(np.ones(D, np.float32), [candidate([1, 0, 0, 0])], np.empty(0))


def test_another_captioner_or_another_way_of_writing_is_refused(abstention):
    abstention.check(CHECKPOINT, GenerationConfig(seed=7), 8)
    with pytest.raises(InputError, match="decoding 'sample', here it is 'greedy'"):
        abstention.check(CHECKPOINT, GenerationConfig(decoding="greedy"), 8)
    with pytest.raises(InputError, match="num_neighbors 8, here it is 0"):
        abstention.check(CHECKPOINT, GenerationConfig(), 0)
    for other in ({"training": {}}, {"config": ModelConfig(clip_dim=D, lm_dim=64)}):
        with pytest.raises(InputError, match="another model"):
            abstention.check(SimpleNamespace(**(vars(CHECKPOINT) | other)), GenerationConfig(), 8)


@pytest.mark.parametrize(
    "change",
    [
        {"signals": {}},
        {"signals": {"agreement": {"mean": 0}}},
        {"signals": {"agreement": {"mean": "x", "scale": 1, "weight": 1}}},
        {"signals": {"agreement": {"mean": 0, "scale": 0, "weight": 1}}},
        {"signals": [1]},
        {"bias": None},
        {"level": float("nan")},
        {"made_for": {}},
        {"made_for": {"model": 3, "writing": {}}},
        {"measured": 3},
        {"kind": "checkpoint"},
        {"format_version": 99},
    ],
)
def test_damaged_files_are_one_sentence(folder, change):
    file = folder / "abstention.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as refused:
        Abstention.open(folder)
    assert "\n" not in str(refused.value)


def test_altered_missing_and_impossible(folder, tmp_path):
    for level in ("1.5", "-0.1", "nan"):
        with pytest.raises(InputError, match="from 0 to 1"):
            Abstention.open(f"{folder}:{level}")
    for missing in (tmp_path / "none", f"{folder}:high"):
        with pytest.raises(InputError, match="no calibration at"):
            Abstention.open(missing)
    (folder / "background.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="background.npy"):
        Abstention.open(folder)
