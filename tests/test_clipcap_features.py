"""Feature pickles of other projects become feature sets, and those that are misaligned are refused."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipcap_rag import cli
from clipcap_rag.clipcap_features import import_pickle
from clipcap_rag.encoder import Encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet

D = 24  # of tiny_clip


@pytest.fixture
def given(tmp_path, tiny_clip):
    """Writes a pickle and imports it with tiny_clip."""

    def write(embeddings, captions) -> Path:
        content = {"clip_embedding": embeddings, "captions": captions}
        (tmp_path / "given.pkl").write_bytes(pickle.dumps(content))
        return tmp_path / "given.pkl"

    def read(embeddings, captions, **options) -> FeatureSet:
        clip = options.pop("clip", f"local-dir:{tiny_clip}")
        return import_pickle(write(embeddings, captions), clip, tmp_path / "out", device="cpu", **options)

    return SimpleNamespace(write=write, read=read, out=tmp_path / "out")


def rows(count: int, seed: int = 1) -> torch.Tensor:
    return 8 * torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).half()


def entry(image_id, caption: str, row) -> dict:
    return {"image_id": image_id, "caption": caption, "id": 7, "clip_embedding": row}


def refused(given, embeddings, captions, **options) -> str:
    with pytest.raises(InputError) as error:
        given.read(embeddings, captions, **options)
    assert not given.out.exists() and not given.out.with_name("out.partial").exists()
    message = str(error.value)
    assert "\n" not in message and ". " not in message
    return message


# -- what is read


def test_a_row_per_caption_as_for_coco(given, tiny_clip):
    photos = rows(3)
    captions = [entry(n, f"photo {n} in words {m}", 2 * n + m) for n in range(3) for m in range(2)]
    features = given.read(photos.repeat_interleave(2, dim=0), captions)
    assert features.image_ids == features.images == ["0", "1", "2"]
    assert features.captions == [[f"photo {n} in words {m}" for m in range(2)] for n in range(3)]
    assert features.embeddings.dtype == np.float16 and np.array_equal(features.embeddings, photos.numpy())
    assert features.encoder == Encoder.load(f"local-dir:{tiny_clip}", "cpu").record()
    assert len(set(features.digests)) == 3 and {len(digest) for digest in features.digests} == {16}
    assert FeatureSet.open(given.out).captions == features.captions


def test_several_captions_of_a_row_in_any_order(given):
    captions = [entry(f"{n:08d}", f"round {m} of {n}", n) for m in range(2) for n in range(4)]
    features = given.read(rows(4).float(), captions)
    assert features.image_ids == ["00000000", "00000001", "00000002", "00000003"]
    assert features.captions[3] == ["round 0 of 3", "round 1 of 3"]
    assert np.array_equal(features.embeddings, rows(4).numpy())


def test_captions_without_image_id_take_their_row(given):
    captions = [{"caption": "one", "clip_embedding": 1}, {"caption": "two", "clip_embedding": 0}]
    features = given.read(rows(2), captions)
    assert features.image_ids == ["row-1", "row-0"] and features.captions == [["one"], ["two"]]
    assert np.array_equal(features.embeddings, rows(2).numpy()[::-1])


def test_rows_without_captions_are_left_out_and_told(given, capsys):
    features = given.read(rows(5), [entry("a", "first", 3), entry("b", "second", 1)])
    assert np.array_equal(features.embeddings, rows(5).numpy()[[3, 1]])
    assert "3 of the 5 rows" in capsys.readouterr().err


def test_the_pickle_of_clip_text_decoder(tmp_path, tiny_clip):
    content = [(row.numpy()[None], [f"photo {n}", f"again {n}"]) for n, row in enumerate(rows(3).float())]
    (tmp_path / "decoder.pkl").write_bytes(pickle.dumps(content))
    features = import_pickle(tmp_path / "decoder.pkl", str(tiny_clip), tmp_path / "out", device="cpu")
    assert features.captions == [captions for _, captions in content]
    assert np.array_equal(features.embeddings, rows(3).numpy())


def test_numbers_of_numpy_and_bfloat16(given):
    captions = [entry(np.int64(5), "text", np.int32(1))]
    features = given.read(rows(2).bfloat16(), captions)
    assert features.image_ids == ["5"]
    assert np.array_equal(features.embeddings, rows(2).bfloat16()[1:].half().numpy())


# -- what is refused


def conceptual(validation: int, training: int) -> tuple[torch.Tensor, list[dict]]:
    """What a script makes that numbers the rows of each part from 0 but keeps the rows of the first for the second."""
    embeddings, captions = [], []
    for count, seed in ((validation, 2), (training, 3)):
        embeddings += list(rows(count, seed))
        captions += [
            {"image_id": f"{n:08d}", "caption": f"{seed} says {n}.", "clip_embedding": n} for n in range(count)
        ]
    return torch.stack(embeddings), captions


@pytest.mark.parametrize("validation, training", [(3, 8), (8, 3), (4, 4), (1, 5)])
def test_the_misaligned_pickle_of_conceptual_captions(given, validation, training):
    message = refused(given, *conceptual(validation, training))
    assert f"again at captions[{validation}]" in message and "clipcap-rag extract" in message


@pytest.mark.parametrize("validation, training", [(3, 0), (0, 8)])
def test_its_parts_alone_are_right(given, validation, training):
    embeddings, captions = conceptual(validation, training)
    assert np.array_equal(given.read(embeddings, captions).embeddings, embeddings.numpy())


def test_a_misaligned_part_with_other_names(given):
    embeddings, captions = conceptual(4, 9)
    kept = [caption | {"image_id": str(n)} for n, caption in enumerate(captions) if n != 7]
    assert "belongs to the images 0 and 4" in refused(given, embeddings, kept)


def test_rows_of_one_photo_that_differ(given):
    captions = [entry(1, "a", 0), entry(2, "b", 1), entry(1, "c", 2)]
    message = refused(given, rows(3), captions)
    assert "rows 0 and 2 both belong to image 1 and differ" in message
    near = rows(3)
    near[2] = near[0] * 1.002
    assert len(given.read(near, captions)) == 2


@pytest.mark.parametrize("row", [-1, 2, None, "0", 0.0, True, [0]])
def test_rows_that_are_none(given, row):
    assert "captions[1] names no row from 0 to 1" in refused(given, rows(2), [entry(1, "a", 0), entry(2, "b", row)])


@pytest.mark.parametrize(
    "embeddings",
    [rows(2)[0], rows(2)[None], rows(2).int(), rows(2)[:, :0], rows(0), None, "text", rows(4).T, [[1.0, 2.0]]],
    ids=lambda value: "",
)
def test_no_embeddings(given, embeddings):
    refused(given, embeddings, [entry(1, "a", 0)])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e6])
def test_embeddings_that_are_of_no_use(given, value):
    embeddings = rows(3).float()
    embeddings[1] = value
    assert "row 1" in refused(given, embeddings, [entry(1, "a", 0)])


@pytest.mark.parametrize("captions", [[], None, {"caption": "a"}, ["text"]])
def test_no_captions(given, captions):
    refused(given, rows(2), captions)


def test_bad_captions_stop_or_are_counted(given, capsys):
    captions = [entry(1, "good", 0), entry(2, " ", 1), entry(3, 5, 2), {"image_id": 4, "clip_embedding": 3}]
    assert "captions[1]: " in refused(given, rows(4), captions)
    features = given.read(rows(4), captions, skip_bad=True)
    assert features.captions == [["good"]]
    assert "3 captions of" in capsys.readouterr().err


def test_no_caption_is_of_use(given):
    captions = [entry(2, " ", 1), entry(3, 5, 2)]
    assert "no usable caption" in refused(given, rows(4), captions, skip_bad=True)


def test_contents_of_another_kind(tmp_path, tiny_clip):
    contents = [{"embeddings": rows(1)}, [[torch.arange(3)], [0], 3], "text", 5, [], [("text", ["a"])]]
    contents += [[(np.ones((1, D)), ["a"]), (np.ones((1, D + 1)), ["b"])]]
    for content in contents:
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match="x.pkl holds n"):
            import_pickle(tmp_path / "x.pkl", str(tiny_clip), tmp_path / "out")


def test_the_clip_must_be_as_wide(given, capsys):
    wide = torch.ones(1, 512)
    assert "are 512 wide" in refused(given, wide, [entry(1, "a", 0)])
    file = given.write(wide, [entry(1, "a", 0)])
    assert cli.main(["convert", "features", str(file), "--clip", "starter", "--out", str(given.out)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and output.count("\n") == 1 and "512 wide and those of starter 128" in output


def test_what_is_there_stays(given):
    captions = [entry(1, "a", 0)]
    given.read(rows(1), captions)
    with pytest.raises(InputError, match="exists already"):
        given.read(rows(1, seed=2), captions)
    assert np.array_equal(FeatureSet.open(given.out).embeddings, rows(1).numpy())
    assert np.array_equal(given.read(rows(1, seed=2), captions, overwrite=True).embeddings, rows(1, seed=2).numpy())


def test_a_doubtful_clip_is_told(given, tiny_clip, tiny_captions, capsys):
    texts = Encoder.load(str(tiny_clip), "cpu", "float32").encode_text(tiny_captions).vectors
    captions = [entry(n, caption, n) for n, caption in enumerate(tiny_captions)]
    right = torch.from_numpy(texts) + 0.05 * rows(len(texts)).float() / 8
    given.read(right, captions)
    assert capsys.readouterr().err == ""
    given.read(right.roll(5, dims=0), captions, overwrite=True)
    assert "warning: " in capsys.readouterr().err
