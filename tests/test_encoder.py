"""What the encoder promises: open_clip's embeddings, in order, from any model string, bad pictures among good ones."""

import io
import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcap_rag import image_loader
from clipcap_rag.clip_models import random_model
from clipcap_rag.encoder import Encoder, check_encoder, check_same_encoder, parse_clip, stored_clip
from clipcap_rag.errors import InputError
from clipcap_rag.images import decode_image, image_digest

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 24, "width": 16, "heads": 2, "layers": 2}
MULTIMODAL = {"context_length": 24, "width": 16, "heads": 2, "layers": 1}
FAMILIES = {  # name: (settings of the model, settings of its text tower, whether it may be cut)
    "clip": ({}, {}, True),
    "quick_gelu": ({"quick_gelu": True}, {}, True),
    "custom_text": ({"custom_text": True}, {}, True),
    "eos_pool": ({"custom_text": True}, {"pool_type": "eos", "eos_id": 49407}, True),
    "linear_projection": ({"custom_text": True}, {"proj_bias": True}, True),
    "no_projection": ({}, {"proj_type": "none"}, True),
    "custom_blocks": ({}, {"qk_norm": True, "scale_heads": True, "scale_attn": True}, True),
    "siglip": ({"custom_text": True, "init_logit_bias": -10}, {"no_causal_mask": True, "pool_type": "last"}, False),
    "both_ways": ({}, {"no_causal_mask": True}, False),
    "causal_last": ({"custom_text": True}, {"pool_type": "last"}, False),
    "coca": ({"custom_text": True, "multimodal_cfg": MULTIMODAL}, {"embed_cls": True, "output_tokens": True}, False),
}
TEXTS = [
    "a grey cat",
    "a cat that has seen everything " * 9,
    "",
    "two boats",
    "a text that names <end_of_text> in the middle of it",
    "ein Hund läuft 🐕",
    "three women wait for a bus in the rain",
]


def write_clip(folder: Path, config: dict, seed: int = 0) -> Path:
    """Saves a random model of this configuration as open_clip does."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    built = deepcopy(config)
    custom = built.pop("custom_text", False) or "hf_model_name" in built["text_cfg"]
    kind = open_clip.CoCa if "multimodal_cfg" in built else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    torch.manual_seed(seed)
    model = kind(**built)
    for parameter in model.parameters():  # far from open_clip's shy beginnings, so that every part counts
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    """What open_clip itself makes of the texts, over the whole context."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        return model.eval().encode_text(tokens, normalize=False).numpy()


def load(folder: Path, dtype: str = "float32") -> Encoder:
    return Encoder.load(f"local-dir:{folder}", "cpu", dtype)


@pytest.fixture(scope="module")
def encoder(tiny_clip) -> Encoder:
    return load(tiny_clip)


@pytest.fixture(scope="module")
def photos(photo_folder) -> list[Path]:
    return sorted(photo_folder.iterdir())


# -- texts


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_embedded_as_by_open_clip(tmp_path, family):
    model, text, cuts = FAMILIES[family]
    width = 16 if family == "no_projection" else 12
    folder = write_clip(
        tmp_path / family, {"embed_dim": width, "vision_cfg": VISION, "text_cfg": {**TEXT, **text}, **model}
    )
    encoder = load(folder)
    assert encoder._text_tower.cuts is cuts
    expected = reference(folder, TEXTS)
    found = encoder.encode_text(TEXTS, batch_size=3)
    np.testing.assert_allclose(found.raw, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)


def test_a_hugging_face_tower_runs_whole(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tower = tmp_path / "tower"
    RobertaConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0,
    ).save_pretrained(tower)  # fmt: skip
    text = {
        "hf_model_name": str(tower), "hf_tokenizer_name": "beside", "hf_model_pretrained": False, "context_length": 24,
    }  # fmt: skip
    folder = write_clip(tmp_path / "clip", {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": text})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    texts = [text for text in TEXTS if text]  # a mean over no token is not a number, also in open_clip
    encoder = load(folder)
    assert not encoder._text_tower.cuts
    np.testing.assert_allclose(encoder.encode_text(texts, 2).raw, reference(folder, texts), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="no usable embedding for ''"):
        encoder.encode_text(["a grey cat", ""])


def test_batches_are_cut_to_their_longest_text(encoder):
    lengths = []
    watch = encoder.model.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    encoder.encode_text(["a dog", "a dog " * 40, "a cat", "a dog and a cat"], batch_size=2)
    watch.remove()
    assert lengths == [encoder.context_length, 4]  # start, two words, end


def test_texts_come_back_in_order_whatever_the_batch(encoder, tiny_captions):
    one_by_one = np.concatenate([encoder.encode_text([text]).vectors for text in tiny_captions])
    done = []
    together = encoder.encode_text(tiny_captions, batch_size=5, on_progress=done.append)
    np.testing.assert_allclose(together.vectors, one_by_one, atol=1e-5)
    assert sum(done) == len(tiny_captions)
    cosines = one_by_one @ one_by_one.T
    assert cosines[~np.eye(len(cosines), dtype=bool)].max() < 0.999  # else order could not show


def test_no_texts_give_no_embeddings(encoder):
    assert encoder.encode_text([]).vectors.shape == (0, encoder.dim)


@pytest.mark.parametrize("texts", ["a dog", ["a dog", None], [3]])
def test_only_a_list_of_strings_is_taken_for_texts(encoder, texts):
    with pytest.raises(InputError, match="list of strings"):
        encoder.encode_text(texts)


def test_bfloat16_is_close(tiny_clip, tiny_captions, photos, encoder):
    rough = load(tiny_clip, "bfloat16")
    assert rough.dtype is torch.bfloat16 and rough.logit_scale == encoder.logit_scale
    for exact, other in (
        (encoder.encode_text(tiny_captions), rough.encode_text(tiny_captions)),
        (encoder.encode_image(photos).embeddings, rough.encode_image(photos).embeddings),
    ):
        assert (exact.vectors * other.vectors).sum(1).min() > 0.999
        assert other.vectors.dtype == np.float32
    check_encoder(encoder.record(), rough, "the index")


# -- images


def test_images_are_embedded_as_by_open_clip(tiny_clip, photos, encoder):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(Image.open(photo)) for photo in photos])).numpy()
    done = []
    encoded = encoder.encode_image(photos, batch_size=3, on_progress=done.append)
    np.testing.assert_allclose(encoded.embeddings.raw, expected, atol=1e-5, rtol=1e-5)
    assert encoded.errors == [None] * len(photos) and sum(done) == len(photos)
    assert encoded.digests == [image_digest(decode_image(photo)) for photo in photos]


def test_every_kind_of_image_is_taken(photos, encoder):
    picture = decode_image(photos[6])
    kinds = [photos[6], str(photos[6]), photos[6].read_bytes(), picture, np.asarray(picture)]
    encoded = encoder.encode_image(kinds)
    assert encoded.errors == [None] * 5 and len(set(encoded.digests)) == 1
    np.testing.assert_allclose(encoded.embeddings.vectors, encoded.embeddings.vectors[[0] * 5], atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_reported_and_the_others_encoded(tmp_path, photos, encoder, workers):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(photos[0].read_bytes()[:300])
    images = [photos[0], tmp_path / "gone.jpg", photos[1], b"no image at all", cut, photos[2]]
    encoded = encoder.encode_image(images, batch_size=4, workers=workers)
    assert [error is None for error in encoded.errors] == [True, False, True, False, False, True]
    assert "gone.jpg" in encoded.errors[1] and "cut.jpg" in encoded.errors[4]
    assert encoded.digests[1] == b"" and not encoded.embeddings.raw[[1, 3, 4]].any()
    alone = encoder.encode_image(photos[:3]).embeddings
    np.testing.assert_allclose(encoded.embeddings.vectors[[0, 2, 5]], alone.vectors, atol=1e-5)


def test_a_batch_of_bad_images_only(tmp_path, encoder):
    encoded = encoder.encode_image([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert all(encoded.errors) and encoded.embeddings.vectors.shape == (2, encoder.dim)


def test_a_picture_that_breaks_a_decoder_is_reported(monkeypatch, photos, encoder):
    def decode(image):
        if image == photos[1]:
            raise MemoryError("17 GB")
        return decode_image(image)

    monkeypatch.setattr(image_loader, "decode_image", decode)
    encoded = encoder.encode_image(photos[:3])
    assert [error is None for error in encoded.errors] == [True, False, True]
    assert "photo-1.jpg" in encoded.errors[1] and "17 GB" in encoded.errors[1]


def test_workers_change_nothing(photos, encoder):
    here, there = (encoder.encode_image(photos * 2, batch_size=3, workers=workers) for workers in (0, 2))
    assert np.array_equal(here.embeddings.vectors, there.embeddings.vectors)
    assert np.array_equal(here.embeddings.norms, there.embeddings.norms)
    assert here.digests == there.digests


def test_images_stream_in_batches(photos, encoder):
    stream = encoder.iter_images([*photos[:4], Path("gone.jpg")], batch_size=2)
    assert [[error is None for error in part.errors] for part in stream] == [[True, True], [True, True], [False]]


def test_reading_images_leaves_the_random_generator_alone(photos, encoder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    encoder.encode_image(photos[:2])
    assert torch.equal(before, torch.get_rng_state())


def test_a_killed_worker_is_an_error_with_a_remedy(monkeypatch, photos, encoder):
    monkeypatch.setattr(image_loader, "decode_image", lambda image: os._exit(9))
    with pytest.raises(InputError, match="--workers 0"):
        encoder.encode_image(photos, batch_size=2, workers=1)


def test_model_without_numbers_is_reported(tmp_path, photos):
    folder = write_clip(tmp_path / "nan", {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT})
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][:] = float("nan")
    save_file(weights, folder / "open_clip_model.safetensors")
    encoded = load(folder).encode_image(photos[:2])
    assert all("no usable embedding" in error for error in encoded.errors) and not encoded.embeddings.raw.any()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"workers": -1}])
def test_impossible_sizes_are_refused(photos, encoder, arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        encoder.encode_image(photos, **arguments)


def test_one_image_is_not_taken_for_many(photos, encoder):
    for image in (str(photos[0]), photos[0], photos[0].read_bytes(), decode_image(photos[0])):
        with pytest.raises(InputError, match="list of images"):
            encoder.encode_image(image)


def test_no_images_give_no_embeddings(encoder):
    encoded = encoder.encode_image([])
    assert encoded.embeddings.vectors.shape == (0, encoder.dim) and encoded.errors == []


# -- who made an embedding


def test_record_survives_json_and_recognises_its_encoder(tiny_clip, encoder):
    record = json.loads(json.dumps(encoder.record()))
    assert record["clip"] == f"local-dir:{tiny_clip}" and record["dim"] == encoder.dim
    assert len(record["probes"]["sentences"]) == len(record["probes"]["text"]) == 3
    check_encoder(record, load(tiny_clip), "the index")
    check_same_encoder(record, "the index", encoder.record(), "the model")


def test_another_encoder_is_refused_naming_both(tmp_path, tiny_clip, encoder):
    config = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
    wider = write_clip(tmp_path / "wider", {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT})
    other = write_clip(tmp_path / "other", config, seed=1)
    for folder in (wider, other):
        with pytest.raises(InputError) as caught:
            check_encoder(encoder.record(), load(folder), "the index birds")
        assert all(part in str(caught.value) for part in ("the index birds", str(tiny_clip), str(folder)))


@pytest.mark.parametrize("tower", ["visual.proj", "text_projection"])
def test_an_encoder_that_differs_in_one_tower_is_refused(tmp_path, tiny_clip, encoder, tower):
    folder = tmp_path / "changed"
    shutil.copytree(tiny_clip, folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights[tower] = weights[tower].flip(1).contiguous()
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="probe cosine"):
        check_encoder(encoder.record(), load(folder), "the index")


def test_an_incomplete_record_is_refused(encoder):
    record = encoder.record()
    without = [{key: value for key, value in record.items() if key != left_out} for left_out in record]
    short = {**record, "probes": {**record["probes"], "image": record["probes"]["image"][:-1]}}
    for faulty in (*without, short, {**record, "probes": None}):
        with pytest.raises(InputError, match="make it again"):
            check_encoder(faulty, encoder, "the index")


# -- which model a string names


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("ViT-B-32", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-B/32:openai", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-B-32-quickgelu", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-B-32:laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("ViT-B-32:laion2b-s34b-b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("RN50x4", ("RN50x4-quickgelu", "openai")),
        ("ViT-L/14", ("ViT-L-14-quickgelu", "openai")),
        ("ViT-L/14@336px", ("ViT-L-14-336-quickgelu", "openai")),
        ("ViT-L/14@336:openai", ("ViT-L-14-336-quickgelu", "openai")),
        ("ViT-B-16-SigLIP", ("ViT-B-16-SigLIP", "webli")),
        ("hf-hub:someone/some-model", ("hf-hub:someone/some-model", None)),
    ],
)
def test_strings_that_name_a_model(clip, expected):
    assert parse_clip(clip) == expected
    assert parse_clip(":".join(filter(None, expected))) == expected  # what is stored means the same


@pytest.mark.parametrize(
    ("clip", "pixels", "dim"),
    [
        ("ViT-B/32", 224, 512),
        ("ViT-B/16", 224, 512),
        ("RN50", 224, 1024),
        ("RN101", 224, 512),
        ("RN50x4", 288, 640),
        ("RN50x16", 384, 768),
        ("ViT-L/14", 224, 768),
        ("ViT-L/14@336px", 336, 768),
    ],
)
def test_width_and_resolution_follow_from_the_model(clip, pixels, dim):
    name, tag = parse_clip(clip)
    config = open_clip.get_model_config(name)
    with torch.device("meta"):  # shapes without weights
        model = open_clip.CLIP(**config).eval()
        assert model.encode_image(torch.empty(2, 3, pixels, pixels)).shape == (2, dim)
    assert config["embed_dim"] == dim and model.visual.image_size in (pixels, (pixels, pixels))
    weights = open_clip.get_pretrained_cfg(name, tag)
    assert weights["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert weights["std"] == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.slow
def test_an_encoder_with_other_width_and_resolution_needs_no_setting(photo_folder):
    encoder = Encoder("random RN50x4", *random_model("RN50x4"), torch.device("cpu"), torch.float32)
    assert encoder.dim == 640 and encoder.record()["dim"] == 640
    assert encoder.preprocess(decode_image(photo_folder / "photo-0.jpg")).shape == (3, 288, 288)
    found = encoder.encode_image([photo_folder / "photo-0.jpg", photo_folder / "photo-7.png"])
    assert found.embeddings.raw.shape == (2, 640) and found.errors == [None, None]


def test_weights_trained_with_quick_gelu_never_run_without():
    wrong = []
    for name, tag in open_clip.list_pretrained():
        chosen, _ = parse_clip(f"{name}:{tag}")
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
            wrong += [] if open_clip.get_model_config(chosen).get("quick_gelu") else [f"{name}:{tag}"]
    assert not wrong


def test_quick_gelu_of_a_tag_is_computed(monkeypatch, tmp_path, recwarn):
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    plain = write_clip(tmp_path / "plain", config)
    quick = write_clip(tmp_path / "quick", {**config, "quick_gelu": True})
    tag = {"file": str(plain / "open_clip_model.safetensors"), "quick_gelu": True}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "Tiny", config)
    monkeypatch.setitem(pretrained._PRETRAINED, "Tiny", {"openai": tag})
    found = Encoder.load("Tiny", "cpu", "float32").encode_text(TEXTS).vectors
    np.testing.assert_allclose(found, load(quick).encode_text(TEXTS).vectors, atol=1e-6)
    assert not np.allclose(found, load(plain).encode_text(TEXTS).vectors, atol=1e-3)
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("", ["neither"]),
        ("vit-b-23", ["ViT-B-32"]),
        ("ViT-B-32:nonsense", ["'nonsense'", "ViT-B-32:openai", "ViT-B-32:laion2b_s34b_b79k"]),
        ("ViT-B-32:", ["''", "ViT-B-32:openai"]),
        ("ViT-H-14", ["several", "ViT-H-14:laion2b_s32b_b79k"]),
        ("ViT-S-32", ["no weights for ViT-S-32", "local-dir:PATH"]),
        ("hf-hub:", ["hf-hub:ORG/NAME"]),
        ("hf-hub:only-a-name", ["hf-hub:ORG/NAME"]),
        ("hf-hub:../secret", ["hf-hub:ORG/NAME"]),
        ("local-dir:", ["--clip"]),
        ("local-dir:/no/such/folder", ["/no/such/folder", "--clip"]),
        ("some/folder", ["neither", "hf-hub:ORG/NAME"]),
    ],
)
def test_strings_that_name_none(clip, words):
    with pytest.raises(InputError) as caught:
        Encoder.load(clip, "cpu")
    assert all(word in str(caught.value) for word in words)


def test_folders(monkeypatch, tmp_path, tiny_clip):
    shutil.copytree(tiny_clip, tmp_path / "run" / "clip")
    absolute = (f"local-dir:{tmp_path}/run/clip", None)
    assert parse_clip("local-dir:clip", base=tmp_path / "run") == absolute
    assert parse_clip(absolute[0], base=tmp_path) == absolute
    monkeypatch.chdir(tmp_path / "run")
    assert parse_clip("clip") == parse_clip("local-dir:./clip") == parse_clip("clip", base=tmp_path) == absolute
    assert parse_clip(str(tmp_path / "run/clip"))[0] == absolute[0]


def test_a_stored_folder_moves_with_what_holds_it(tmp_path, tiny_clip):
    shutil.copytree(tiny_clip, tmp_path / "run" / "clip")
    inside = f"local-dir:{tmp_path}/run/clip"
    assert stored_clip(inside, tmp_path / "run") == "local-dir:clip"
    assert stored_clip(inside, tmp_path / "run" / "clip") == "local-dir:."
    assert stored_clip(inside, tmp_path / "ru") == inside
    assert stored_clip("ViT-B-32:openai", tmp_path) == "ViT-B-32:openai"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert parse_clip("local-dir:clip", base=tmp_path / "moved")[0] == f"local-dir:{tmp_path}/moved/clip"


def damaged(folder: Path, damage: str) -> None:
    config, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config is not JSON":
        config.write_text("{")
    elif damage == "config of something else":
        config.write_text('{"hidden_size": 3}')
    elif damage == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "a missing key":
        save_file({name: value for name, value in load_file(weights).items() if name != "ln_final.bias"}, weights)
    elif damage == "empty weights":
        weights.write_bytes(b"")
    elif damage == "code of its own":
        settings = json.loads(config.read_text())
        settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        ("no config", "open_clip_config.json is missing"),
        ("no weights", "has no weights"),
        ("config is not JSON", "copy the folder again"),
        ("config of something else", "copy the folder again"),
        ("weights cut short", "copy the folder again"),
        ("a missing key", "ln_final.bias"),
        ("empty weights", "copy the folder again"),
        ("code of its own", "trust_remote_code"),
    ],
)
def test_a_faulty_folder_is_one_sentence(tmp_path, tiny_clip, damage, word):
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    damaged(folder, damage)
    with pytest.raises(InputError, match=word) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_weights_cannot_run_code(tmp_path, tiny_clip):
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"state_dict": {"logit_scale": Payload(tmp_path / "pwned")}}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("clip", ["ViT-B-32", "hf-hub:someone/some-model", "ViT-B-16-SigLIP"])
def test_a_model_that_is_not_here_says_so(monkeypatch, tmp_path, clip):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded .* network connection, or give a folder"):
        Encoder.load(clip, "cpu")


def test_device_and_dtype_are_checked_before_the_model(tiny_clip):
    with pytest.raises(InputError, match="dtype"):
        Encoder.load(str(tiny_clip), "cpu", "float8")
    with pytest.raises(InputError, match="device"):
        Encoder.load(str(tiny_clip), "tpu")


# -- the real one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(tiny_clip, tiny_captions, photos, encoder):
    there = Encoder.load(str(tiny_clip), "cuda", "float32")
    texts, images = there.encode_text(tiny_captions), there.encode_image(photos, batch_size=3, workers=2)
    np.testing.assert_allclose(texts.vectors, encoder.encode_text(tiny_captions).vectors, atol=1e-3)
    np.testing.assert_allclose(images.embeddings.vectors, encoder.encode_image(photos).embeddings.vectors, atol=1e-3)
    check_encoder(encoder.record(), Encoder.load(str(tiny_clip), "cuda"), "the index")


@pytest.fixture(scope="module")
def real(request) -> tuple[Path, list[Path], list[str]]:
    """The folder of a trained CLIP model, 40 photos and 40 of their captions, one each."""
    if "CLIPCAP_RAG_DATA" not in os.environ:
        pytest.skip("CLIPCAP_RAG_DATA is not set")
    data = Path(os.environ["CLIPCAP_RAG_DATA"])
    with open(data / "flickr8k" / "captions_dev.jsonl") as lines:
        rows = [json.loads(line) for line in lines][:40]
    photos = [data / "flickr8k" / "images" / row["image"] for row in rows]
    return data / "bench_clip", photos, [row["captions"][0] for row in rows]


@pytest.mark.photos
def test_a_trained_model_finds_the_captions_of_photos(real):
    folder, photos, captions = real
    encoder = load(folder)
    similarities = encoder.encode_image(photos).embeddings.vectors @ encoder.encode_text(captions).vectors.T
    assert (similarities.argmax(axis=1) == np.arange(len(photos))).mean() > 0.4  # by chance: 0.025
    np.testing.assert_allclose(encoder.encode_text(captions).raw, reference(folder, captions), atol=1e-5, rtol=1e-5)


@pytest.mark.photos
def test_bfloat16_is_close_for_a_trained_model(real):
    folder, photos, captions = real
    exact, rough = load(folder), load(folder, "bfloat16")
    assert (exact.encode_text(captions).vectors * rough.encode_text(captions).vectors).sum(1).min() >= 0.999
    images = [encoder.encode_image(photos).embeddings.vectors for encoder in (exact, rough)]
    assert (images[0] * images[1]).sum(1).min() >= 0.999


@pytest.mark.photos
def test_upright_bytes_and_paths_of_a_photo_are_one(real):
    folder, photos, _ = real
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    picture = Image.open(photos[0])
    picture.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    encoded = load(folder).encode_image([photos[0], turned.getvalue()])
    assert encoded.digests[0] == encoded.digests[1]
