"""Tiny but real parts shared by the tests: a CLIP with random weights, generated photos, invented captions."""

import io
import json
import os
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: tests never wait for a network

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A folder with a random open_clip model, 24 wide, for 32 x 32 pixels and 32 tokens: `local-dir:PATH`."""
    folder = tmp_path_factory.mktemp("clip") / "tiny_clip"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = open_clip.CLIP(**_TINY_CLIP)
        # open_clip starts with embeddings so small that all captions look alike; these are told apart
        torch.nn.init.normal_(model.token_embedding.weight)
        torch.nn.init.normal_(model.positional_embedding, std=0.1)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    config = {"model_cfg": _TINY_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """A folder with eight different generated pictures, photo-0.jpg to photo-5.jpg and photo-6.png, photo-7.png."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(8)
    for number in range(8):
        coarse = noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((60 + 4 * number, 48), Image.Resampling.BICUBIC)
        picture.save(folder / f"photo-{number}.{'jpg' if number < 6 else 'png'}")
    return folder


@pytest.fixture(scope="session")
def tiny_captions() -> list[str]:
    """Thirty-two invented captions, all different, of 6 to 11 words."""
    subjects = ("a brown dog", "two small children", "an old man in a hat", "a red bicycle")
    places = ("by the sea", "in the snow", "on a wooden bridge", "under tall trees")
    actions = ("rests quietly", "waits for the evening train")
    return [f"{subject} {action} {place}" for subject in subjects for action in actions for place in places]


@pytest.fixture(scope="session")
def other_clip(tiny_clip, tmp_path_factory) -> Path:
    """A folder with another model of the shape of tiny_clip."""
    folder = tmp_path_factory.mktemp("clip") / "other_clip"
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        model = open_clip.CLIP(**_TINY_CLIP)
    (folder / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_captions, tmp_path_factory) -> Path:
    """A folder with a random 2-layer GPT-2, 32 wide, 64 positions, and a byte-level BPE learned from tiny_captions."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("lm") / "tiny_lm"
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(tiny_captions, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = GPT2TokenizerFast.from_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    size, end = len(tokenizer), tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(22)
        config = GPT2Config(
            vocab_size=size, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_writer(tiny_lm):
    """Makes (model, tokenizer, prefixes [images, P, E]) of a captioner with random weights large enough to decide."""
    from clipcap_rag.config import ModelConfig
    from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune

    def make(seed: int, images: int, clip_dim: int, prefix_length: int):
        torch.manual_seed(seed)
        language_model, tokenizer = load_language_model(str(tiny_lm))
        config = ModelConfig(
            clip_dim=clip_dim,
            lm_dim=language_model.config.n_embd,
            prefix_length=prefix_length,
            mapper_layers=1,
            mapper_heads=2,
        )
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        language_model.tie_weights()
        model = CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id).eval()
        with torch.no_grad():
            return model, tokenizer, model.prefix(torch.randn(images, clip_dim))

    return make


@pytest.fixture(scope="session")
def world(tiny_clip, tiny_lm, photo_folder, tiny_captions, tmp_path_factory) -> SimpleNamespace:
    """The whole job on tiny parts: captions of eight photos, their index and features, another index, a trained run."""
    from clipcap_rag.config import ModelConfig, TrainConfig
    from clipcap_rag.features import FeatureSet, extract_features
    from clipcap_rag.index_builder import build_caption_index
    from clipcap_rag.training import train

    folder = tmp_path_factory.mktemp("world")
    names = sorted(path.name for path in photo_folder.iterdir())
    captions = folder / "captions.jsonl"
    rows = [{"image": name, "captions": tiny_captions[4 * n : 4 * n + 4]} for n, name in enumerate(names)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = folder / "other.txt"
    other.write_text("a lighthouse at night\na cup of tea on a table\nred tulips in a vase\nan empty railway station\n")
    clip = f"local-dir:{tiny_clip}"
    exact = {"device": "cpu", "dtype": "float32"}
    index = build_caption_index([captions], clip, folder / "index" / "own", **exact)
    run = train(
        extract_features([captions], photo_folder, clip, folder / "features", workers=0, **exact).path,
        index.path,
        str(tiny_lm),
        folder / "run",
        model_config=ModelConfig(mapper_layers=1, mapper_heads=2, prefix_length=3, clip_length=2),
        train_config=TrainConfig(
            epochs=2,
            batch_size=4,
            neighbor_pool=6,
            max_neighbors=3,
            num_neighbors=3,
            validation_fraction=0.3,
            learning_rate=1e-2,
        ),
        **exact,
    )
    return SimpleNamespace(
        photos=photo_folder,
        captions=captions,
        clip=clip,
        index=index,
        other_index=build_caption_index([other], clip, folder / "index" / "other", **exact),
        features=FeatureSet.open(folder / "features"),
        run=run,
    )


class _Web(BaseHTTPRequestHandler):
    """A server with all that goes wrong on the web; the first word of a path says what."""

    def do_GET(self) -> None:
        self.server.hits[self.path] += 1
        _, kind, *_ = self.path.split("/")
        if kind == "gone":
            self.answer(404, b"no such page")
        elif kind == "moody" and self.server.hits[self.path] == 1:
            self.answer(500, b"try again")
        elif kind == "moved":
            self.answer(302, b"", Location="/photo" + self.path.removeprefix("/moved"))
        elif kind == "circle":
            self.answer(302, b"", Location=self.path)
        elif kind == "local":
            self.answer(302, b"", Location=f"file://{__file__}")
        elif kind == "page":
            self.answer(200, b"<html>this photo is not for you</html>")
        elif kind == "mute":
            self.server.closing.wait(20)
        elif kind == "drip":  # a byte now and then, so that no single wait is long
            self.drip(b"HTTP/1.1 200 OK\r\nX-Endless: " if self.path.endswith("header") else b"HTTP/1.1 200 OK\r\n\r\n")
        elif kind == "cut":
            self.answer(200, self.photo()[:200], length=len(self.photo()))
        elif kind == "half":
            self.answer(200, self.photo()[:700])
        elif kind == "tiny":
            self.answer(200, self.photo((63, 90)))
        elif kind == "plain":
            self.answer(200, _file(Image.new("RGB", (120, 90), (200, 200, 210))))
        else:
            self.server.closing.wait(0.03 if kind == "calm" else 0)
            self.answer(200, self.photo(), type="text/html" if kind == "odd" else "image/jpeg")

    def photo(self, size: tuple[int, int] = (96, 80)) -> bytes:
        noise = np.random.default_rng(sum(self.path.encode()))
        picture = Image.fromarray(noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)
        return _file(picture, "PNG" if self.path.endswith(".png") else "JPEG")

    def answer(self, status: int, body: bytes, type: str = "image/jpeg", length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, start: bytes) -> None:
        with suppress(OSError):
            self.wfile.write(start)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")

    def log_message(self, *words) -> None:
        pass


def _file(picture: Image.Image, format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


@pytest.fixture
def web():
    """A web server on this machine: `web.url` is its address, `web.hits` counts the requests for each path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    server.daemon_threads = True
    server.hits, server.closing = Counter(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()
