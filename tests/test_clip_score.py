"""CLIPScore and RefCLIPScore: the paper's formula, and a word on whose CLIP it was."""

import numpy as np
import pytest

from clipcap_rag.bootstrap import estimates
from clipcap_rag.clip_score import ClipScores, clip_scores, independence
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError

EXACT = ("cpu", "float32")


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return Encoder.load(f"local-dir:{tiny_clip}", *EXACT)


def test_scores_follow_the_formula(encoder, photo_folder, tiny_captions):
    photos = sorted(photo_folder.iterdir())[:3]
    images = encoder.encode_image(photos).embeddings.vectors
    references = [tiny_captions[0:2], tiny_captions[2:3], tiny_captions[3:8]]
    captions = [tiny_captions[9], "", tiny_captions[4]]
    measures = ClipScores(encoder, images)(references, captions)

    def embed(text):
        return encoder.encode_text([f"A photo depicts {text}"]).vectors[0]

    near = [2.5 * max(0, embed(caption) @ image) for caption, image in zip(captions, images, strict=True)]
    like = [max(0, *(embed(caption) @ embed(text) for text in texts))
            for caption, texts in zip(captions, references, strict=True)]  # fmt: skip
    both = [2 * a * b / (a + b) if a + b else 0 for a, b in zip(near, like, strict=True)]
    found = {name: estimate.value for name, estimate in estimates(measures).items()}
    assert found == pytest.approx({"CLIPScore": np.mean(near), "RefCLIPScore": np.mean(both)}, abs=1e-5)
    assert like[2] == pytest.approx(1, abs=1e-5)  # it is one of its references


def test_the_captioners_own_clip_is_named(encoder, other_clip, world):
    own = independence(encoder, str(world.run))
    assert own["independent"] is False and "own CLIP model" in own["note"]
    other = independence(Encoder.load(f"local-dir:{other_clip}", *EXACT), str(world.run))
    assert other["independent"] is True and other["note"] == ""
    unknown = independence(encoder, None)
    assert unknown["independent"] is None and "not known" in unknown["note"]


def test_missing_and_unreadable_photos_are_named(tiny_clip, photo_folder, tmp_path):
    clip = f"local-dir:{tiny_clip}"
    with pytest.raises(InputError, match=r"1 of the photos are not below .*, such as no\.jpg"):
        clip_scores(clip, photo_folder, [("photo-0.jpg", "photo-0"), ("no.jpg", "no")], None, *EXACT)
    with pytest.raises(InputError, match="does not exist"):
        clip_scores(clip, tmp_path / "none", [], None, *EXACT)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.jpg.*CLIPScore needs every photo"):
        clip_scores(clip, tmp_path, [("bad.jpg", "bad")], None, *EXACT)
