"""Training: interrupted and killed runs end where an uninterrupted one ends; contradictions are refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from clipcap_rag.checkpoint import read_checkpoint
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.training import train

SMALL = ModelConfig(mapper_layers=1, mapper_heads=2, prefix_length=3, clip_length=2)
QUICK = {
    "epochs": 3,
    "batch_size": 4,
    "neighbor_pool": 6,
    "max_neighbors": 3,
    "validation_fraction": 0.3,
    "patience": 0,
    "text_neighbors": 2,
}

PROGRAM = """
import sys, time
import clipcap_rag.training as training
from clipcap_rag.config import ModelConfig, TrainConfig
training._SAVE_SECONDS = 0.0
step = training._Run._train_step
def slow(self, batch):
    time.sleep(0.1)
    print("step", self.step, flush=True)
    return step(self, batch)
training._Run._train_step = slow
configs = {"model_config": ModelConfig(**{model}), "train_config": TrainConfig(**{train})}
training.train(*sys.argv[1:5], device="cpu", dtype="float32", **configs)
"""


def run(world, tiny_lm, out, config=None, **settings):
    return train(
        world.features.path,
        world.index.path,
        str(tiny_lm),
        out,
        model_config=SMALL,
        train_config=TrainConfig(**(QUICK | (config or {}))),
        device="cpu",
        dtype="float32",
        **settings,
    )


@pytest.fixture(scope="module")
def uninterrupted(world, tiny_lm, tmp_path_factory):
    return run(world, tiny_lm, tmp_path_factory.mktemp("runs") / "whole")


def same_weights(first, second):
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_bit_for_bit(world, tiny_lm, uninterrupted, tmp_path, number):
    out = tmp_path / "run"
    program = PROGRAM.replace("{model}", repr(SMALL.to_json())).replace("{train}", repr(QUICK))
    arguments = [str(world.features.path), str(world.index.path), str(tiny_lm), str(out)]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not process.stdout.readline().startswith("step 7"):
        pass
    time.sleep(0.05)
    os.kill(process.pid, number)
    process.wait()
    assert process.returncode != 0
    assert json.loads((out / "run.json").read_text())["finished"] is False
    assert (out / "last" / "training.pt").is_file()
    run(world, tiny_lm, out)
    assert same_weights(out / "last", uninterrupted / "last")
    assert same_weights(out / "best", uninterrupted / "best")
    assert (out / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()


def test_a_run_leaves_what_it_promises(uninterrupted):
    log = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = read_checkpoint(uninterrupted / "best")
    assert best.training["scores"]["CIDEr"] == max(entry["CIDEr"] for entry in log)
    assert (best.num_neighbors, best.mapper_neighbors, best.index["revision"]) == (100, 3, 1)
    assert {"a", "dog"} < best.words and not any(word != word.casefold() for word in best.words)
    assert "training.pt" not in {path.name for path in (uninterrupted / "best").iterdir()}


def test_the_seed_decides(world, tiny_lm, uninterrupted, tmp_path):
    again = run(world, tiny_lm, tmp_path / "again")
    other = run(world, tiny_lm, tmp_path / "other", {"seed": 1})
    assert same_weights(again / "last", uninterrupted / "last")
    assert not same_weights(other / "last", uninterrupted / "last")


def test_a_finished_run_is_not_replaced_unless_asked(world, tiny_lm, tmp_path):
    out = run(world, tiny_lm, tmp_path / "run", {"epochs": 1})
    with pytest.raises(InputError, match="--overwrite"):
        run(world, tiny_lm, out, {"epochs": 1})
    run(world, tiny_lm, out, {"epochs": 2}, overwrite=True)
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_an_unfinished_run_with_other_settings_is_not_continued(world, tiny_lm, tmp_path):
    out = run(world, tiny_lm, tmp_path / "run", {"epochs": 1})
    job = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(job | {"finished": False}))
    with pytest.raises(InputError, match=r"learning_rate: 0.0002 -> 0.1"):
        run(world, tiny_lm, out, {"epochs": 1, "learning_rate": 0.1})


def test_contradictions_are_refused(world, tiny_lm, tmp_path):
    def attempt(index, mapper, **config):
        train(
            world.features.path,
            index,
            str(tiny_lm),
            tmp_path / "run",
            model_config=ModelConfig(mapper=mapper, mapper_heads=2),
            train_config=TrainConfig(**config),
        )

    with pytest.raises(InputError, match="needs an index"):
        attempt(None, "retrieval")
    with pytest.raises(InputError, match="looks at no neighbours"):
        attempt(world.index.path, "mlp")
    with pytest.raises(InputError, match="positions"):
        attempt(None, "mlp", max_caption_tokens=10_000)
    with pytest.raises(InputError, match="to validate on"):
        attempt(None, "mlp", validation_fraction=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_training_without_retrieval(world, tiny_lm, tmp_path, mapper):
    out = train(
        world.features.path,
        None,
        str(tiny_lm),
        tmp_path / "run",
        model_config=ModelConfig(
            mapper=mapper, mapper_layers=1, mapper_heads=2, language_model_tuning="frozen", prefix_length=2
        ),
        train_config=TrainConfig(epochs=1, batch_size=8, validation_fraction=0.3),
    )
    assert read_checkpoint(out / "best").index is None


def test_training_with_lora_moves_the_language_model_and_stores_only_that(world, tiny_lm, tmp_path):
    out = train(
        world.features.path,
        world.index.path,
        str(tiny_lm),
        tmp_path / "run",
        model_config=dataclasses.replace(SMALL, language_model_tuning="lora", lora_rank=2),
        train_config=TrainConfig(**(QUICK | {"epochs": 1, "accumulate": 2, "schedule": "linear"})),
        device="cpu",
        dtype="float32",
    )
    stored = load_file(out / "best" / "model.safetensors")
    assert any(tensor.any() for name, tensor in stored.items() if "lora_B" in name)  # they start at zero
    assert not any("wte" in name or "c_attn.base_layer" in name for name in stored)
    assert read_checkpoint(out / "best").config.lora_rank == 2


def test_accumulation_takes_one_step_for_several_batches(world, tiny_lm, tmp_path, monkeypatch):
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (taken.append(1), step(self, *rest))[1])
    out = run(world, tiny_lm, tmp_path / "run", {"epochs": 1, "accumulate": 2})
    batches = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert len(taken) == -(-batches // 2)


def test_a_warm_up_longer_than_the_training_is_told(world, tiny_lm, tmp_path, capsys):
    run(world, tiny_lm, tmp_path / "long", {"epochs": 1, "warmup": 5000})
    run(world, tiny_lm, tmp_path / "short", {"epochs": 1, "warmup": 2})
    told = [line for line in capsys.readouterr().err.splitlines() if "warm-up" in line]
    assert len(told) == 1 and "the warm-up of 5000 batches is longer than the" in told[0] and "--warmup" in told[0]


def test_early_stopping(world, tiny_lm, tmp_path):
    config = {"epochs": 30, "patience": 2, "learning_rate": 1e-12, "lm_learning_rate": 1e-12}
    out = run(world, tiny_lm, tmp_path / "run", config)
    assert len((out / "log.jsonl").read_text().splitlines()) < 30
