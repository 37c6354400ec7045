"""Fetching from the hub and pushing to it, against a small server on this machine that speaks its protocol."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub.utils import close_session

from clipcap_rag import hub, publication
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.captioner import Captioner
from clipcap_rag.checkpoint import Checkpoint, read_checkpoint
from clipcap_rag.cli import main
from clipcap_rag.config import ModelConfig
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune

TOKEN = "hf_of_the_test"


class HubServer(ThreadingHTTPServer):
    """The part of the hub that is needed, in memory: {"models/ORG/NAME": {path: bytes}}, one commit each.

    Attributes:
        log: method and path of every request, with " from N" where a range was asked for.
        private: repositories that are only shown to those who have the token.
        cut: file name -> bytes after which its next transfer breaks off.
        broken: file names that are answered by an error of the server.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories, self.uploads, self.commits = {}, {}, []
        self.log, self.private, self.cut, self.broken = [], set(), {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.shutdown()
        self.server_close()
        close_session()  # or the library goes on over connections that are open

    def handle_error(self, *_):
        """A client that hung up is no news."""


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_all(self):
        hub_, path = self.server, unquote(urlsplit(self.path).path)
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        hub_.log.append(f"{self.command} {path}" + (f" from {start[1]}" if start else ""))
        sent = self.body() if self.command in ("POST", "PUT") else b""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("/lfs/"):
            hub_.uploads[path.removeprefix("/lfs/")] = sent
            return self.reply()
        if self.command == "POST":
            if not allowed:
                return self.reply(401, {"error": "Invalid username or password."})
            return self.change(path, sent)
        found = re.fullmatch(r"/(?:api/(models|datasets)/|(datasets)/|)([\w.-]+/[\w.-]+)(/.*)?", path)
        kind, rest = found[1] or found[2] or "models", found[4] or ""
        name = f"{kind}/{found[3]}"
        files = hub_.repositories.get(name)
        if files is None or (name in hub_.private and not allowed):
            return self.reply(401, {"error": "Repository not found"})
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        revision = (rest.split("/") + ["", "", ""])[2] or "main"
        if revision not in ("main", commit):
            return self.reply(404, b"", X_Error_Code="RevisionNotFound")
        if rest.startswith("/tree/"):
            return self.reply(200, [{"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                                    for file, data in files.items()])  # fmt: skip
        if not rest.startswith("/resolve/"):
            return self.reply(200, {"id": found[3], "sha": commit, "siblings": []})
        return self.send_file(files, rest.split("/", 3)[3], commit, int(start[1]) if start else 0)

    def send_file(self, files, file, commit, start):
        if file not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if self.command == "GET" and file in self.server.broken:
            return self.reply(500)
        data = files[file]
        headers = {"ETag": f'"{_oid(data)}"', "X_Repo_Commit": commit}
        if self.command == "GET" and file in self.server.cut:
            self.send_response(200)
            for name, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data[: self.server.cut.pop(file)])
            self.close_connection = True
            return None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.reply(206 if start else 200, data[start:], **headers)

    def change(self, path, sent):
        hub_ = self.server
        if path == "/api/validate-yaml":
            headed = json.loads(sent)["content"].startswith("---\n")
            return self.reply(200, {"warnings": [] if headed else [{"message": "empty"}], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type") or "model"
            if f"{kind}s/{name}" in hub_.repositories:
                return self.reply(409, {"error": "exists"})
            hub_.repositories[f"{kind}s/{name}"] = {}
            if asked.get("visibility") == "private":
                hub_.private.add(f"{kind}s/{name}")
            return self.reply(200, {"url": f"{hub_.url}/{'datasets/' if kind == 'dataset' else ''}{name}"})
        if "/preupload/" in path:
            asked = json.loads(sent)["files"]
            return self.reply(200, {"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] > 100_000 else "regular",
                 "shouldIgnore": False, "oid": None} for file in asked]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(sent)["objects"]
            for one in objects:
                if one["oid"] not in hub_.uploads:
                    one["actions"] = {"upload": {"href": f"{hub_.url}/lfs/{one['oid']}"}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        name = re.fullmatch(r"/api/(.*)/commit/main", path)[1]
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub_.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub_.repositories[name][value["path"]] = hub_.uploads[value["oid"]]
            else:
                hub_.commits.append((name, value["summary"]))
        return self.reply(200, {"commitUrl": f"{hub_.url}/{name}/commit/1", "commitOid": "1"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_all


def _oid(data):
    return hashlib.sha1(data).hexdigest()


def serve(server):
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serve(HubServer())
    yield server
    server.stop()


@pytest.fixture
def online(server, monkeypatch, tmp_path):
    """The library of the hub asks our server, with the token, and has an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    url = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture
def pushed(online, world):
    """The repository me/captioner with the trained run and its index."""
    publication.push(world.run, "me/captioner", index=world.index.path)
    return online.repositories["models/me/captioner"]


def downloads(server):
    """The files that were fetched from it."""
    asked = [entry.partition("/resolve/")[2] for entry in server.log if entry.startswith("GET")]
    return {path.split("/", 1)[1].partition(" from ")[0] for path in asked if path}


def test_what_was_pushed_captions_the_same(online, world, tmp_path):
    address = publication.push(world.run, "me/captioner", index=world.index.path, message="First")
    assert address == f"{online.url}/me/captioner"
    assert online.commits == [("models/me/captioner", "First")], "one commit"
    photos = sorted(world.photos.iterdir())[:3]
    fetched = Captioner.from_pretrained("hf-hub:me/captioner", "cpu", "float32")
    assert fetched.checkpoint.encoder["clip"] == "local-dir:clip"
    here = Captioner.from_pretrained(world.run, "cpu", "float32")
    ours, theirs = here.caption(photos), fetched.caption(photos)
    assert [result.caption for result in theirs] == [result.caption for result in ours]
    assert [result.neighbors for result in theirs] == [result.neighbors for result in ours]


def test_the_cache_serves_when_the_hub_is_down(online, pushed, capsys):
    first = hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    online.stop()
    begun = time.monotonic()
    assert hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint") == first
    assert capsys.readouterr().err.count("using the copy fetched before") == 1
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Captioner.from_pretrained("hf-hub:me/captioner"),
        lambda: load_language_model("me/gpt"),
        lambda: Encoder.load("hf-hub:me/clip", "cpu"),
        lambda: Encoder.load("ViT-B-32:openai", "cpu"),
        lambda: CaptionIndex.open("hf-hub:me/captions"),
    ],
)
def test_a_hub_that_is_down_is_an_error_at_once(online, ask):
    online.stop()
    begun = time.monotonic()
    with pytest.raises(InputError, match="cannot be fetched .*network connection, or give a folder$"):
        ask()
    assert time.monotonic() - begun < 6, "the library alone takes 23 s and more"


def test_what_is_not_there_or_not_allowed_is_named(online, pushed, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="hf-hub:me/other is not on the hub, or not for everybody; .*hf auth login"):
        Captioner.from_pretrained("hf-hub:me/other")
    with pytest.raises(InputError, match="hf-hub:me/captioner@v9: the hub has no such revision"):
        Captioner.from_pretrained("hf-hub:me/captioner@v9")
    with pytest.raises(InputError, match="neither a folder nor a name on the hub"):
        Captioner.from_pretrained("hf-hub:../x")
    online.private.add("models/me/captioner")
    assert hub.fetch("me/captioner", ["config.json"]).is_dir()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="not for everybody"):
        Captioner.from_pretrained("hf-hub:me/captioner")
    with pytest.raises(InputError, match="does not let you write me/new .*HF_TOKEN"):
        publication.push("starter", "me/new")


def test_only_what_the_manifest_names_is_fetched(online, pushed):
    pushed |= {"pytorch_model.bin": b"x", "modeling.py": b"x", "../up.json": b"{}", "other.safetensors": b"x"}
    folder = hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    named = set(json.loads(pushed["config.json"])["files"]) | {"config.json", "README.md"}
    assert downloads(online) == named
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == named


@pytest.mark.parametrize("name", ["modeling.py", "weights.bin", "../up.json", "/etc/passwd.json", "a\\..\\b.json"])
def test_a_manifest_that_names_other_things_is_refused(online, pushed, name):
    manifest = json.loads(pushed["config.json"])
    manifest["files"][name] = {"bytes": 1, "hash": "sha256:0"}
    pushed |= {"config.json": json.dumps(manifest).encode(), name: b"x"}
    with pytest.raises(InputError, match=f"lists {re.escape(name)}, which no checkpoint has"):
        Captioner.from_pretrained("hf-hub:me/captioner")
    assert downloads(online) == {"config.json", "README.md"}


def test_an_altered_file_is_refused_and_an_edited_card_is_not(online, pushed):
    pushed["README.md"] += b"\nEdited on the hub.\n"
    folder = hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    assert (folder / "README.md").read_text().endswith("Edited on the hub.\n")
    weights = bytearray(pushed["model.safetensors"])
    weights[-1] ^= 1
    pushed["model.safetensors"] = bytes(weights)
    with pytest.raises(InputError, match=r"hf-hub:me/captioner is damaged \(.*model.safetensors was altered.*; remove"):
        Captioner.from_pretrained("hf-hub:me/captioner")


def test_a_repository_of_something_else_is_refused(online):
    online.repositories["models/me/gpt"] = {"config.json": b'{"model_type": "gpt2"}'}
    online.repositories["models/me/empty"] = {}
    for name in ("gpt", "empty"):
        with pytest.raises(InputError, match=f"hf-hub:me/{name} is not a checkpoint of clipcap-rag"):
            Captioner.from_pretrained(f"hf-hub:me/{name}")


def test_an_interrupted_download_goes_on_where_it_was(online, pushed, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    online.cut["model.safetensors"] = 50_000
    hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    assert any(entry.endswith("/model.safetensors from 50000") for entry in online.log)


def test_a_failed_download_keeps_the_files_it_had(online, pushed):
    online.broken.add("model.safetensors")
    with pytest.raises(InputError, match="hf-hub:me/captioner@.* cannot be fetched"):
        hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    had = downloads(online) - {"model.safetensors"}
    online.broken.clear()
    online.log.clear()
    hub.fetch_artifact("hf-hub:me/captioner", "config.json", "checkpoint")
    assert "model.safetensors" in downloads(online) and "config.json" in had
    assert "config.json" not in downloads(online)


def test_a_language_model_of_the_hub_is_fetched_without_its_pickle(online, tiny_lm):
    files = {path.name: path.read_bytes() for path in tiny_lm.iterdir()}
    online.repositories["models/me/gpt"] = files | {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}
    model, tokenizer = load_language_model("me/gpt")
    assert model.config.n_embd == 32 and tokenizer.eos_token_id is not None
    assert downloads(online) <= set(hub.LANGUAGE_MODEL_FILES)


# -- what is packed


@pytest.fixture
def frozen(world, tiny_lm, tmp_path):
    """A checkpoint that needs tiny_lm from its folder."""
    language_model, tokenizer = load_language_model(str(tiny_lm))
    encoder = json.loads((world.run / "best" / "config.json").read_text())["encoder"]
    config = ModelConfig(
        clip_dim=24, lm_dim=32, mapper="mlp", prefix_length=2, language_model_tuning="frozen", mapper_heads=2
    )
    model = CaptionModel(build_mapper(config), tune(language_model, config), tokenizer.eos_token_id).eval()
    folder = tmp_path / "frozen"
    folder.mkdir()
    Checkpoint(model, tokenizer, config, encoder, str(tiny_lm)).write(folder)
    return folder


def test_a_frozen_language_model_goes_with_it(frozen, tiny_lm, tmp_path):
    with publication.packed(frozen, "me/x") as (folder, repo_type):
        assert repo_type == "model"
        shutil.copytree(folder, tmp_path / "elsewhere")
    text = "".join(path.read_text() for path in (tmp_path / "elsewhere").glob("*.[jm][sd]*") if path.suffix != ".jsonl")
    assert str(tiny_lm) not in text, "no path of this machine"
    ours, theirs = read_checkpoint(frozen), read_checkpoint(tmp_path / "elsewhere")
    assert theirs.language_model == "language_model"
    tokens, image = torch.tensor([[1, 2, 3]]), torch.randn(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs.model(tokens, image), ours.model(tokens, image))
    with publication.packed(tmp_path / "elsewhere", "me/y") as (again, _):
        assert publication.listing(again).keys() == publication.listing(tmp_path / "elsewhere").keys()


def test_a_language_model_that_is_gone_is_refused(frozen, tmp_path):
    shutil.copytree(frozen, tmp_path / "moved")
    manifest = json.loads((tmp_path / "moved" / "config.json").read_text())
    manifest["language_model"]["name"] = "/gone/gpt"
    (tmp_path / "moved" / "config.json").write_text(json.dumps(manifest))
    with (
        pytest.raises(InputError, match="needs the language model /gone/gpt, which is gone"),
        publication.packed(tmp_path / "moved", "me/x"),
    ):
        pass


def test_an_index_that_stays_behind_is_said_to_be_gone(world, tmp_path, capsys):
    with publication.packed(world.run, "me/x") as (folder, _):
        shutil.copytree(folder, tmp_path / "elsewhere")
    assert f"--index {world.index.path.resolve()}" in capsys.readouterr().err
    captioner = Captioner.from_pretrained(tmp_path / "elsewhere", "cpu", "float32")
    photo = world.photos / "photo-0.jpg"
    with pytest.raises(InputError, match="own, is gone; pass --index"):
        captioner.caption(photo)
    assert captioner.caption(photo, index=None)[0].caption
    manifest = (tmp_path / "elsewhere" / "config.json").read_text()
    assert str(world.index.path.parent) not in manifest and "_name_or_path" not in manifest


def test_the_card_has_what_the_hub_reads(world, tmp_path):
    with publication.packed(world.run, "me/x") as (folder, _):
        card = (folder / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "library_name: clipcap-rag\npipeline_tag: image-to-text\n" in head and "license" not in head
    assert 'Captioner.from_pretrained("hf-hub:me/x")' in card
    assert str(world.run.parent) not in card and world.clip not in card


def test_an_index_of_another_clip_is_refused(world):
    with (
        pytest.raises(InputError, match="use one CLIP model for both"),
        publication.packed("starter", "me/x", world.index.path),
    ):
        pass


def test_an_index_becomes_a_data_set(online, world):
    address = publication.push(world.index.path, "me/captions", private=True)
    assert address == f"{online.url}/datasets/me/captions" and "datasets/me/captions" in online.private
    captioner = Captioner.from_pretrained(world.run, "cpu", "float32")
    photo = world.photos / "photo-0.jpg"
    here, there = (captioner.caption(photo, index=index)[0] for index in (world.index.path, "hf-hub:me/captions"))
    assert there.caption == here.caption
    assert [neighbor.caption for neighbor in there.neighbors] == [neighbor.caption for neighbor in here.neighbors]
    opened = CaptionIndex.open("hf-hub:me/captions", "cpu")
    assert opened.name == "captions"
    assert Encoder.load(opened.encoder["clip"], "cpu", base=opened.path).dim == 24


def test_the_commands_in_processes_of_their_own(server, world, tmp_path, capsys):
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def command(*words):
        words = [sys.executable, "-m", "clipcap_rag", *words]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)

    push = ["push", str(world.run), "--repo", "me/captioner", "--index", str(world.index.path)]
    assert main([*push, "--dry-run"]) == 0
    assert "index/own/index.json" in capsys.readouterr().out and not server.log
    done = command(*push)
    assert (done.returncode, done.stdout) == (0, f"{server.url}/me/captioner\n"), done.stderr
    assert TOKEN not in done.stderr
    ask = ["caption", str(world.photos / "photo-0.jpg"), "--device", "cpu", "--dtype", "float32", "--model"]
    fetched = command(*ask, "hf-hub:me/captioner")
    assert fetched.returncode == 0, fetched.stderr
    assert main([*ask, str(world.run)]) == 0
    assert fetched.stdout == capsys.readouterr().out
