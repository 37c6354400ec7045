"""Reports: what an evaluation wrote, photo by photo, and photos that are gone named with the reason."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from clipcap_rag import cli
from clipcap_rag.config import EvaluationConfig, GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.evaluation import evaluate
from clipcap_rag.metrics import caption_metrics
from clipcap_rag.report import gather, write_report
from clipcap_rag.report_page import thumbnail

SHORT = GenerationConfig(candidates=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def evaluation(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    config = EvaluationConfig(studies="table,robustness", decodings="greedy,sample", random_neighbors=True)
    evaluate(world.run, [world.features.path], out, generation=SHORT, config=config)
    return out


def lines(evaluation, name):
    return [json.loads(line) for line in (evaluation / "features" / f"{name}.jsonl").read_text().splitlines()]


def test_photos_come_with_what_was_written_of_them(world, evaluation, tmp_path):
    page = write_report(evaluation, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["results"] == json.loads((evaluation / "results.json").read_text())
    (gallery,) = report["galleries"]
    assert gallery["photos"] == len(gallery["entries"]) == 8 and gallery["decoding"] == "sample"
    assert (gallery["conditions"][gallery["on"]], gallery["conditions"][gallery["off"]]) == (world.index.name, "none")
    sides = {"on": lines(evaluation, f"{world.index.name}-sample"), "off": lines(evaluation, "none-sample")}
    for entry in gallery["entries"]:
        row = world.features.images.index(entry["image"])
        assert entry["references"] == world.features.captions[row] and "problem" not in entry
        for side, written in sides.items():
            told = entry["captions"][gallery[side]]
            assert told["caption"] == (written[row]["caption"] or "")
            assert [one["caption"] for one in told["candidates"]] == [
                one["caption"] for one in written[row]["candidates"]
            ]
            assert [one["caption"] for one in told["neighbors"]] == [
                one["caption"] for one in written[row]["neighbors"]
            ]
        assert entry["captions"][gallery["on"]]["neighbors"] and not entry["captions"][gallery["off"]]["neighbors"]
    on = [entry["captions"][gallery["on"]]["cider"] for entry in gallery["entries"]]
    assert on == sorted(on, reverse=True)
    expected = caption_metrics(world.features.captions, [line["caption"] or "" for line in sides["on"]])["CIDEr"]
    assert gallery["scores"]["on"]["value"] == pytest.approx(expected)
    assert sum(on) / len(on) == pytest.approx(expected, abs=1e-3)
    values = {side: score["value"] for side, score in gallery["scores"].items()}
    assert values["gain"] == pytest.approx(values["on"] - values["off"])
    assert page.stat().st_size < 300_000


def test_each_file_of_captions_is_a_condition_once(world, evaluation):
    (gallery,) = gather(evaluation, 200)["galleries"]
    names = gallery["conditions"]
    assert len(set(names)) == len(names) and f"wrong majority of {world.index.name}" in names
    assert all(len(entry["captions"]) == len(names) for entry in gallery["entries"])


def test_a_part_of_the_photos_is_the_best_and_the_worst(evaluation):
    ciders = []
    for most in (200, 3):
        (gallery,) = gather(evaluation, most)["galleries"]
        ciders.append([(entry["image"], entry["captions"][gallery["on"]]["cider"]) for entry in gallery["entries"]])
    everything, part = ciders
    assert part == everything[:2] + everything[-1:] and gallery["photos"] == 8


def test_an_evaluation_without_retrieval_has_one_side(world, tmp_path):
    config = EvaluationConfig(decodings="greedy")
    evaluate(world.run, [world.features.path], tmp_path, indexes=[], generation=SHORT, config=config)
    (gallery,) = gather(tmp_path, 200)["galleries"]
    assert gallery["on"] is None and set(gallery["scores"]) == {"off"} and "changed" not in gallery
    assert gallery["decoding"] == "greedy"


def test_a_photo_that_cannot_be_read_is_named(world, evaluation, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(world.photos, photos)
    (photos / "photo-1.jpg").write_bytes(b"no picture")
    (photos / "photo-2.jpg").unlink()
    (photos / "moved").mkdir()
    (photos / "photo-3.jpg").rename(photos / "moved" / "photo-3.jpg")
    page = write_report(evaluation, tmp_path / "report", photos)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    problems = {entry["image"]: entry.get("problem") for entry in report["galleries"][0]["entries"]}
    assert {name for name, problem in problems.items() if problem} == {"photo-1.jpg", "photo-2.jpg"}
    assert "not an image" in problems["photo-1.jpg"] and "there is no image" in problems["photo-2.jpg"]
    assert "2 of 8 photos of features cannot be shown" in capsys.readouterr().err
    assert page.read_text().count("data:image/jpeg;base64,") == 6


def test_folders_that_are_gone(world, evaluation, tmp_path):
    with pytest.raises(InputError, match="give --photos"):
        write_report(evaluation, tmp_path / "report", tmp_path / "nowhere")
    manifest = world.features.path / "features.json"
    stored = manifest.read_text()
    try:
        manifest.write_text(stored.replace(str(world.photos), str(tmp_path / "nowhere")))
        write_report(evaluation, tmp_path / "report")
    finally:
        manifest.write_text(stored)
    entries = json.loads((tmp_path / "report" / "report.json").read_text())["galleries"][0]["entries"]
    assert all("is gone; give --photos" in entry["problem"] for entry in entries)


def test_a_thumbnail_is_a_small_jpeg(tmp_path):
    Image.new("RGB", (900, 600), "teal").save(tmp_path / "large.png")
    kind, _, content = thumbnail(tmp_path / "large.png").partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.format == "JPEG" and picture.size == (240, 160)


def test_the_command_writes_it(world, tmp_path, capsys):
    words = [
        "evaluate",
        "--model",
        str(world.run),
        "--features",
        str(world.features.path),
        "--out",
        str(tmp_path / "e"),
    ]
    words += ["--decodings", "greedy", "--max-new-tokens", "8"]
    assert cli.main([*words, "--report", str(tmp_path / "r"), "--report-photos", "4"]) == 0
    assert f"wrote {tmp_path / 'r' / 'report.html'}" in capsys.readouterr().err
    (gallery,) = json.loads((tmp_path / "r" / "report.json").read_text())["galleries"]
    assert len(gallery["entries"]) == 4
    assert cli.main([*words, "--photos", str(world.photos)]) == 2
    assert "--photos is for --report" in capsys.readouterr().err
    assert cli.main([*words, "--report", str(tmp_path / "r"), "--photos", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
