"""Mined phrases: where they end, how they are counted and ranked, and that spilling to disk changes nothing."""

import random
from math import log2

import pytest

from clipcap_rag import ngrams
from clipcap_rag.errors import InputError
from clipcap_rag.ngrams import PhraseOptions, mine_phrases, word_runs
from clipcap_rag.sources import BadLines, CaptionRecord, SourceOptions, read_captions


def mine(texts: list[str], **options) -> list[CaptionRecord]:
    return mine_phrases(lambda: [CaptionRecord(text) for text in texts], PhraseOptions(**options))


def phrases(texts: list[str], **options) -> list[str]:
    return [record.caption for record in mine(texts, **options)]


@pytest.mark.parametrize(
    "text, runs",
    [
        ("A kite flies. It is red!", [["A", "kite", "flies"], ["It", "is", "red"]]),
        ("the dog's T-shirt", [["the", "dog's", "T-shirt"]]),
        ("the dogs' tails", [["the", "dogs"], ["tails"]]),
        ("'so it is', he said -- twice", [["so", "it", "is"], ["he", "said"], ["twice"]]),
        ("black & white, $5 #kite", [["black"], ["white"], ["5"], ["kite"]]),
        ("नीली पतंग। लाल पतंग", [["नीली", "पतंग"], ["लाल", "पतंग"]]),
        ("... -- !", []),
    ],
)
def test_words_stand_side_by_side_or_in_another_run(text, runs):
    assert list(word_runs(text)) == runs


def test_no_phrase_spans_texts_or_sentences_or_holds_punctuation():
    texts = ["red kite. blue sea", "red kite , blue sea", "red kite", "blue sea"] * 3
    assert phrases(texts, ngrams="2,3", min_count=1) == ["blue sea", "red kite"]


def test_words_by_frequency_longer_phrases_by_pmi():
    texts = ["the kite"] * 4 + ["the sea"] * 3 + ["palo alto"] * 3 + ["rare"]
    mined = mine(texts, ngrams="1,2", min_count=3)
    singles = [record for record in mined if record.meta["words"] == "1"]
    assert [(record.caption, record.meta["count"]) for record in singles] == [
        ("the", "7"), ("kite", "4"), ("alto", "3"), ("palo", "3"), ("sea", "3")
    ]  # fmt: skip
    pairs = {record.caption: float(record.meta["pmi"]) for record in mined[len(singles) :]}
    assert list(pairs) == ["palo alto", "the kite", "the sea"]
    words = 21
    assert pairs["palo alto"] == pytest.approx(log2(3 * words / (3 * 3)), abs=1e-3)
    assert pairs["the kite"] == pytest.approx(log2(4 * words / (7 * 4)), abs=1e-3)
    assert phrases(texts, ngrams="1,2", min_count=3, top=1) == ["the", "palo alto"]


def test_pmi_of_three_words_counts_all_three():
    texts = ["big red kite"] * 3 + ["big", "red", "kite"]
    (mined,) = mine(texts, ngrams="3")
    assert float(mined.meta["pmi"]) == pytest.approx(log2(3 * 12**2 / 4**3), abs=1e-3)


def test_case_is_kept_or_folded():
    texts = ["Red kite"] * 3 + ["red kite"] * 2
    assert phrases(texts, ngrams="2") == ["Red kite"]
    assert [(record.caption, record.meta["count"]) for record in mine(texts, ngrams="2", fold_case=True)] == [
        ("red kite", "5")
    ]


def test_a_phrase_that_is_a_text_of_its_own_stands_once():
    texts = ["Red kite."] + ["a red kite flies"] * 3
    assert "red kite" in phrases(texts, ngrams="2", fold_case=True)
    assert "red kite" not in phrases(texts, ngrams="2", fold_case=True, lines=True)


def test_counts_are_exact_however_small_the_table(monkeypatch):
    draw = random.Random(3)
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(800)]
    whole = mine(texts, ngrams="1,2,3", min_count=2, top=500)
    monkeypatch.setattr(ngrams, "TABLE", 50)
    monkeypatch.setattr(ngrams, "_RUNS", 3)
    assert mine(texts, ngrams="1,2,3", min_count=2, top=500) == whole
    assert len(whole) > 500


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"ngrams": "0"}, "ngrams is '0'"),
        ({"ngrams": "1,two"}, "ngrams is '1,two'"),
        ({"ngrams": ""}, "ngrams is ''"),
        ({"ngrams": "1", "top": 0}, "top is 0"),
        ({"lines": True}, "--ngrams"),
    ],
)
def test_contradictions_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PhraseOptions(**options)


def test_a_folder_of_texts_is_read_and_its_blank_lines_part_paragraphs(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("red kite\n\nblue sea\n")
    (tmp_path / "b" / "c.txt").write_text("green hill\n")
    read = [(record.caption, record.source) for record in
            read_captions([tmp_path], SourceOptions(), BadLines(), prose=True)]  # fmt: skip
    assert read == [("red kite", "a"), ("blue sea", "a"), ("green hill", "b/c")]
    with pytest.raises(InputError, match="a.txt:2"):
        list(read_captions([tmp_path], SourceOptions(), BadLines()))
