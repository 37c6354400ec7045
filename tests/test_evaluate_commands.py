"""The commands evaluate and evaluate compare on files: tables, JSON, and errors as sentences."""

import json

import pytest

from clipcap_rag import cli

TEXTS = ["a red kite", "two boats lie there", "an old cat", "a dog in snow"]


@pytest.fixture
def files(tmp_path):
    references, first, second = (tmp_path / name for name in ("references.jsonl", "first.json", "second.json"))
    rows = [{"image": f"p{n}.jpg", "captions": [text, f"{text} again"]} for n, text in enumerate(TEXTS)]
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first.write_text(json.dumps([{"image_id": f"p{n}", "caption": text} for n, text in enumerate(TEXTS)]))
    second.write_text(json.dumps([{"image_id": f"p{n}", "caption": "a kite"} for n in range(4)]))
    return [str(path) for path in (first, second, references)]


def call(*arguments):
    return cli.main(["evaluate", *arguments])


def test_scores_as_a_table_and_as_json(files, capsys):
    first, _, references = files
    assert call(first, references, "--no-java") == 0
    table = capsys.readouterr().out
    assert "BLEU-4" in table and "METEOR is missing: " in table
    assert call(first, references, "--no-java", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["metrics"]["CIDEr"]) == {"value", "low", "high"} and result["images"] == 4


def test_comparison_as_a_table_and_as_json(files, capsys, tmp_path):
    first, second, references = files
    assert call("compare", first, second, references, "--no-java") == 0
    assert "first - second" in capsys.readouterr().out
    stored = []
    for path in (first, second):
        assert call(path, references, "--no-java", "--json") == 0
        stored.append(tmp_path / f"{len(stored)}.json")
        stored[-1].write_text(capsys.readouterr().out)
    assert call("compare", *map(str, stored), "--no-java", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["ROUGE-L"]["difference"]["value"] > 0


def test_studies_of_a_captioner(world, tmp_path, capsys):
    words = ("--model", world.run, "--features", world.features.path, "--out", tmp_path / "out", "--index", "default")
    quick = ("--decodings", "greedy", "--max-new-tokens", "5", "--images", "4")
    assert call(*map(str, words), *quick, "--studies", "robustness,leaks", "--baseline", f"again={world.run}") == 0
    shown = capsys.readouterr().out
    assert "wrong majority of own" in shown and "\nharm, greedy, features: CIDEr " in shown
    assert call(*map(str, words), *quick, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("flags", [("--studies", "rubust"), ("--baseline", "nameless"), ("--candidate-sizes", "0")])
def test_a_mistake_is_one_sentence(world, tmp_path, capsys, flags):
    words = ("--model", world.run, "--features", world.features.path, "--out", tmp_path / "out")
    assert call(*map(str, words), *flags) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["[{", "null", "3", '"a"', "[1]", "{}", '[{"image_id": "p0", "caption": "a"}]'])
def test_unusable_predictions_are_one_sentence(files, capsys, tmp_path, broken):
    path = tmp_path / "broken.json"
    path.write_text(broken)
    for arguments in (
        (str(path), files[2]),
        ("compare", files[0], str(path), files[2]),
        ("compare", str(path), files[0]),
    ):
        assert call(*arguments, "--no-java") == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert "CLIPCAP_RAG_TRACEBACK" not in output.err
