"""The command line: flags from the configurations, errors as sentences, exit statuses, and the main job end to end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcap_rag import cli
from clipcap_rag.commands import COMMANDS
from clipcap_rag.config import (
    DownloadConfig,
    GenerationConfig,
    ImportConfig,
    IndexConfig,
    ModelConfig,
    RetrievalConfig,
    TrainConfig,
)
from clipcap_rag.errors import InputError
from clipcap_rag.flags import make_config
from clipcap_rag.judging import JudgingConfig
from clipcap_rag.neighbors import LISTED
from clipcap_rag.ngrams import PhraseOptions
from clipcap_rag.sources import SourceOptions

MINIMAL = {
    "index build": ["--captions", "a.jsonl", "--clip", "x", "--out", "o"],
    "index info": ["name"],
    "index search": ["name", "a dog"],
    "index verify": ["name"],
    "index add": ["name", "--caption", "a dog"],
    "index add-images": ["name", "--features", "f"],
    "index remove": ["name", "--caption-id", "7"],
    "index update": ["name", "--caption-id", "7", "--caption", "a cat"],
    "index compact": ["name"],
    "index lint": ["name"],
    "prepare coco": ["--karpathy", "k.json", "--out", "o"],
    "prepare flickr": ["--captions", "t.token", "--out", "o"],
    "prepare nocaps": ["--captions", "n.json", "--out", "o"],
    "prepare conceptual": ["list.tsv", "--out", "o"],
    "index import": ["cache.txt", "--clip", "x", "--out", "o"],
    "index export": ["name", "--format", "antarctic", "--out", "o"],
    "tag": ["photo.jpg", "--index", "name"],
    "extract": ["--captions", "a.jsonl", "--images", "i", "--clip", "x", "--out", "o"],
    "train": ["--features", "f", "--language-model", "g", "--out", "o"],
    "sweep": ["seed=0,1", "--features", "f", "--validation-features", "v", "--language-model", "g", "--out", "o"],
    "caption": ["photo.jpg", "--model", "m"],
    "calibrate": ["--model", "m", "--features", "f", "--out", "o"],
    "evaluate": ["--model", "m", "--features", "f", "--out", "o"],
    "evaluate compare": ["a.jsonl", "b.jsonl", "captions.jsonl"],
    "convert features": ["f.pkl", "--clip", "x", "--out", "o"],
    "convert pickle": ["f", "--out", "o.pkl"],
    "convert clipcap": ["w.pt", "--out", "o"],
    "push": ["starter", "--repo", "me/captioner"],
    "bench": ["--out", "o"],
    "doctor": [],
}
MADE_FROM = [
    ("index search", RetrievalConfig, ()),
    ("caption", RetrievalConfig, ()),
    ("evaluate", RetrievalConfig, ()),
    ("index build", IndexConfig, ()),
    ("index build", SourceOptions, ()),
    ("index build", PhraseOptions, ()),
    ("index import", IndexConfig, ()),
    ("index import", ImportConfig, ()),
    ("extract", SourceOptions, ()),
    ("prepare conceptual", DownloadConfig, ()),
    ("train", ModelConfig, ("clip_dim", "lm_dim")),
    ("train", TrainConfig, ()),
    ("sweep", ModelConfig, ("clip_dim", "lm_dim")),
    ("sweep", TrainConfig, ()),
    ("caption", GenerationConfig, ()),
    ("evaluate", JudgingConfig, ()),
    ("evaluate compare", JudgingConfig, ()),
    ("evaluate compare", SourceOptions, ()),
]


def parse(command: str, *more: str):
    return cli.parse([*command.split(), *MINIMAL[command], *more])


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


# -- parsing


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_parses_and_has_help(command, capsys):
    assert parse(command).run is COMMANDS[command].run
    with pytest.raises(SystemExit) as ended:
        cli.parse([*command.split(), "--help"])
    assert ended.value.code == 0
    assert COMMANDS[command].run.__doc__.splitlines()[0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command, config, omitted", MADE_FROM)
def test_every_field_is_a_flag_with_its_help_and_default(command, config, omitted, capsys):
    with pytest.raises(SystemExit):
        cli.parse([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        assert (flag + " " in shown) == (field.name not in omitted), flag
        if field.name in omitted:
            continue
        assert field.metadata["help"] in shown
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"{field.metadata['help']} (default: {field.default})" in shown
    assert make_config(config, parse(command)) == config()


@pytest.mark.parametrize("command, config, omitted", MADE_FROM)
def test_a_given_flag_reaches_its_field(command, config, omitted):
    for field in dataclasses.fields(config):
        if field.name in omitted:
            continue
        flag, choices = "--" + field.name.replace("_", "-"), field.metadata["choices"]
        if isinstance(field.default, bool):
            arguments, value = ["--no-" + flag[2:] if field.default else flag], not field.default
        elif choices:
            value = choices[-1]
            arguments = [flag, value]
        elif isinstance(field.default, int | float):
            value = type(field.default)(field.default * 2 or 1)
            arguments = [flag, str(value)]
        elif field.default == ():
            arguments, value = [flag, "a=b", flag, "c=d"], ["a=b", "c=d"]
        else:
            arguments, value = [flag, "Flat"], "Flat"
        assert getattr(parse(command, *arguments), field.name) == value, flag


def test_a_preset_is_shown_and_flags_override_it(capsys):
    assert parse("train").preset == "rag"
    train = ("train", "--features", "no-such-features", "--language-model", "g", "--out", "o")
    assert call(*train, "--preset", "clipcap-mlp", "--epochs", 2) == 2
    said = capsys.readouterr().err
    assert "preset clipcap-mlp: mapper mlp" in said and "epochs 2 instead of 10" in said
    assert "no feature set at no-such-features" in said


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "COMMAND"),
        (["captoin"], "caption"),
        (["caption"], "IMAGE"),
        (["caption", "a.jpg", "--model", "m", "--num-neighbours", "3"], "did you mean --num-neighbors?"),
        (["caption", "a.jpg", "--model", "m", "--top-p=0.5", "--topp=0.5"], "unknown argument --topp"),
        (["caption", "a.jpg", "--model", "m", "--num-neighbors", "-1"], "-1"),
        (["caption", "a.jpg", "--model", "m", "--batch-size", "0"], "0"),
        (["caption", "a.jpg", "--model", "m", "--candidates", "many"], "many"),
        (["caption", "a.jpg", "--model", "m", "--decoding", "best"], "best"),
        (["train", "--features", "f", "--language-model", "g", "--out", "o", "--epoch", "3"], "--epochs"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert named in output.err


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["caption", "a.jpg", "--model", "m", "--no-retrieval", "--index", "i"], "--no-retrieval contradicts"),
        (["caption", "a.jpg", "--model", "m", "--top-p", "0"], "top_p is 0.0"),
        (["train", "--features", "f", "--language-model", "g", "--out", "o", "--max-neighbors", "99"], "99"),
        (["evaluate"], "PREDICTIONS and REFERENCES, or --model, --features and --out"),
        (["evaluate", "p.json"], "p.json needs references"),
        (["evaluate", "p.json", "r.json", "--features", "f"], "--features is for writing captions"),
        (["evaluate", "p.json", "r.json", "--num-beams", "3"], "--num-beams is for writing captions"),
        (["evaluate", "--model", "m", "--features", "f", "--out", "o", "--no-java"], "--java is for PREDICTIONS"),
        (["evaluate", "p.json", "r.json", "--clip", "c"], "--clip c is of no use without --photos"),
        (["index", "search", "i"], "either sentences or --images"),
        (["index", "search", "i", "a dog", "--images", "a.jpg"], "either sentences or --images"),
    ],
)
def test_contradictions_are_found_before_any_work(arguments, named, capsys):
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err


def test_help_loads_no_heavy_package():
    code = (
        "import sys\n"
        "from clipcap_rag.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'faiss', 'autofaiss', 'transformers', 'open_clip', 'pyarrow', 'pandas', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["--help"], ["train", "--help"], ["index", "build", "--help"], ["--version"]):
        assert python("-c", code, *arguments).stderr == "[]\n"


# -- failures


def failing(error: BaseException):
    def run(given):
        raise error

    return run


@pytest.fixture
def fail(monkeypatch):
    """Makes `clipcap-rag doctor` raise an error."""

    def install(error: BaseException) -> None:
        command = dataclasses.replace(COMMANDS["doctor"], run=failing(error))
        monkeypatch.setitem(COMMANDS, "doctor", command)

    return install


@pytest.mark.parametrize(
    "error, status, named",
    [
        (InputError("no index at x; build it"), 2, "error: no index at x; build it\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("division by zero\nsecond line"), 2, "ZeroDivisionError: division by zero; set CLIPCAP_RAG"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 2, "out of memory"),
    ],
)
def test_failures_are_one_line_with_a_status(fail, capsys, error, status, named):
    fail(error)
    assert cli.main(["doctor"]) == status
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert named in output.err


def test_traceback_on_request(fail, monkeypatch):
    monkeypatch.setenv("CLIPCAP_RAG_TRACEBACK", "1")
    fail(ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_interrupt_from_outside():
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell hands on that it is ignored
        "from clipcap_rag import cli, commands\n"
        "def run(given):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "commands.COMMANDS['doctor'] = commands.Command(lambda parser: None, run)\n"
        "raise SystemExit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_closed_pipe_is_no_error(tmp_path):
    code = (
        "from clipcap_rag import cli, commands\n"
        "def run(given):\n"
        "    for _ in range(100000): print('x' * 100, flush=True)\n"
        "commands.COMMANDS['doctor'] = commands.Command(lambda parser: None, run)\n"
        "raise SystemExit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 141
    assert errors == ""


# -- the main job


@dataclasses.dataclass
class Job:
    folder: Path
    captions: Path
    photos: list[Path]
    clip: str

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_clip, tiny_lm):
    """A trained captioner with two indexes, made by commands."""
    folder = tmp_path_factory.mktemp("job")
    random, photos, rows, clip = np.random.default_rng(0), [], [], f"local-dir:{tiny_clip}"
    (folder / "photos").mkdir()
    colours = ["red", "green", "blue", "grey", "black", "white", "brown", "pink"]
    for number, colour in enumerate(colours * 2):
        path = folder / "photos" / f"photo{number}.jpg"
        Image.fromarray(random.integers(0, 256, (40, 56, 3), np.uint8)).save(path)
        photos.append(path)
        sentences = [f"a {colour} kite over hill {number}", f"someone flies a {colour} kite, number {number}"]
        rows.append({"image": path.name, "image_id": path.stem, "captions": sentences})
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = folder / "other.txt"
    other.write_text("".join(f"boat number {number} leaves the harbour\n" for number in range(12)))
    cpu = ("--device", "cpu", "--dtype", "float32")
    assert call("index", "build", "--captions", captions, "--clip", clip, "--out", folder / "own", *cpu) == 0
    assert call("index", "build", "--captions", other, "--clip", clip, "--out", folder / "other", *cpu) == 0
    source = ("--captions", captions, "--images", folder / "photos", "--clip", clip)
    assert call("extract", *source, "--out", folder / "features", "--workers", 0, *cpu) == 0
    small = ("--epochs", 1, "--batch-size", 8, "--prefix-length", 3, "--clip-length", 2, "--mapper-layers", 1,
             "--mapper-heads", 2, "--neighbor-pool", 10, "--validation-fraction", 0.2)  # fmt: skip
    start = ("--features", folder / "features", "--index", folder / "own", "--language-model", tiny_lm)
    assert call("train", *start, "--out", folder / "model", *small, *cpu) == 0
    return Job(folder, captions, photos, clip)


WRITE = ("--device", "cpu", "--dtype", "float32", "--candidates", "3", "--max-new-tokens", "6", "--seed", "1")


def captioned(capsys, *arguments: object, status: int = 0) -> list[dict]:
    capsys.readouterr()
    assert call("caption", *arguments, *WRITE, "--json") == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_captions_as_json_lines(job, capsys):
    results = captioned(capsys, *job.photos[:3], "--model", job / "model", "--num-neighbors", 4)
    assert [result["image"] for result in results] == [str(photo) for photo in job.photos[:3]]
    for result in results:
        assert list(result) == ["image", "caption", "candidates", "neighbors", "error"]
        assert result["error"] is None
        assert result["caption"] == result["candidates"][0]["caption"]
        assert set(result["candidates"][0]) == {
            *("caption", "clip_similarity", "log_probability", "agreement", "score")
        }
        assert len(result["neighbors"]) == 4
        assert set(result["neighbors"][0]) == {"row", "caption", "score", "index", "route"}
        assert {neighbor["index"] for neighbor in result["neighbors"]} == {"own"}


def test_retrieval_off_in_both_spellings(job, capsys):
    photo = job.photos[0]
    off = captioned(capsys, photo, "--model", job / "model", "--no-retrieval")
    assert off[0]["neighbors"] == []
    assert captioned(capsys, photo, "--model", job / "model", "--num-neighbors", 0) == off


def test_another_index_is_swapped_in(job, capsys):
    (result,) = captioned(capsys, job.photos[0], "--model", job / "model", "--index", job / "other")
    assert result["neighbors"] and all("harbour" in neighbor["caption"] for neighbor in result["neighbors"])
    both = ("--index", job / "own", "--index", f"{job / 'other'}:0.9")
    (result,) = captioned(capsys, job.photos[0], "--model", job / "model", *both, "--num-neighbors", 44)
    assert {neighbor["index"] for neighbor in result["neighbors"]} == {"own", "other"}


def test_a_bad_image_is_reported_and_the_rest_captioned(job, capsys, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(job.photos[0].read_bytes()[:200])
    missing = tmp_path / "missing.jpg"
    arguments = (bad, job.photos[0], missing, "--model", job / "model")
    results = captioned(capsys, *arguments, status=1)
    assert [result["error"] is None for result in results] == [False, True, False]
    assert all(result["caption"] is None and result["neighbors"] == [] for result in (results[0], results[2]))
    assert call("caption", *arguments, *WRITE) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"{job.photos[0]}: ") and output.out.count("\n") == 1
    assert "bad.jpg" in output.err and "missing.jpg" in output.err and "2 of 3 images failed" in output.err
    captioned(capsys, bad, "--model", job / "model", status=2)


def test_verbose_shows_neighbours_and_candidates(job, capsys):
    assert call("caption", job.photos[0], "--model", job / "model", "--verbose", *WRITE) == 0
    output = capsys.readouterr().out
    assert output.count("    near ") == LISTED and "    rank " in output and "kite" in output


def test_index_info_search_verify(job, capsys):
    assert call("index", "info", job / "own") == 0
    assert "captions    32" in capsys.readouterr().out
    assert call("index", "info", job / "own", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 32
    query = "a red kite over hill 0"
    assert call("index", "search", job / "own", query, "--num-neighbors", 2, "--json", "--device", "cpu") == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["neighbors"][0]["caption"] == query and found["neighbors"][0]["score"] == pytest.approx(1, abs=1e-2)
    assert len(found["neighbors"]) == 2
    assert call("index", "search", job / "own", "--images", job.photos[0], job / "no.jpg", "--device", "cpu") == 1
    assert "1 of 2 images failed" in capsys.readouterr().err
    assert call("index", "verify", job / "own", "--device", "cpu", "--dtype", "float32") == 0
    assert "sound; 32 rows, 32 captions encoded again" in capsys.readouterr().out


def test_index_verify_finds_other_vectors(job, capsys, tmp_path):
    import shutil

    from clipcap_rag.artifact import read_json, write_manifest

    copy = tmp_path / "own"
    shutil.copytree(job / "own", copy)
    path = next(copy.glob("segments/*/embeddings.npy"))
    vectors = np.load(path)
    manifest = read_json(copy / "index.json", "caption index")
    fields = {name: value for name, value in manifest.items() if name not in ("kind", "format_version", "files")}
    for damaged, named in (
        (-vectors, "does not give"),
        (vectors * 2, "instead of 1"),
        (vectors * np.nan, "length nan"),
    ):
        np.save(path, damaged)
        write_manifest(copy, "index.json", "caption index", 1, fields)
        assert call("index", "verify", copy, "--device", "cpu", "--dtype", "float32") == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("index build --captions {folder}/none.jsonl --clip {clip} --out {out}", "none.jsonl"),
        ("index build --captions {folder}/empty.jsonl --clip {clip} --out {out}", "empty.jsonl"),
        ("index build --captions {folder}/bad.jsonl --clip {clip} --out {out}", "bad.jsonl:2"),
        ("index build --captions {captions} --clip {clip} --out {folder}/own", "--overwrite"),
        ("index build --captions {captions} --clip {folder}/photos --out {out}", "photos"),
        ("index build --captions {captions} --clip {clip} --out {out} --device cuda:99", "cuda:99"),
        ("index info {folder}/none", "none"),
        ("extract --captions {captions} --images {folder}/none --clip {clip} --out {out}", "none"),
        ("train --features {folder}/none --index {folder}/own --language-model g --out {out}", "none"),
        ("train --features {folder}/features --language-model {lm} --out {out}", "--index"),
        ("caption {photo} --model {folder}/none", "none"),
        ("caption {folder}/own --model {folder}/model", "own"),
        ("caption {photo} --model {folder}/model --index {folder}/none", "none"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_left(job, tiny_lm, capsys, tmp_path, arguments, named):
    (job / "empty.jsonl").write_text("")
    (job / "bad.jsonl").write_text('{"caption": "a fine line"}\n{"text": "no caption"}\n')
    out = tmp_path / "out"
    filled = arguments.format(
        folder=job.folder, captions=job.captions, clip=job.clip, out=out, photo=job.photos[0], lm=tiny_lm
    )
    capsys.readouterr()
    assert cli.main([*filled.split()]) == 2
    output = capsys.readouterr()
    sentence = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert output.out == "" and len(sentence) == 1
    assert named in sentence[0] and "CLIPCAP_RAG_TRACEBACK" not in sentence[0]
    assert not out.exists()


def test_skip_bad_counts_and_lists(job, capsys):
    lines = ['{"caption": "a fine line"}', '{"text": "no caption"}', "{"]
    (job / "half.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ("--captions", job / "half.jsonl", "--clip", job.clip, "--out", job / "half", "--device", "cpu")
    assert call("index", "build", *arguments, "--skip-bad") == 0
    output = capsys.readouterr()
    assert "1 caption" in output.out
    assert "half.jsonl:2" in output.err and "half.jsonl:3" in output.err


def test_a_full_disk_is_one_sentence(job, capsys, monkeypatch, tmp_path):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    arguments = ("--captions", job.captions, "--clip", job.clip, "--out", out, "--device", "cpu")
    assert call("index", "build", *arguments) == 2
    assert "no space left" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "script", ["benchmark", "build_caption_index", "caption", "evaluate", "extract_features", "train"]
)
def test_scripts_are_thin_callers(script):
    path = Path(__file__).parents[1] / "scripts" / f"{script}.py"
    assert len(path.read_text().splitlines()) <= 15
    started = time.perf_counter()
    done = python(str(path), "--help", env=os.environ | {"PYTHONPATH": str(path.parents[1])})
    assert done.returncode == 0 and done.stdout.startswith("usage: clipcap-rag ")
    assert time.perf_counter() - started < 10
