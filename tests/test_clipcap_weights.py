"""ClipCap's weights: the same logits and captions as a plain reference, everything asked or refused by name."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipcap_rag.captioner import Captioner
from clipcap_rag.clipcap_weights import clipcap_checkpoint, convert_clipcap
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.generation import write_captions
from clipcap_rag.model import load_tokenizer

D, E, P, C, LAYERS, BLOCKS, POSITIONS = 24, 32, 4, 3, 2, 2, 96
EXACT = {"device": "cpu", "dtype": "float32"}


def saved_shapes(mapper, vocabulary, *, d=D, e=E, p=P, c=C, layers=LAYERS, blocks=BLOCKS, positions=POSITIONS):
    """Names and shapes that ClipCap's training saves, with the buffers that transformers had then."""
    shapes = {"gpt.transformer.wte.weight": (vocabulary, e), "gpt.transformer.wpe.weight": (positions, e)}
    for block in range(blocks):
        name = f"gpt.transformer.h.{block}."
        shapes |= {
            name + "ln_1.weight": (e,),
            name + "ln_1.bias": (e,),
            name + "attn.c_attn.weight": (e, 3 * e),
            name + "attn.c_attn.bias": (3 * e,),
            name + "attn.c_proj.weight": (e, e),
            name + "attn.c_proj.bias": (e,),
            name + "ln_2.weight": (e,),
            name + "ln_2.bias": (e,),
            name + "mlp.c_fc.weight": (e, 4 * e),
            name + "mlp.c_fc.bias": (4 * e,),
            name + "mlp.c_proj.weight": (4 * e, e),
            name + "mlp.c_proj.bias": (e,),
            name + "attn.bias": (1, 1, positions, positions),
            name + "attn.masked_bias": (),
        }
    shapes |= {"gpt.transformer.ln_f.weight": (e,), "gpt.transformer.ln_f.bias": (e,)}
    shapes |= {"gpt.lm_head.weight": (vocabulary, e)}
    own = "clip_project."
    if mapper == "mlp":
        shapes |= {
            own + "model.0.weight": (e * p // 2, d),
            own + "model.0.bias": (e * p // 2,),
            own + "model.2.weight": (e * p, e * p // 2),
            own + "model.2.bias": (e * p,),
        }
    elif mapper == "linear":
        shapes |= {own + "weight": (e * p, d), own + "bias": (e * p,)}
    else:
        shapes |= {own + "linear.weight": (c * e, d), own + "linear.bias": (c * e,), own + "prefix_const": (p, e)}
        for layer in range(layers):
            name = f"{own}transformer.layers.{layer}."
            shapes |= {
                name + "norm1.weight": (e,),
                name + "norm1.bias": (e,),
                name + "attn.to_queries.weight": (e, e),
                name + "attn.to_keys_values.weight": (2 * e, e),
                name + "attn.project.weight": (e, e),
                name + "attn.project.bias": (e,),
                name + "norm2.weight": (e,),
                name + "norm2.bias": (e,),
                name + "mlp.fc1.weight": (2 * e, e),
                name + "mlp.fc1.bias": (2 * e,),
                name + "mlp.fc2.weight": (e, 2 * e),
                name + "mlp.fc2.bias": (e,),
            }
    return shapes


def random_state(mapper, vocabulary, **sizes):
    """A state dict of such shapes with random weights; gains of norms lie around 1, biases around 0."""
    generator, state = torch.Generator().manual_seed(9), {}
    for name, shape in saved_shapes(mapper, vocabulary, **sizes).items():
        values, is_gain = torch.randn(shape, generator=generator), re.search(r"(ln_|norm).*weight", name)
        state[name] = values / math.sqrt(min(shape)) if len(shape) == 2 else 0.1 * values + bool(is_gain)
    state["gpt.transformer.wte.weight"] *= 2.5  # far enough apart that rounding decides nothing
    state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]
    return state


class Reference:
    """ClipCap in float64 and plain operations, one image at a time, everything computed again for each token."""

    def __init__(self, state, heads):
        self.weights, self.heads = {name: tensor.double() for name, tensor in state.items()}, heads

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)

    def conv1d(self, x, name):
        return x @ self.weights[name + ".weight"] + self.weights[name + ".bias"]

    @staticmethod
    def attend(queries, keys, values, heads, causal):
        """[S, E] each -> [S, E]."""
        mixed = []
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in (queries, keys, values)), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[1])
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            mixed.append(scores.softmax(-1) @ v)
        return torch.cat(mixed, dim=1)

    def prefix(self, image):
        """[D] -> [P, E]."""
        own, image, width = "clip_project.", image.double(), self.weights["gpt.transformer.wte.weight"].shape[1]
        if own + "weight" in self.weights:
            return self.linear(image, own[:-1]).view(-1, width)
        if own + "model.0.weight" in self.weights:
            return self.linear(self.linear(image, own + "model.0").tanh(), own + "model.2").view(-1, width)
        constants = self.weights[own + "prefix_const"]
        x = torch.cat([self.linear(image, own + "linear").view(-1, width), constants])
        layer = 0
        while (name := f"{own}transformer.layers.{layer}.") + "norm1.weight" in self.weights:
            h = self.norm(x, name + "norm1")
            keys, values = self.linear(h, name + "attn.to_keys_values").chunk(2, dim=1)
            mixed = self.attend(self.linear(h, name + "attn.to_queries"), keys, values, 8, causal=False)
            x = x + self.linear(mixed, name + "attn.project")
            h = self.norm(x, name + "norm2")
            x = x + self.linear(self.linear(h, name + "mlp.fc1").clamp(min=0), name + "mlp.fc2")
            layer += 1
        return x[-len(constants) :]

    def logits(self, prefix, tokens):
        """Logits [len(tokens) + 1, V] of every token, the first of them included, and of the next."""
        words = self.weights["gpt.transformer.wte.weight"]
        x = torch.cat([prefix, words[torch.tensor(tokens, dtype=torch.long)]])
        x = x + self.weights["gpt.transformer.wpe.weight"][: len(x)]
        block = 0
        while (name := f"gpt.transformer.h.{block}.") + "ln_1.weight" in self.weights:
            queries, keys, values = self.conv1d(self.norm(x, name + "ln_1"), name + "attn.c_attn").chunk(3, dim=1)
            x = x + self.conv1d(self.attend(queries, keys, values, self.heads, causal=True), name + "attn.c_proj")
            h = self.conv1d(self.norm(x, name + "ln_2"), name + "mlp.c_fc")
            h = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
            x = x + self.conv1d(h, name + "mlp.c_proj")
            block += 1
        return self.norm(x[len(prefix) - 1 :], "gpt.transformer.ln_f") @ self.weights["gpt.lm_head.weight"].T

    def captions(self, image, beams, stop, steps=67):
        """Tokens and mean log-probability of all beams, best first, by the rule that ClipCap publishes."""
        prefix, hypotheses = self.prefix(image), [([], 0.0)]
        for _ in range(steps):
            grown = []
            for tokens, total in hypotheses:
                if tokens[-1:] == [stop]:
                    grown.append((tokens, total))
                    continue
                best = self.logits(prefix, tokens)[-1].log_softmax(-1).topk(beams)
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    grown.append(([*tokens, token], total + value))
            hypotheses = sorted(grown, key=lambda found: found[1] / len(found[0]), reverse=True)[:beams]
            if all(tokens[-1] == stop for tokens, _ in hypotheses):
                break
        return [(tokens, total / len(tokens)) for tokens, total in hypotheses]


def language_folder(source: Path, folder: Path, **settings) -> Path:
    """A language model folder without weights: the tokenizer of `source` and these settings."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | settings))
    return folder


@pytest.fixture(scope="module")
def parts(tiny_lm, tiny_clip, tmp_path_factory):
    """A tokenizer with settings but no weights, a CLIP, and a way to save weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the many small products of the reference
    home, tokenizer = tmp_path_factory.mktemp("clipcap"), load_tokenizer(tiny_lm)
    sizes = {"vocab_size": len(tokenizer), "n_positions": POSITIONS, "n_embd": E, "n_layer": BLOCKS}
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    folder = language_folder(tiny_lm, home / "language_model", n_head=4, **sizes, **end)
    stop = tokenizer.encode(".")[0]

    def state(mapper):
        made = random_state(mapper, len(tokenizer))
        words = made["gpt.transformer.wte.weight"]  # both tokens that matter are written often enough to be seen
        made["gpt.transformer.ln_f.bias"] += 1.1 * words[stop] + 0.3 * words[tokenizer.eos_token_id]
        return made

    def save(state, name="weights.pt"):
        torch.save(state, home / name)
        return home / name

    yield SimpleNamespace(
        home=home, tokenizer=tokenizer, stop=stop, clip=f"local-dir:{tiny_clip}", language_model=str(folder),
        state=state, save=save,
    )  # fmt: skip
    torch.set_num_threads(threads)


def choices(parts, **others):
    return {"clip": parts.clip, "language_model": parts.language_model, "normalize": True} | EXACT | others


KINDS = [("mlp", False), ("transformer", True), ("linear", False)]


@pytest.fixture(scope="module", params=KINDS, ids=[kind for kind, _ in KINDS])
def pair(request, parts):
    """Our captioner and the reference with the same weights, and six embeddings of different lengths."""
    kind, normalize = request.param
    state = parts.state(kind)
    captioner = Captioner.from_clipcap(parts.save(state, f"{kind}.pt"), **choices(parts, normalize=normalize))
    generator = torch.Generator().manual_seed(4)
    raw = torch.randn(6, D, generator=generator) * torch.tensor([[0.3], [0.6], [1.0], [1.5], [2.0], [3.0]])
    seen = raw / raw.norm(dim=1, keepdim=True) if normalize else raw
    return SimpleNamespace(kind=kind, captioner=captioner, reference=Reference(state, heads=4), raw=raw, seen=seen)


def test_logits_equal_the_reference(pair):
    model, tokens = pair.captioner.model, [5, 9, 2, 77, 30, 1, 260]
    for image in pair.seen:
        with torch.no_grad():
            found = model(torch.tensor([tokens]), image[None])[0]
        expected = pair.reference.logits(pair.reference.prefix(image), tokens)[:-1]
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("beams", [5, 1])
def test_clipcap_decoding_equals_the_reference(pair, parts, beams):
    with torch.no_grad():
        prefix = pair.captioner.model.prefix(pair.seen)
    config = GenerationConfig(decoding="clipcap", num_beams=beams)
    written = write_captions(pair.captioner.model, parts.tokenizer, prefix, config, [b""] * 6, stop_token=".")
    results = pair.captioner.caption(embeddings=pair.raw.numpy(), decoding="clipcap", num_beams=beams)
    lengths = []
    for image, found, result in zip(pair.seen, written, results, strict=True):
        expected = pair.reference.captions(image, beams, parts.stop)
        assert [list(one.tokens) for one in found] == [tokens for tokens, _ in expected]
        means = [mean for _, mean in expected]
        assert [one.log_probability / len(one.tokens) for one in found] == pytest.approx(means, abs=1e-4)
        assert [candidate.score for candidate in result.candidates] == pytest.approx(means, abs=1e-4)
        texts = [parts.tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in expected]
        assert [candidate.caption for candidate in result.candidates] == [" ".join(text.split()) for text in texts]
        assert result.caption == result.candidates[0].caption
        lengths += [len(tokens) for tokens, _ in expected]
    assert min(lengths) < 30 and len(set(lengths)) > 2  # they do stop, at different places


@pytest.mark.parametrize("decoding", ["greedy", "sample", "beam"])
def test_other_decodings_end_at_the_stop_token_or_the_end_token(pair, parts, decoding):
    with torch.no_grad():
        prefix = pair.captioner.model.prefix(pair.seen)
    config = GenerationConfig(decoding=decoding, temperature=1.5, top_p=1.0)
    ends, last = {parts.stop, parts.tokenizer.eos_token_id}, set()
    for found in write_captions(pair.captioner.model, parts.tokenizer, prefix, config, [b""] * 6, stop_token="."):
        for one in found:
            assert not ends & set(one.tokens[:-1]) and one.tokens[0] not in ends and len(one.tokens) <= 40
            assert one.tokens[-1] in ends or len(one.tokens) == 40
            assert one.caption.endswith(".") or one.tokens[-1] != parts.stop
            last.add(one.tokens[-1])
    assert ends & last


def test_a_converted_directory_says_the_same(pair, parts, tmp_path):
    weights = parts.home / f"{pair.kind}.pt"
    normalize = pair.captioner.checkpoint.config.normalize
    convert_clipcap(weights, tmp_path / "out", **choices(parts, normalize=normalize))
    opened = Captioner.from_pretrained(tmp_path / "out", **EXACT)
    assert opened.checkpoint.config == pair.captioner.checkpoint.config
    assert opened.checkpoint.stop_token == "."
    for decoding in ("clipcap", "sample"):
        settings = {"embeddings": pair.raw.numpy(), "decoding": decoding}
        assert opened.caption(**settings) == pair.captioner.caption(**settings)
    assert weights.name in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="--overwrite"):
        convert_clipcap(weights, tmp_path / "out", **choices(parts))
    convert_clipcap(weights, tmp_path / "out", overwrite=True, **choices(parts, stop_token="!"))
    assert Captioner.from_pretrained(tmp_path / "out", **EXACT).checkpoint.stop_token == "!"


def test_what_others_add_to_the_names_changes_nothing(parts):
    state = parts.state("mlp")
    plain = clipcap_checkpoint(parts.save(state), **choices(parts))[0].model.state_dict()
    buffers = {name for name in state if name.endswith((".attn.bias", ".attn.masked_bias"))}
    wrapped = {"module." + name: tensor for name, tensor in state.items() if name not in buffers}
    again = clipcap_checkpoint(parts.save(wrapped), **choices(parts))[0].model.state_dict()
    assert len(buffers) == 2 * BLOCKS
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


def test_a_mapper_alone_takes_the_language_model_that_is_given(parts, tiny_lm, tmp_path):
    whole = parts.state("transformer")
    alone = {name: tensor for name, tensor in whole.items() if name.startswith("clip_project.")}
    checkpoint = convert_clipcap(parts.save(alone), tmp_path / "out", **choices(parts, language_model=str(tiny_lm)))
    assert checkpoint.config.language_model_tuning == "frozen"
    opened = Captioner.from_pretrained(tmp_path / "out", **EXACT)
    stored = load_file(tiny_lm / "model.safetensors")
    assert torch.equal(opened.model.language_model.transformer.wpe.weight, stored["transformer.wpe.weight"])
    assert torch.equal(opened.model.mapper.prefix_const, whole["clip_project.prefix_const"])
    with pytest.raises(InputError, match="--clip MODEL .*24 wide.* and --language-model"):
        clipcap_checkpoint(parts.save(alone))


def test_a_folder_with_a_tokenizer_alone_will_do(parts, tmp_path):
    folder = language_folder(Path(parts.language_model), tmp_path / "tokenizer")
    (folder / "config.json").unlink()
    state = random_state("mlp", len(parts.tokenizer), e=128, p=2)
    checkpoint, _ = clipcap_checkpoint(parts.save(state), **choices(parts, language_model=str(folder)))
    assert checkpoint.model.language_model.config.n_head == 2
    tokens, image = [4, 8, 15, 16], torch.randn(D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = checkpoint.model(torch.tensor([tokens]), image[None])[0]
    reference = Reference(state, heads=2)
    expected = reference.logits(reference.prefix(image), tokens)[:-1]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def replaced(name, tensor):
    return lambda state: state.update({name: tensor})


REFUSED = {
    "unknown key": (replaced("gpt.extra.weight", torch.zeros(2)), "unknown keys gpt.extra.weight"),
    "unknown mapper key": (replaced("clip_project.gate", torch.zeros(1)), "unknown keys clip_project.gate"),
    "missing key": (lambda state: state.pop("gpt.transformer.h.1.ln_2.bias"), "missing keys .*h.1.ln_2.bias"),
    "missing layer key": (
        lambda state: state.pop("clip_project.transformer.layers.1.mlp.fc1.bias"),
        "missing keys .*layers.1.mlp.fc1.bias",
    ),
    "missing words": (lambda state: state.pop("gpt.transformer.wte.weight"), "lacks the key .*wte.weight"),
    "missing constants": (lambda state: state.pop("clip_project.prefix_const"), "lacks the key .*prefix_const"),
    "no mapper": (lambda state: state.pop("clip_project.linear.weight"), "lacks the key clip_project"),
    "wrong shape": (replaced("clip_project.linear.bias", torch.zeros(5)), r"linear.bias has shape \[5\] .*\[96\]"),
    "wrong block": (replaced("gpt.transformer.h.0.ln_1.weight", torch.zeros(3)), r"h.0.ln_1.weight has shape \[3\]"),
    "no matrix": (replaced("gpt.transformer.wpe.weight", torch.zeros(3)), r"wpe.weight has shape \[3\]"),
    "rows": (replaced("clip_project.linear.weight", torch.zeros(97, D)), "97 rows, no multiple .* 32"),
    "untied": (replaced("gpt.lm_head.weight", torch.zeros(1)), "lm_head.weight differs"),
    "positions": (replaced("gpt.transformer.wpe.weight", torch.zeros(7, E)), "n_positions 7, but .* has 96"),
    "width": (replaced("clip_project.linear.weight", torch.zeros(C * E, 20)), "20 wide, but those of .* are 24 wide"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_by_name(parts, case, tmp_path):
    change, sentence = REFUSED[case]
    state = parts.state("transformer")
    change(state)
    with pytest.raises(InputError, match=sentence):
        convert_clipcap(parts.save(state), tmp_path / "out", **choices(parts))
    assert list(tmp_path.iterdir()) == []


class Hostile:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_nothing_in_a_file_is_executed(parts, tmp_path):
    trace, weights = tmp_path / "trace", tmp_path / "weights.pt"
    for write in (
        lambda: torch.save(parts.state("mlp") | {"gpt.extra": Hostile(trace)}, weights),
        lambda: weights.write_bytes(pickle.dumps(Hostile(trace), protocol=2)),
    ):
        write()
        with pytest.raises(InputError, match="nothing in it is executed"):
            clipcap_checkpoint(weights, **choices(parts))
        assert not trace.exists()


def test_files_that_are_no_weights_are_refused(parts, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(parts.state("mlp"), weights)
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"<html>not found</html>"):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            clipcap_checkpoint(weights, **choices(parts))
    for other in ({"state_dict": parts.state("mlp")}, [torch.zeros(2)], torch.zeros(2)):
        torch.save(other, weights)
        with pytest.raises(InputError, match="not a state dict"):
            clipcap_checkpoint(weights, **choices(parts))
    torch.save({}, weights)
    with pytest.raises(InputError, match="lacks the key clip_project"):
        clipcap_checkpoint(weights, **choices(parts))
    torch.save(torch.nn.Linear(2, 2), weights)
    with pytest.raises(InputError, match="damaged or holds more than weights"):
        clipcap_checkpoint(weights, **choices(parts))
    with pytest.raises(InputError, match="there is no file"):
        clipcap_checkpoint(tmp_path / "none.pt", **choices(parts))


def test_all_that_is_not_known_is_asked_in_one_sentence(parts):
    weights = parts.save(parts.state("transformer"))
    with pytest.raises(InputError) as caught:
        clipcap_checkpoint(weights)
    assert all(flag in str(caught.value) for flag in ("--clip", "24 wide", "--no-normalize", "--language-model"))
    with pytest.raises(InputError) as caught:
        clipcap_checkpoint(weights, **choices(parts, normalize=None))
    assert "--normalize" in str(caught.value) and "--clip" not in str(caught.value)


PUBLISHED = {"mlp": {"d": 512, "p": 10}, "transformer": {"d": 640, "p": 40, "c": 40, "layers": 8}}
GPT2 = {"e": 768, "blocks": 12, "positions": 1024}


@pytest.mark.parametrize(
    ("mapper", "taken"),
    [("mlp", "ViT-B-32:openai, normalize False"), ("transformer", "RN50x4:openai, normalize True")],
)
def test_what_is_known_of_published_weights_is_filled_in_and_said(parts, mapper, taken, capsys):
    shapes = saved_shapes(mapper, 50257, **PUBLISHED[mapper], **GPT2)
    # one number, seen many times, so that the file is small
    weights = parts.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    assert weights.stat().st_size < 1e6
    with pytest.raises(InputError, match=f"the CLIP model {taken.partition(':')[0]}.* cannot be loaded"):
        clipcap_checkpoint(weights)
    assert f"published weights; taking language_model gpt2, clip {taken}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"{PUBLISHED[mapper]['d']} wide, but those of .* are 24 wide"):
        clipcap_checkpoint(weights, clip=parts.clip, normalize=True)
    assert capsys.readouterr().err.endswith("taking language_model gpt2\n")


def test_of_like_weights_that_were_not_published_only_gpt2_is_known(parts):
    shapes = saved_shapes("transformer", 50257, d=512, p=10, c=10, layers=8, **GPT2)
    weights = parts.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    with pytest.raises(InputError, match="--clip MODEL .*512 wide, as of ViT-B-32 and RN101") as caught:
        clipcap_checkpoint(weights)
    assert "--no-normalize" in str(caught.value) and "--language-model" not in str(caught.value)


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    """A folder with a byte-level tokenizer as large as that of GPT-2: all bytes, many pairs of them, the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(first, second) for first in letters for second in letters][:50_000]
    words = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def wide_clip(tiny_clip, folder, dim):
    """A CLIP like tiny_clip whose embeddings are `dim` wide."""
    config = json.loads((tiny_clip / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = dim
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**config["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.slow
@pytest.mark.parametrize("mapper", PUBLISHED)
def test_published_shapes_equal_the_reference(mapper, real_tokenizer, tiny_clip, tmp_path, capsys):
    state = random_state(mapper, 50257, **PUBLISHED[mapper], **GPT2)
    assert len(state) == {"mlp": 177, "transformer": 272}[mapper]
    stop = 13
    state["gpt.transformer.wte.weight"][stop] *= 1.5
    weights, dim = tmp_path / "weights.pt", PUBLISHED[mapper]["d"]
    torch.save(state, weights)
    made = convert_clipcap(
        weights,
        tmp_path / "out",
        clip=wide_clip(tiny_clip, tmp_path / "clip", dim),
        language_model=str(real_tokenizer),
        **EXACT,
    )
    assert made.config.normalize == (mapper == "transformer")
    assert "published" in capsys.readouterr().err
    captioner, reference = Captioner.from_pretrained(tmp_path / "out", **EXACT), Reference(state, heads=12)
    raw = torch.randn(2, dim, generator=torch.Generator().manual_seed(5))
    seen = raw / raw.norm(dim=1, keepdim=True) if made.config.normalize else raw
    tokens = [464, 3290, 318, 2491, 13, 50256]
    with torch.no_grad():
        found = captioner.model(torch.tensor([tokens, tokens]), seen)
    for image, logits in zip(seen, found, strict=True):
        expected = reference.logits(reference.prefix(image), tokens)[:-1]
        torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
    for beams, steps in ((5, 8), (1, 67)):
        with torch.no_grad():
            prefix = captioner.model.prefix(seen)
        config = GenerationConfig(decoding="clipcap", num_beams=beams, max_new_tokens=steps)
        written = write_captions(captioner.model, captioner.checkpoint.tokenizer, prefix, config, [b""] * 2, ".")
        for image, found in zip(seen, written, strict=True):
            expected = reference.captions(image, beams, stop, steps)
            assert [list(one.tokens) for one in found] == [tokens for tokens, _ in expected]
            means = [one.log_probability / len(one.tokens) for one in found]
            assert means == pytest.approx([mean for _, mean in expected], abs=1e-4)
