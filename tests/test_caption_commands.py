"""`clipcap-rag caption`: what is captioned, what is shown of it, and flags that contradict each other."""

import json

import numpy as np
import pytest

from clipcap_rag import cli

WRITE = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6", "--temperature", "1.5")


@pytest.fixture
def caption(world, capsys):
    """Runs the command on the trained captioner; gives its output, its errors and its status."""

    def run(*arguments: object):
        capsys.readouterr()
        status = cli.main(["caption", *map(str, arguments), "--model", str(world.run), *WRITE])
        return *capsys.readouterr(), status

    return run


@pytest.fixture
def photos(world):
    return [world.photos / name for name in world.features.images[:2]]


def test_the_n_best_captions_are_lines_in_order(caption, photos):
    as_json, _, _ = caption(*photos, "--json")
    expected = [
        f"{result['image']}: {candidate['caption']}"
        for result in map(json.loads, as_json.splitlines())
        for candidate in result["candidates"][:3]
    ]
    assert len(expected) == 6
    assert caption(*photos, "--num-captions", 3) == ("\n".join(expected) + "\n", "", 0)
    best, _, _ = caption(*photos)
    assert best.splitlines() == expected[::3]


def test_too_few_different_captions_are_told(caption, photos):
    out, err, status = caption(photos[0], "--num-captions", 8, "--candidates", 8, "--num-beams", 1, "--top-p", 1e-6)
    assert len(out.splitlines()) == 1 and status == 0  # so small a nucleus always gives the greedy caption
    assert err == "1 of 1 have fewer than 8 different captions; raise --temperature\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--num-captions", "17"], "--candidates"),
        (["--num-captions", "6", "--decoding", "beam"], "--num-beams"),
        (["--num-captions", "2", "--decoding", "greedy"], "1 are written"),
        (["--num-captions", "2", "--json"], "leave out --num-captions"),
        (["--caption-embedding"], "add --json"),
        (["--device", "cpu,cuda:99"], "cuda:99"),
    ],
)
def test_contradictions_are_one_sentence(photos, world, capsys, arguments, named):
    assert cli.main(["caption", str(photos[0]), "--model", str(world.run), *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and named in output.err


@pytest.mark.parametrize("more", [["--text", "a dog"], ["--embeddings", "rows.npy"]])
def test_one_kind_of_input_at_a_time(capsys, more):
    for arguments in (["a.jpg", *more], ["--text", "a", "--embeddings", "b"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["caption", *arguments])
        assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_a_prompt_begins_every_caption(caption, photos):
    out, _, _ = caption(photos[0], "--prompt", "two small children ", "--json")
    captions = [candidate["caption"] for candidate in json.loads(out)["candidates"]]
    assert len(captions) > 1 and all(text.startswith("two small children") for text in captions)
    out, err, status = caption(photos[0], "--prompt", "word " * 80)
    assert (out, status) == ("", 2) and "shorten --prompt" in err


def test_texts_and_embeddings_instead_of_photos(caption, world, photos, tmp_path):
    out, _, _ = caption("--text", "a red bicycle", "an old man", "--json")
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["a red bicycle", "an old man"]
    out, _, _ = caption("--embeddings", world.features.path)
    by_photo, _, _ = caption(world.photos)
    assert [line.split(": ")[0] for line in out.splitlines()] == world.features.image_ids
    assert [line.split(": ")[1] for line in out.splitlines()] == [line.split(": ")[1] for line in by_photo.splitlines()]
    np.save(tmp_path / "rows.npy", np.asarray(world.features.embeddings[:3]))
    out, _, _ = caption("--embeddings", tmp_path / "rows.npy")
    assert [line.split(": ")[0] for line in out.splitlines()] == ["embedding-0", "embedding-1", "embedding-2"]
    out, err, status = caption("--embeddings", tmp_path / "none.npy")
    assert (out, status) == ("", 2) and err.startswith("error: cannot read")


def test_the_embedding_of_the_caption(caption, world, photos, tmp_path):
    out, _, status = caption(photos[0], tmp_path / "none.jpg", "--json", "--caption-embedding")
    good, bad = map(json.loads, out.splitlines())
    assert np.linalg.norm(good["caption_embedding"]) == pytest.approx(1, abs=1e-5)
    assert (bad["caption_embedding"], status) == (None, 1)
    assert "caption_embedding" not in caption(photos[0], "--json")[0]


def test_the_prefix_as_words(caption, photos):
    out, _, _ = caption(photos[0], "--explain-prefix", "--json")
    words = json.loads(out)["prefix_words"]
    assert [len(vector) for vector in words] == [5] * 3 and set(words[0][0]) == {"word", "similarity"}
    out, _, _ = caption(photos[0], "--explain-prefix")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["prefix", str(number)] for number in range(3)]
    assert f"{words[0][0]['word']!r} {words[0][0]['similarity']:.2f}" in out


def test_what_a_caption_rests_on(caption, photos):
    out, _, _ = caption(photos[0], "--explain", "--json")
    result = json.loads(out)
    evidence = result["evidence"]
    assert [neighbor["caption"] for neighbor in evidence["neighbors"]] == [
        neighbor["caption"] for neighbor in result["neighbors"]
    ]
    assert set(evidence["neighbors"][0]["left_out"]) == set(evidence["all_left_out"]) == {"change", "caption"}
    assert {"word", "both", "image", "neighbors", "neither", "supported_by", "from_image", "from_neighbors",
            "in_neighbors"} == set(evidence["words"][0])  # fmt: skip
    lines = caption(photos[0], "--explain")[0].splitlines()
    assert lines[0] == f"{photos[0]}: {result['caption']}"
    assert [line.split()[0] for line in lines[1:]] == (
        ["neighbour", "without"] * 3 + ["without"] + ["word"] * len(evidence["words"])
    )
    assert f"{evidence['words'][0]['from_image']:+.1f}" in lines[8]
    lines = caption(photos[0], "--explain", "--no-retrieval")[0].splitlines()
    assert {line.split()[0] for line in lines[1:]} == {"word"}
    assert "evidence" not in caption(photos[0], "--json")[0]
