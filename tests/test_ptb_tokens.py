"""The tokenizer in Python: what the one in Java does with a caption."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipcap_rag.java_metrics import java_tokenize
from clipcap_rag.ptb_tokens import PYTHON_TOKENIZER, tokenize
from clipcap_rag.sources import BadLines, SourceOptions, read_captions

CASES = [
    ("A dog's ball, on the grass .", "a dog 's ball on the grass"),
    ("The man isn't here; he can't wait!", "the man is n't here he ca n't wait"),
    ('A sign says "stop" (in red)...', "a sign says stop -lrb- in red -rrb-"),
    ("Bread &amp; tea at 5 o'clock in the U.S.", "bread & tea at 5 o'clock in the u.s."),
    ("A t-shirt and a 3.5 m kite", "a t-shirt and a 3.5 m kite"),
    ("AT&T and r&b: red/white, 3/4 of £1,200 at 4:06pm", "at&t and r & b red/white 3/4 of # 1,200 at 4:06 pm"),
    (
        "Mr. Smith of Main St. lost hors d'oeuvres etc. at no. 5",
        "mr. smith of main st. lost hors d'oeuvres etc. at no. 5",
    ),
    (
        "He cannot, he's gonna smile :) in a U.S. D.V.D shop",
        "he can not he 's gon na smile :-rrb- in a u.s. d.v.d shop",
    ),
    ("naïve 日本 “quoted” café — fine…", "naïve 日本 quoted café fine"),
    ("", ""),
    ("...", ""),
]


@pytest.mark.parametrize(("caption", "tokens"), CASES)
def test_words_in_the_treebank_style(caption, tokens):
    assert tokenize(caption) == tokens


@pytest.mark.skipif(shutil.which("java") is None, reason="coco-caption's tokenizer needs Java")
def test_the_tokenizer_in_java_gives_the_same_words():
    assert java_tokenize([caption for caption, _ in CASES]) == [tokens for _, tokens in CASES]


@pytest.mark.photos
@pytest.mark.skipif("CLIPCAP_RAG_DATA" not in os.environ, reason="CLIPCAP_RAG_DATA does not name the captions")
@pytest.mark.skipif(shutil.which("java") is None, reason="coco-caption's tokenizer needs Java")
def test_agreement_with_java_is_what_the_result_says():
    data = Path(os.environ["CLIPCAP_RAG_DATA"])
    names = {"cc3m_val", "coco_val2017_minus_mini", "commongen_train", "flickr30k_minus_flickr8k", "image_coco_20k"}
    files = [data / "captions" / f"{name}.jsonl.gz" for name in sorted(names)]
    files += [data / "flickr8k" / f"captions_{split}.jsonl" for split in ("dev", "train")]
    captions = [record.caption for record in read_captions(files, SourceOptions(), BadLines())]
    expected = java_tokenize(captions)
    agreement = np.mean([tokenize(caption) == words for caption, words in zip(captions, expected, strict=True)])
    assert f"{len(captions):,} captions" in PYTHON_TOKENIZER["measured_on"]
    assert round(float(agreement), 4) == PYTHON_TOKENIZER["agreement"]
