"""Feature sets as ClipCap reads them, and there and back."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from clipcap_rag import cli
from clipcap_rag.clipcap_features import import_pickle
from clipcap_rag.clipcap_pickle import export_pickle
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet, extract_features


def test_a_consumer_finds_what_it_looks_for(world, tmp_path):
    out = tmp_path / "new" / "data.pkl"
    assert export_pickle(world.features.path, out) == [out]
    with open(out, "rb") as file:
        data = pickle.load(file)
    assert list(data) == ["clip_embedding", "captions"]
    embeddings, captions = data["clip_embedding"], data["captions"]
    assert embeddings.dtype is torch.float16 and embeddings.shape == (8, 24)
    assert [caption["id"] for caption in captions] == list(range(32))
    for caption in captions:
        assert sorted(caption) == ["caption", "clip_embedding", "id", "image_id"]
        row = caption["clip_embedding"]
        assert caption["image_id"] == world.features.image_ids[row]
        assert caption["caption"] in world.features.captions[row]
        assert np.array_equal(embeddings[row].numpy(), world.features.embeddings[row])


def test_there_and_back(world, tmp_path):
    export_pickle(world.features.path, tmp_path / "data.pkl")
    back = import_pickle(tmp_path / "data.pkl", world.clip, tmp_path / "back", device="cpu", dtype="float32")
    assert back.image_ids == world.features.image_ids and back.captions == world.features.captions
    assert np.array_equal(back.embeddings, world.features.embeddings)
    assert back.encoder == world.features.encoder
    export_pickle(back.path, tmp_path / "again.pkl")
    first, second = (pickle.loads((tmp_path / name).read_bytes()) for name in ("data.pkl", "again.pkl"))
    assert first["captions"] == second["captions"] and torch.equal(first["clip_embedding"], second["clip_embedding"])


def test_numbers_become_numbers_again(tmp_path, tiny_clip):
    for ids in ([391895, 9, 0], ["00000123", "5", "7"], ["5", "٣", "7"]):
        captions = [{"image_id": image_id, "caption": "text", "clip_embedding": n} for n, image_id in enumerate(ids)]
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"clip_embedding": torch.ones(3, 24), "captions": captions}))
        features = import_pickle(tmp_path / "a.pkl", str(tiny_clip), tmp_path / "set", device="cpu", overwrite=True)
        export_pickle(features.path, tmp_path / "b.pkl", overwrite=True)
        assert [row["image_id"] for row in pickle.loads((tmp_path / "b.pkl").read_bytes())["captions"]] == ids


def test_the_tokens_are_those_of_the_captions(world, tiny_lm, tmp_path):
    out = tmp_path / "data.pkl"
    assert export_pickle(world.features.path, out, language_model=str(tiny_lm))[1] == tmp_path / "data_tokens.pkl"
    captions = pickle.loads(out.read_bytes())["captions"]
    tokens, rows, longest = pickle.loads((tmp_path / "data_tokens.pkl").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert [own.tolist() for own in tokens] == [tokenizer.encode(caption["caption"]) for caption in captions]
    assert {(own.dtype, own.ndim) for own in tokens} == {(torch.int64, 1)}
    assert rows == [caption["clip_embedding"] for caption in captions] and type(rows[0]) is int
    assert longest == max(map(len, tokens)) and type(longest) is int


def test_old_tokens_never_stand_beside_new_captions(world, tiny_lm, tmp_path, monkeypatch):
    out, tokens = tmp_path / "data.pkl", tmp_path / "data_tokens.pkl"
    tokens.write_bytes(b"old")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match="old tokens"):
            export_pickle(world.features.path, out, **options)
    with pytest.raises(InputError, match="exists already"):
        export_pickle(world.features.path, out, language_model=str(tiny_lm))
    assert tokens.read_bytes() == b"old" and not out.exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        export_pickle(world.features.path, out, language_model=str(tiny_lm), overwrite=True)
    assert not tokens.exists() and not out.exists()
    monkeypatch.undo()
    export_pickle(world.features.path, out, language_model=str(tiny_lm), overwrite=True)
    assert len(pickle.loads(tokens.read_bytes())[0]) == 32


def test_names_that_cannot_be_written(world, tmp_path):
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "file").write_text("")
    cases = {"data.bin": "not called .pkl", "folder.pkl": "exists already", "file/data.pkl": "not a writable folder"}
    for name, reason in cases.items():
        with pytest.raises(InputError, match=reason):
            export_pickle(world.features.path, tmp_path / name, overwrite=True)
    (tmp_path / "data.pkl").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_pickle(world.features.path, tmp_path / "data.pkl")
    assert (tmp_path / "data.pkl").read_text() == "mine"


def test_the_commands(world, tiny_lm, tmp_path, capsys):
    arguments = ["convert", "pickle", world.features.path, "--out", tmp_path / "a.pkl", "--language-model", tiny_lm]
    assert cli.main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.pkl"), str(tmp_path / "a_tokens.pkl")]
    arguments = ["convert", "features", tmp_path / "a.pkl", "--clip", world.clip, "--out", tmp_path / "back"]
    assert cli.main(list(map(str, arguments))) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}: 8 photos, 32 captions\n"
    assert FeatureSet.open(tmp_path / "back").image_ids == world.features.image_ids


@pytest.mark.photos
@pytest.mark.skipif("CLIPCAP_RAG_DATA" not in os.environ, reason="CLIPCAP_RAG_DATA does not name the photos")
def test_real_embeddings_are_believed_and_exchanged_ones_doubted(tmp_path, capsys):
    data = Path(os.environ["CLIPCAP_RAG_DATA"])
    lines = (data / "flickr8k/captions_dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:64]
    (tmp_path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    clip = str(data / "bench_clip")
    extract_features([tmp_path / "captions.jsonl"], data / "flickr8k/images", clip, tmp_path / "set", workers=0)
    export_pickle(tmp_path / "set", tmp_path / "data.pkl")
    import_pickle(tmp_path / "data.pkl", clip, tmp_path / "back")
    assert "warning" not in capsys.readouterr().err
    content = pickle.loads((tmp_path / "data.pkl").read_bytes())
    content["clip_embedding"] = content["clip_embedding"].roll(1, dims=0)
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(content))
    import_pickle(tmp_path / "data.pkl", clip, tmp_path / "doubtful")
    assert "no nearer to their own rows" in capsys.readouterr().err
