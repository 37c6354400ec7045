"""Calibration: what the command writes, that it is measured on other photos than it is fitted to, and its use."""

import json

import numpy as np
import pytest
from PIL import Image

from clipcap_rag import cli
from clipcap_rag.abstention import Abstention
from clipcap_rag.calibration import calibrate
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError

# half of the photos have this in their references, so their captions are better than the others'
WRITE = GenerationConfig(candidates=3, max_new_tokens=4, temperature=1.5, prompt="rests quietly by the sea")
FLAGS = ("--candidates", "3", "--max-new-tokens", "4", "--temperature", "1.5", "--prompt", WRITE.prompt)
EXACT = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def calibrated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "sure"
    return out, calibrate(world.run, world.features.path, out, generation=WRITE, keep=0.75, **EXACT)


def test_the_folder_holds_the_fit_the_curve_and_a_picture(calibrated):
    out, measured = calibrated
    assert {path.name for path in out.iterdir()} == {"abstention.json", "background.npy", "risk_coverage.png"}
    assert Image.open(out / "risk_coverage.png").size[0] > 500
    stored = json.loads((out / "abstention.json").read_text())
    assert stored["measured"] == measured and stored["level"] == measured["level"]
    assert list(stored["signals"]) == ["agreement", "nearness", "similarity", "log_probability"]
    assert set(measured["AURC"]) == {"calibrated", *stored["signals"], "oracle", "chance"}
    assert (measured["photos"], measured["AURC"]["chance"]) == (8, 0.5)
    kept = [row for row in measured["curve"] if row["level"] >= measured["level"]]
    assert kept[-1]["coverage"] == 0.75 and measured["curve"][-1]["risk"] == 0.5


def test_every_photo_is_judged_by_a_fit_to_others(world, calibrated):
    """A fit to all photos, judged on these, gives other probabilities than those that were measured."""
    out, measured = calibrated
    captioner, abstention = Captioner.from_pretrained(world.run, **EXACT), Abstention.open(out)
    results = captioner.caption(
        embeddings=np.asarray(world.features.embeddings), generation=WRITE, abstention=abstention
    )
    inside = sorted((result.confidence.sure for result in results), reverse=True)
    assert [row["level"] for row in measured["curve"]] != pytest.approx(inside, abs=1e-3)


def test_the_same_photos_give_the_same_calibration(world, calibrated, tmp_path):
    assert (
        calibrate(world.run, world.features.path, tmp_path / "again", generation=WRITE, keep=0.75, **EXACT)
        == (calibrated[1])
    )
    for name in ("abstention.json", "background.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (calibrated[0] / name).read_bytes()


def test_captions_are_marked_and_shown(world, calibrated, capsys):
    out, _ = calibrated
    photos = [str(world.photos / name) for name in world.features.images[:3]]
    common = ["caption", *photos, "--model", str(world.run), *FLAGS, "--device", "cpu", "--dtype", "float32"]
    assert cli.main([*common, "--json", "--abstain", str(out)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    level = Abstention.open(out).level
    for result in found:
        assert result["caption"] and 0 < result["sure"] < 1 and result["abstained"] is (result["sure"] < level)
    assert cli.main([*common, "--abstain", f"{out}:1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{result['image']}: not sure: {result['caption']}" for result in found]
    assert cli.main([*common, "--abstain", f"{out}:0", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("not sure" in line for line in lines)
    assert [line.split() for line in lines if line.startswith("    sure")] == [
        ["sure", f"{result['sure']:.3f}"] for result in found
    ]
    assert cli.main([*common, "--json"]) == 0
    assert "sure" not in capsys.readouterr().out


def test_without_retrieval_there_is_no_nearest_caption(world, calibrated, tmp_path, capsys):
    out = tmp_path / "blind"
    given = ["--model", str(world.run), "--device", "cpu", "--dtype", "float32", *FLAGS]
    settings = ["--features", str(world.features.path), "--no-retrieval", "--out", str(out)]
    assert cli.main(["calibrate", *given, *settings]) == 0
    assert f"use caption --abstain {out}" in capsys.readouterr().out
    assert Abstention.open(out).names == ("agreement", "similarity", "log_probability")
    photo = str(world.photos / world.features.images[0])
    assert cli.main(["caption", photo, *given, "--no-retrieval", "--abstain", str(out)]) == 0
    for more in ([], ["--no-retrieval", "--candidates", "2"]):
        capsys.readouterr()
        assert cli.main(["caption", photo, *given, *more, "--abstain", str(out)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "the calibration is for" in said.err


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"good": 9.0}, "none of"),
        ({"good": 0.0}, "all of"),
        ({"index": "none"}, "none"),
    ],
)
def test_unusable_settings_leave_nothing(world, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        calibrate(world.run, world.features.path, tmp_path / "sure", generation=WRITE, **settings, **EXACT)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays(world, calibrated):
    with pytest.raises(InputError, match="--overwrite"):
        calibrate(world.run, world.features.path, calibrated[0], generation=WRITE, **EXACT)
