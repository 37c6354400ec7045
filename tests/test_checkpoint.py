"""Checkpoints: what is written comes back, what does not fit is refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipcap_rag.artifact import new_directory, write_manifest
from clipcap_rag.checkpoint import Checkpoint, read_checkpoint
from clipcap_rag.config import ModelConfig
from clipcap_rag.errors import InputError
from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune

D = 8


@pytest.fixture(params=["full", "layers", "lora", "frozen"])
def saved(request, tiny_lm, tmp_path):
    torch.manual_seed(0)
    language_model, tokenizer = load_language_model(str(tiny_lm))
    config = ModelConfig(
        clip_dim=D,
        lm_dim=language_model.config.n_embd,
        mapper_layers=1,
        mapper_heads=2,
        language_model_tuning=request.param,
    )
    model = CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint = Checkpoint(model, tokenizer, config, {"clip": "none", "dim": D}, str(tiny_lm))
    with new_directory(tmp_path / "model") as folder:
        checkpoint.write(folder)
    return checkpoint, tmp_path / "model"


def test_the_same_logits_come_back(saved):
    checkpoint, folder = saved
    opened = read_checkpoint(folder)
    tokens, image = torch.tensor([[1, 2, 3]]), torch.randn(1, D)
    neighbors = (torch.randn(1, 2, D), torch.rand(1, 2), torch.ones(1, 2, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(
            opened.model(tokens, image, *neighbors), checkpoint.model(tokens, image, *neighbors), atol=1e-5, rtol=0
        )
    assert opened.config == checkpoint.config
    assert opened.tokenizer.decode(opened.tokenizer("a red kite")["input_ids"]) == "a red kite"


def test_a_checkpoint_of_an_older_release_opens(saved):
    checkpoint, folder = saved
    manifest = json.loads((folder / "config.json").read_text())
    for name in ("kind", "format_version", "files"):
        del manifest[name]
    del manifest["text_neighbors"], manifest["model"]["mapper_dropout"]
    write_manifest(folder, "config.json", "checkpoint", 1, manifest)
    opened = read_checkpoint(folder)
    assert opened.text_neighbors == 0 and opened.config == checkpoint.config


def test_frozen_language_models_are_not_stored(saved):
    checkpoint, folder = saved
    stored = [name for name in load_file(folder / "model.safetensors") if name.startswith("language_model.")]
    tuning = checkpoint.config.language_model_tuning
    assert bool(stored) == (tuning != "frozen")
    assert all("lora_" in name for name in stored) == (tuning not in ("full", "layers")) or not stored


def rewrite(folder, change):
    """Changes the weights and signs the manifest anew, as a tool that edits checkpoints would."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    manifest = json.loads((folder / "config.json").read_text())
    fields = {key: value for key, value in manifest.items() if key not in ("kind", "format_version", "files")}
    write_manifest(folder, "config.json", manifest["kind"], manifest["format_version"], fields)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("mapper.prefix_const"), "missing keys mapper.prefix_const"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown keys extra"),
        (lambda state: state.update({"mapper.prefix_const": torch.zeros(1, 1)}), "has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(saved, change, sentence):
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(InputError, match=sentence):
        read_checkpoint(folder)


def test_altered_and_missing_files_are_refused(saved):
    _, folder = saved
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="altered"):
        read_checkpoint(folder)
    weights.unlink()
    with pytest.raises(InputError, match="lacks its file model.safetensors"):
        read_checkpoint(folder)


def test_the_words_of_the_training_captions_are_kept(saved, tmp_path):
    checkpoint, folder = saved
    assert read_checkpoint(folder).words == frozenset()  # as in checkpoints of older releases
    words = frozenset({"dog", "anna's", "über"})
    with new_directory(tmp_path / "made") as staging:
        dataclasses.replace(checkpoint, words=words).write(staging)
    assert read_checkpoint(tmp_path / "made").words == words
