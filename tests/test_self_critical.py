"""Training on rewards: what is rewarded, what becomes likelier, and a stage that ends a training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from clipcap_rag import training
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.generation import Written
from clipcap_rag.mapper import MLPMapper
from clipcap_rag.model import CaptionModel, load_language_model
from clipcap_rag.self_critical import CaptionReward, self_critical_loss
from clipcap_rag.token_bonus import TokenBonus
from clipcap_rag.training import train
from clipcap_rag.weight_average import WeightAverage

REFERENCES = [
    ["a red kite over the sea", "a kite flies at the sea"],
    ["two dogs in the snow", "dogs play in the deep snow"],
    ["a man with an old bicycle", "an old man and a bicycle"],
]


def test_a_caption_is_rewarded_for_what_its_own_references_say():
    reward = CaptionReward(REFERENCES)
    copied, alike, foreign, empty = reward.rewards(0, [REFERENCES[0][0], "a red kite", "two dogs in the snow", ""])
    assert copied > alike > foreign and empty == 0.0
    assert reward.rewards(1, ["two dogs in the snow"])[0] > 3 * foreign


def test_stopping_early_does_not_pay():
    reward = CaptionReward(REFERENCES)
    whole, cut = reward.rewards(0, ["a red kite over the sea", "a red kite over the"])
    assert whole > cut


@pytest.mark.parametrize("raised", [False, True])
def test_the_better_sample_becomes_likelier_and_the_greedy_caption_stays_out(tiny_lm, raised):
    network, tokenizer = load_language_model(str(tiny_lm))
    torch.manual_seed(0)
    model = CaptionModel(MLPMapper(6, network.config.n_embd, 2), network, tokenizer.eos_token_id).eval()
    captions = [[[3, 4], [5, 6, 7], [8]]]
    written = [[Written("", (*tokens, tokenizer.eos_token_id), 0.0) for tokens in listed] for listed in captions]
    inputs, context = (torch.randn(1, 6),), torch.zeros(1, 0, dtype=torch.long)
    bonus = TokenBonus.of([{tuple(tokenizer.encode(" sea")[:1]): 1.0}]) if raised else None

    def likelihoods():
        return [
            -self_critical_loss(model, [[one[0], one[0], other]], [[0.0, 1.0, 1.0]], inputs, context, bonus)[0].item()
            for one, other in ((written[0], written[0][1]), (written[0], written[0][2]))
        ]

    before = likelihoods()
    loss, count = self_critical_loss(model, written, [[0.5, 1.0, 0.0]], inputs, context, bonus)
    assert count == 6  # tokens of the two samples, with their ends
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    after = likelihoods()
    assert after[0] - before[0] > after[1] - before[1]


def test_equal_rewards_teach_nothing(tiny_lm):
    network, tokenizer = load_language_model(str(tiny_lm))
    model = CaptionModel(MLPMapper(6, network.config.n_embd, 2), network, tokenizer.eos_token_id).eval()
    written = [[Written("", (token, tokenizer.eos_token_id), 0.0) for token in (3, 4, 5)]]
    loss, _ = self_critical_loss(
        model, written, [[2.0, 2.0, 2.0]], (torch.randn(1, 6),), torch.zeros(1, 0, dtype=torch.long), None
    )
    assert loss.item() == 0.0


@pytest.fixture
def job(world, tiny_lm):
    """What `train` takes, with two neighbours for the mapper and the words of four."""
    config = {"epochs": 1, "max_neighbors": 2, "num_neighbors": 4, "max_caption_tokens": 12, "patience": 0}
    return {
        "features": world.features.path,
        "index": world.index.path,
        "language_model": str(tiny_lm),
        "model_config": ModelConfig(mapper_layers=1, mapper_heads=2, prefix_length=2, clip_length=2),
        "train_config": TrainConfig(validation_fraction=0.3, **config),
        "device": "cpu",
        "dtype": "float32",
    }


def test_a_training_of_three_stages(world, job, tmp_path):
    config = job["train_config"].replaced(batch_size=8)
    job["train_config"] = config.replaced(reward_epochs=1)
    out = train(**job, out=tmp_path / "run", text_index=world.other_index.path)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == ["text", "photos", "reward"]
    assert "train_reward" in log[-1] and "train_loss" in log[0]
    further = train(**job | {"language_model": None, "train_config": config}, out=tmp_path / "further", start=out)
    (entry,) = (json.loads(line) for line in (further / "log.jsonl").read_text().splitlines())
    assert entry["validation_loss"] < log[0]["validation_loss"]


def test_a_stage_of_rewards_continues_bit_for_bit(job, tmp_path, monkeypatch):
    job["train_config"] = job["train_config"].replaced(batch_size=2, reward_epochs=2)
    whole = train(**job, out=tmp_path / "whole")

    learn, killed = training._Run._train_step, tmp_path / "killed"

    def stop_in_the_last_stage(run, loss):
        if run.stage.name == "reward" and run.step == 2:
            raise MemoryError
        learn(run, loss)

    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_train_step", stop_in_the_last_stage)
        with pytest.raises(MemoryError):
            train(**job, out=killed)
    train(**job, out=killed)
    for which in ("last", "best"):
        one, other = (load_file(out / which / "model.safetensors") for out in (whole, killed))
        assert all(torch.equal(one[name], other[name]) for name in one), which


def test_the_best_of_a_stage_of_rewards_is_the_mean_of_its_weights(job, tmp_path, monkeypatch):
    steps, add = [], WeightAverage.add

    def watched(average, model):
        steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        add(average, model)

    start = train(**job, out=tmp_path / "start")
    monkeypatch.setattr(WeightAverage, "add", watched)
    job |= {"language_model": None, "start": start / "last"}
    job["train_config"] = job["train_config"].replaced(epochs=0, reward_epochs=1, batch_size=1)
    out = train(**job, out=tmp_path / "out")
    before, best, last = (
        load_file(folder / "model.safetensors") for folder in (start / "last", out / "best", out / "last")
    )
    assert len(steps) > 1
    for name in steps[0].keys() & best.keys():
        mean = torch.stack([before[name], *(step[name] for step in steps)]).mean(0)
        assert torch.allclose(best[name], mean, atol=1e-6), name
        assert torch.equal(last[name], steps[-1][name])
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_a_training_of_nothing_is_refused(job, tmp_path):
    job["train_config"] = TrainConfig(epochs=0, validation_fraction=0.3)
    with pytest.raises(InputError, match="epochs is 0"):
        train(**job, out=tmp_path / "x")
    with pytest.raises(InputError, match="--start"):
        train(**job | {"language_model": None}, out=tmp_path / "x")
