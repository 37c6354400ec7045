"""The parts of scripts/train_starter.py: phrases that make sense, tokens, crops, and rounds that survive a kill."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from transformers import AutoTokenizer

from clipcap_rag.index_store import open_files
from starter import phrases, rounds, texts, tokens, views

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> list[str]:
    return phrases.phrases()


def test_the_shipped_index_holds_the_phrases_that_the_script_makes(made):
    files = open_files(ROOT / "index" / "starter")
    assert files.captions(np.arange(files.rows)) == made
    assert files.live.all() and files.manifest["encoder"]["clip"] == "starter"


def test_there_are_enough_phrases_and_none_twice(made):
    assert len(made) >= 20_000
    assert len({re.sub(r"\W+", " ", phrase.lower()) for phrase in made}) == len(made)
    assert made == phrases.phrases()


def test_phrases_are_sentences_that_make_sense(made):
    for phrase in made:
        assert re.fullmatch(r"[A-Z][A-Za-z ,'-]+\.", phrase) and "  " not in phrase, phrase
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]|COLOUR|TOP|\b(\w+) \1\b", phrase), phrase
    together = "\n".join(made)
    for nonsense in ("boys? .*in an? \\w+ dress", "two .* is ", "swimming.* jeans", "ski.* shorts", "their its"):
        assert not re.search(nonsense, together), nonsense


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("two cats sleep .", "Two cats sleep."),
        ("a man 's hat is red , not blue", "A man's hat is red, not blue."),
        ('  The sign says " stop " !', "The sign says stop!"),
        ("Why ?", "Why?"),
    ],
)
def test_captions_are_tidied(raw, wanted):
    assert texts.tidy(raw) == wanted and texts.tidy(wanted) == wanted


def test_clip_and_language_model_share_their_tokens(tiny_captions, tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(line.capitalize() for line in tiny_captions))
    tokens.learn(tmp_path / "all.txt", tmp_path / "tokens")
    clip = HFTokenizer(str(tmp_path / "tokens/clip"), context_length=12)
    language_model = AutoTokenizer.from_pretrained(tmp_path / "tokens/language_model")
    upper, lower = clip(["A brown DOG rests", "a brown dog rests"]).tolist()
    assert upper == lower and upper[-1] == tokens.END_ID and language_model.eos_token_id == tokens.END_ID
    ids = language_model("a brown dog rests").input_ids
    assert upper[: len(ids) + 1] == [*ids, tokens.END_ID]
    assert language_model.decode(language_model("A brown dog").input_ids).strip() == "A brown dog"
    assert clip(["dog " * 50])[0, -1] == tokens.END_ID, "a text that is cut ends with the end token too"


def test_crops_are_the_same_each_time(tiny_clip, photo_folder, tmp_path):
    captions = tmp_path / "captions.jsonl"
    names = sorted(path.name for path in photo_folder.iterdir())
    captions.write_text("".join(json.dumps({"image": name, "captions": ["x"]}) + "\n" for name in names))
    for folder in ("one", "two"):
        views.make(captions, photo_folder, tiny_clip, 3, tmp_path / folder, torch.device("cpu"), workers=0)
    first, again, other = (np.load(tmp_path / path / "pixels.npy") for path in ("one/01", "two/01", "one/02"))
    assert first.shape == (len(names), 3, views.SIZE, views.SIZE)
    assert (first == again).all() and (first != other).any()
    answers = np.load(tmp_path / "one/01/answers.npy").astype(np.float32)
    assert np.allclose(np.linalg.norm(answers, axis=1), 1, atol=1e-2)


def _learn(folder: Path, kill_after: int | None = None) -> torch.Tensor:
    torch.manual_seed(5)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)

    def train_round(number: int) -> dict[str, float]:
        if number == kill_after:
            raise KeyboardInterrupt
        loss = layer(torch.randn(4, 3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    folder.mkdir(exist_ok=True)
    rounds.train_rounds(folder, {"layer": layer, "optimizer": optimizer}, 5, train_round)
    return layer.weight.detach()


def test_a_killed_training_continues_to_the_same_end(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _learn(tmp_path / "killed", kill_after=3)
    assert torch.equal(_learn(tmp_path / "killed"), _learn(tmp_path / "whole"))
    log = (tmp_path / "killed/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in log] == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "killed").glob("state*"))


def test_the_learning_rate_rises_and_falls():
    rates = [rounds.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[9] == rates[10] == 1 and rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[-1] < 0.001


def test_the_script_says_what_its_folder_lacks(tmp_path):
    script = [sys.executable, str(ROOT / "scripts/train_starter.py"), "--data", str(tmp_path)]
    done = subprocess.run([*script, "--work", str(tmp_path / "work")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "captions_train.jsonl" in done.stderr and not (tmp_path / "work").exists()
