"""The starter: it captions photos the minute it is installed, and says what is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from clipcap_rag import Captioner, CaptionIndex, InputError, build_caption_index, shipped
from clipcap_rag.clip_models import parse_clip
from clipcap_rag.config import GenerationConfig
from clipcap_rag.encoder import Encoder

ROOT = Path(__file__).parents[1]
SIZE_LIMIT = 28e6  # bytes in the repository, weights and index together


def photo(package: str, file: str) -> Path:
    """A photo that an installed package ships."""
    return Path(find_spec(package).origin).parent / file


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    names = ("cheetah1.jpg", "lion.jpg", "tower.jpg")
    return [
        photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
        *(photo("gradio", f"media_assets/images/{name}") for name in names),
    ]


@pytest.fixture(scope="module")
def starter() -> Captioner:
    return Captioner.from_pretrained("starter", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def results(starter, photos):
    return starter.caption(photos)


@pytest.fixture(scope="module")
def own_index(tmp_path_factory) -> CaptionIndex:
    """An index of five sentences, built with the starter's CLIP by its name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.txt").write_text(
        "A big cat with spots.\nA naval officer smiles.\nA tall tower of steel.\nA bus in a town.\nA king of beasts.\n"
    )
    return build_caption_index([folder / "own.txt"], "starter", folder / "own", device="cpu", dtype="float32")


def test_it_captions_photos_with_neighbours_from_its_index(results):
    for result in results:
        assert result.error is None and len(result.caption.split()) >= 3
        assert len(result.neighbors) == 8 and {neighbor.index for neighbor in result.neighbors} == {"starter"}
        assert result.candidates[0].caption == result.caption
        assert all(-1 <= candidate.clip_similarity <= 1 for candidate in result.candidates)
    assert len({result.caption for result in results}) > 1


def test_retrieval_changes_captions(starter, photos, results):
    off = starter.caption(photos, index=None)
    assert all(not result.neighbors for result in off)
    assert [result.candidates for result in off] != [result.candidates for result in results]


def test_swapping_the_index_changes_the_neighbours(starter, photos, results, own_index):
    swapped = starter.caption(photos, index=own_index)
    for before, after in zip(results, swapped, strict=True):
        assert len(after.neighbors) == len(own_index) == 5
        assert not {neighbor.caption for neighbor in before.neighbors} & {
            neighbor.caption for neighbor in after.neighbors
        }


@pytest.mark.parametrize("decoding", ["greedy", "beam"])
def test_every_decoding_writes(starter, photos, decoding):
    (result,) = starter.caption(photos[0], generation=GenerationConfig(decoding=decoding))
    assert result.caption and result.caption[0].isupper()


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CLIPCAP_RAG")}
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=cwd, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=300)


def test_two_runs_of_the_command_agree_byte_for_byte(photos, tmp_path):
    runs = [command("-m", "clipcap_rag", "caption", *photos[:2], "--json", cwd=tmp_path) for _ in range(2)]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert [json.loads(line)["error"] for line in runs[0].stdout.splitlines()] == [None, None]


def test_the_demo_shows_captions_and_neighbours(photos, tmp_path):
    done = command(ROOT / "scripts/demo.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert all(path.name in shown for path in photos)
    assert shown.count("with retrieval ") == shown.count("without ") == len(photos)
    assert shown.count("neighbour ") == 4 * len(photos)


# -- its parts by name


def test_its_clip_is_a_model_called_starter(starter):
    assert parse_clip("starter") == ("starter", None)
    encoder = Encoder.load("starter", "cpu", "float32")
    assert encoder.clip == "starter" and encoder.dim == starter.checkpoint.config.clip_dim == 128
    a, b, c = encoder.encode_text(["A dog runs.", "a DOG runs.", "A plane lands."]).vectors
    assert np.allclose(a, b) and a @ c < 0.9, "case does not matter to it, meaning does"


def test_text_is_cut_behind_its_last_token_without_changing_a_thing():
    encoder = Encoder.load("starter", "cpu", "float32")
    short, long = "A dog.", "A dog with a stick in its mouth runs through tall green grass beside a calm lake."
    alone, together = encoder.encode_text([short]).vectors[0], encoder.encode_text([long, short]).vectors[1]
    assert np.allclose(alone, together, atol=1e-5)
    assert np.isfinite(encoder.encode_text(["word " * 100]).vectors).all()


def test_size_in_the_repository():
    folders = (shipped.starter_checkpoint(), ROOT / "index" / "starter")
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= SIZE_LIMIT


def test_the_card_says_what_matters():
    card = (shipped.starter_checkpoint() / "README.md").read_text()
    for word in ("non-commercial", "CIDEr / BLEU-4", "R@10", "greedy", "beam 5", "16 reranked", "What it cannot do"):
        assert word in card


# -- when files are damaged


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of what is shipped, laid out as in an installed package, that may be damaged."""
    package = tmp_path / "site" / "clipcap_rag"
    shutil.copytree(shipped.starter_checkpoint(), package / "models" / "starter")
    shutil.copytree(ROOT / "index" / "starter", package / "indexes" / "starter")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return package


def sentence(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and "pip install --force-reinstall" in text and "the starter is damaged" in text
    return text


@pytest.mark.parametrize("file", ["model.safetensors", "clip/open_clip_model.safetensors", "tokenizer.json"])
def test_an_altered_file_is_named_with_the_remedy(copy, file):
    path = copy / "models/starter" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert Path(file).name in sentence(lambda: Captioner.from_pretrained("starter"))


def test_missing_files_are_named_with_the_remedy(copy):
    (copy / "models/starter/clip/open_clip_model.safetensors").unlink()
    assert "clip/open_clip_model.safetensors" in sentence(lambda: Captioner.from_pretrained("starter"))
    sentence(lambda: Encoder.load("starter"))
    shutil.rmtree(copy / "models")
    assert "config.json" in sentence(lambda: Captioner.from_pretrained("starter"))


@pytest.mark.parametrize("manifest", ["models/starter/config.json", "indexes/starter/index.json"])
def test_another_version_is_named_with_the_remedy(copy, manifest):
    path = copy / manifest
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    opener = Captioner.from_pretrained if "models" in manifest else CaptionIndex.open
    assert "format version 99" in sentence(lambda: opener("starter"))


def test_a_damaged_or_missing_index_is_named_with_the_remedy(copy, photos):
    captioner = Captioner.from_pretrained("starter", device="cpu", dtype="float32")
    captions = copy / "indexes/starter/segments/000001/captions.arrow"
    captions.write_bytes(captions.read_bytes()[:-100])
    assert "captions.arrow" in sentence(lambda: captioner.caption(photos[0]))
    shutil.rmtree(copy / "indexes")
    assert "index is missing" in sentence(lambda: captioner.caption(photos[0]))
    assert captioner.caption(photos[0], index=None)[0].caption
