"""A sweep: every preset with every value is trained and scored once, continued, extended and drawn."""

import json

import pytest
from PIL import Image

from clipcap_rag.cli import main
from clipcap_rag.errors import InputError
from clipcap_rag.sweep import setting_values, sweep, table

TINY = {
    "epochs": 1,
    "batch_size": 16,
    "mapper_layers": 1,
    "mapper_heads": 2,
    "clip_length": 2,
    "warmup": 0.1,
    "validation_images": 2,
}


def run(world, tiny_lm, out, values=(1, 3), presets=("clipcap-mlp", "clipcap-transformer"), **more):
    return sweep(
        world.features.path,
        world.features.path,
        more.pop("index", None),
        str(tiny_lm),
        out,
        setting=more.pop("setting", "prefix_length"),
        values=values,
        presets=presets,
        settings=TINY | more,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture(scope="module")
def swept(world, tiny_lm, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "lengths"
    return out, run(world, tiny_lm, out)


def test_every_preset_is_scored_with_every_value(swept):
    out, result = swept
    variants = [("clipcap-mlp", 1), ("clipcap-mlp", 3), ("clipcap-transformer", 1), ("clipcap-transformer", 3)]
    assert [(row["preset"], row["value"]) for row in result["rows"]] == variants
    assert all(set(row[decoding]) == {"CIDEr", "BLEU-4"} for row in result["rows"] for decoding in ("greedy", "beam"))
    assert json.loads((out / "sweep.json").read_text()) == result
    for preset, value in variants:
        job = json.loads((out / "runs" / f"{preset}-{value}" / "run.json").read_text())
        assert job["finished"] and job["model"]["prefix_length"] == value
        assert job["model"]["mapper"] == preset.removeprefix("clipcap-") and job["index"] is None


def test_what_learns_is_counted(swept):
    counts = {(row["preset"], row["value"]): row["learned_parameters"] for row in swept[1]["rows"]}
    two_constants = 2 * 32  # and nothing of the language model, which is frozen
    assert counts["clipcap-transformer", 3] - counts["clipcap-transformer", 1] == two_constants
    assert counts["clipcap-mlp", 1] == (24 * 16 + 16) + (16 * 32 + 32) + _language_model_size(swept[0])


def test_it_is_drawn(swept):
    with Image.open(swept[0] / "sweep.png") as picture:
        assert picture.width > 2 * picture.height and len(picture.convert("RGB").getcolors(10**6)) > 10


def test_it_goes_on_where_it_was_and_takes_more_values(world, tiny_lm, swept, tmp_path):
    out, first = tmp_path / "sweep", swept[1]
    run(world, tiny_lm, out, values=(3,))
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/last/model.safetensors")}
    assert run(world, tiny_lm, out) == first  # as if it had been done at once
    assert len(before) == 2 and all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_run_that_was_trained_but_not_scored_is_kept(world, tiny_lm, swept, tmp_path):
    out = tmp_path / "sweep"
    result = run(world, tiny_lm, out, values=(1,), presets=("clipcap-mlp",))
    stored = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps(stored | {"rows": []}))
    weights = out / "runs/clipcap-mlp-1/last/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(world, tiny_lm, out, values=(1,), presets=("clipcap-mlp",)) == result
    assert weights.stat().st_mtime_ns == before


def test_the_index_goes_to_the_mapper_that_uses_it(world, tiny_lm, tmp_path, capsys):
    words = ["sweep", "language_model_tuning=full,frozen", "--features", world.features.path, "--out", tmp_path / "two"]
    words += ["--validation-features", world.features.path, "--language-model", tiny_lm, "--index", world.index.path]
    words += ["--preset", "rag", "--preset", "clipcap-mlp", "--neighbor-pool", 6, "--max-neighbors", 3]
    words += ["--device", "cpu"]
    for name, value in TINY.items():
        words += ["--" + name.replace("_", "-"), value]
    assert main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| preset | language_model_tuning | learns | CIDEr greedy |") and len(lines) == 6
    stored = json.loads((tmp_path / "two" / "sweep.json").read_text())
    assert table(stored).splitlines() == lines
    indexes = {name: json.loads((tmp_path / "two/runs" / name / "run.json").read_text())["index"]
               for name in ("rag-full", "clipcap-mlp-full")}  # fmt: skip
    assert indexes["clipcap-mlp-full"] is None and indexes["rag-full"][0] == str(world.index.path)


def test_contradictions_are_refused(world, tiny_lm, swept, tmp_path):
    with pytest.raises(InputError, match="epochs: 1 -> 2"):
        run(world, tiny_lm, swept[0], epochs=2)
    with pytest.raises(InputError, match="prefix_length is swept and given as 4"):
        run(world, tiny_lm, tmp_path / "a", prefix_length=4)
    with pytest.raises(InputError, match="looks at neighbours"):
        run(world, tiny_lm, tmp_path / "a", index=world.index.path)
    with pytest.raises(InputError, match="prefix_length is 0"):
        run(world, tiny_lm, tmp_path / "a", values=(1, 0))
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists already"):
        run(world, tiny_lm, tmp_path / "mine")


def test_settings_with_values():
    assert setting_values("prefix_length=1,5,10") == ("prefix_length", [1, 5, 10])
    assert setting_values("learning_rate=1e-3,2e-5") == ("learning_rate", [1e-3, 2e-5])
    assert setting_values("normalize=on,off") == ("normalize", [True, False])
    assert setting_values("language_model_tuning=full") == ("language_model_tuning", ["full"])


@pytest.mark.parametrize(
    "text, named",
    [
        ("prefix_length", "such as prefix_length=1,5,10"),
        ("prefix_length=", "such as"),
        ("clip_dim=1,2", "names no setting"),
        ("prefix_length=1,x", "not int"),
        ("normalize=yes", "on or off"),
    ],
)
def test_what_is_no_setting_with_values_is_refused(text, named):
    with pytest.raises(InputError, match=named):
        setting_values(text)


def _language_model_size(out):
    from clipcap_rag.checkpoint import read_checkpoint

    model = read_checkpoint(out / "runs/clipcap-mlp-1/best").model
    return sum(parameter.numel() for parameter in model.language_model.parameters())
