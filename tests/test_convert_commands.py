"""The command that converts weights: what it prints, what its captioner says, how it refuses."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from clipcap_rag import cli
from clipcap_rag.captioner import Captioner


@pytest.fixture
def weights(tiny_lm, tmp_path):
    """A file as ClipCap's training writes it: the language model of tiny_lm, an MLP from 24 to 3 x 32."""
    state = {f"gpt.{name}": tensor for name, tensor in GPT2LMHeadModel.from_pretrained(tiny_lm).state_dict().items()}
    mapper = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.Tanh(), torch.nn.Linear(48, 96))
    state |= {f"clip_project.model.{name}": tensor for name, tensor in mapper.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def arguments(weights, out, *more):
    return ["convert", "clipcap", str(weights), "--out", str(out), "--device", "cpu", "--dtype", "float32", *more]


def test_weights_become_a_captioner_that_captions_photos(weights, world, tiny_lm, capsys, tmp_path):
    out = tmp_path / "captioner"
    more = ("--clip", world.clip, "--no-normalize", "--language-model", str(tiny_lm), "--stop-token", "e")
    assert cli.main(arguments(weights, out, *more)) == 0
    printed = capsys.readouterr().out
    assert "mlp mapper" in printed and "24 wide, raw" in printed and f"--model {out} --decoding clipcap" in printed
    config = Captioner.from_pretrained(out).checkpoint.config
    assert (config.mapper, config.prefix_length, config.normalize) == ("mlp", 3, False)
    photo = str(world.photos / "photo-0.jpg")
    assert cli.main(["caption", photo, "--model", str(out), "--decoding", "clipcap", "--num-beams", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{photo}: ")
    assert cli.main(arguments(weights, out, *more)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(arguments(weights, out, *more, "--overwrite")) == 0


def test_what_the_file_does_not_tell_is_asked_in_one_sentence(weights, capsys, tmp_path):
    assert cli.main(arguments(weights, tmp_path / "captioner")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(flag in error for flag in ("--clip", "24 wide", "--normalize or --no-normalize", "--language-model"))
    assert not (tmp_path / "captioner").exists()
