"""Metrics in Java: the values of coco-caption, and one sentence for whatever keeps the programs from running."""

import json
import shutil

import numpy as np
import pytest

from clipcap_rag import java_metrics
from clipcap_rag.bootstrap import estimates
from clipcap_rag.errors import InputError
from clipcap_rag.java_metrics import java_fault, java_tokenize, meteor, spice, spice_fault

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
REFERENCES = [
    ["a brown dog runs along the beach", "the dog is running by the sea"],
    ["two children build a castle of sand"],
    ["an old woman sells flowers at the market", "a woman with flowers", "market stall with flowers ||| and fruit"],
    ["a red kite"],
    ["a cat sleeps"],
]
CAPTIONS = [
    "a puppy runs on the beach",
    "children make sandcastles",
    "a woman is selling ||| flowers",
    "",
    "a cat sleeps",
]


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a program called java first on the PATH."""

    def install(script: str) -> None:
        program = tmp_path / "java"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@needs_java
def test_tokenizer_is_that_of_coco_caption():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = [
        "A man's \"best\" friend (a dog) isn't here...",
        "Two naïve cats; 日本 & 3,000 €",
        "U.S. flag - red/white/blue!",
    ]
    expected = PTBTokenizer().tokenize({row: [{"caption": caption}] for row, caption in enumerate(captions)})
    assert java_tokenize(captions) == [expected[row][0] for row in range(len(captions))]


@needs_java
def test_tokenizer_keeps_empty_captions_and_strange_spaces_in_their_places():
    captions = ["", "a dog", "  ", "one\u2028two\nthree\x85four\u00a0five", "...", ""]
    assert java_tokenize(captions) == ["", "a dog", "", "one two three four five", "", ""]


@needs_java
def test_meteor_is_that_of_coco_caption():
    from pycocoevalcap.meteor.meteor import Meteor

    plain = [[text.replace(" |||", "") for text in texts] for texts in REFERENCES]
    judged = {row: [caption or " "] for row, caption in enumerate(CAPTIONS)}
    whole, each = Meteor().compute_score(dict(enumerate(plain)), judged)
    measure = meteor(REFERENCES, CAPTIONS)["METEOR"]
    assert estimates({"METEOR": measure})["METEOR"].value == pytest.approx(whole, rel=1e-9)
    assert measure.combine(measure.statistics) == pytest.approx(each, rel=1e-9)
    assert each[3] == 0 and each[4] == 1.0


def test_no_java_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no java on the PATH; install" in java_fault()
    assert spice_fault() == java_fault()
    for compute in (meteor, spice):
        with pytest.raises(InputError, match="no java on the PATH"):
            compute(REFERENCES, CAPTIONS)


def test_missing_models_of_spice_are_named(fake_java):
    fake_java("exit 0")
    models = java_metrics._home() / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar"
    assert (spice_fault() is None) == models.is_file()
    if not models.is_file():
        assert models.name in spice_fault() and "get_stanford_models" in spice_fault()


def test_a_program_that_fails_is_one_sentence(fake_java):
    fake_java("echo first >&2; echo 'Error: out of heap' >&2; exit 3")
    with pytest.raises(
        InputError, match=r"meteor-1\.5\.jar failed with status 3 \(Error: out of heap\); use --no-java"
    ):
        meteor(REFERENCES, CAPTIONS)


def test_a_program_that_hangs_is_stopped(fake_java, monkeypatch):
    fake_java("exec sleep 60")
    monkeypatch.setattr(java_metrics, "_START", 0.2)
    with pytest.raises(InputError, match="was stopped after 1 s without an end"):
        meteor(REFERENCES, CAPTIONS)


def test_answers_that_are_none_are_one_sentence(fake_java):
    fake_java("cat > /dev/null; echo what now")
    with pytest.raises(InputError, match="something else than its counts"):
        meteor(REFERENCES, CAPTIONS)
    with pytest.raises(InputError, match="made 1 lines of 4 captions"):
        java_tokenize(CAPTIONS)
    with pytest.raises(InputError, match="something else than scores"):
        spice(REFERENCES, CAPTIONS)


def test_spice_is_the_mean_of_what_its_program_answers(fake_java, tmp_path):
    """The program itself needs models that do not come with it: here another one answers in its form."""
    scores = [{"image_id": row, "scores": {"All": {"f": value}}} for row, value in enumerate([0.5, 0.25, None, 0, 1])]
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps(scores))
    asked = tmp_path / "asked.json"
    fake_java(f'while [ "$1" != -jar ]; do shift; done; cp "$3" {asked}; cp {answer} "$5"\n')
    measure = spice(REFERENCES, CAPTIONS)["SPICE"]
    assert estimates({"SPICE": measure})["SPICE"].value == pytest.approx(np.mean([0.5, 0.25, 0, 0, 1]))
    assert json.loads(asked.read_text())[1] == {"image_id": 1, "test": CAPTIONS[1], "refs": REFERENCES[1]}
