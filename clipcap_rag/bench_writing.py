"""Comparisons of writing: sampled candidates and beams, each against ways that compute the same more slowly."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from clipcap_rag.bench_protocol import Comparison, Disagreement
from clipcap_rag.bench_subjects import Subjects
from clipcap_rag.config import GenerationConfig
from clipcap_rag.generation import choose, uniforms, write_captions
from clipcap_rag.model import CaptionModel
from clipcap_rag.past import Past


def comparisons(subjects: Subjects) -> Iterator[Comparison]:
    """Each is made when the one before it is done."""
    sizes = subjects.sizes
    size = f"{sizes.candidates} candidates of one photo, {sizes.tokens} tokens"
    exact, coarse = (subjects.caption_model(dtype) for dtype in (torch.float32, torch.bfloat16))
    yield _against_generate("candidates, float32", size, subjects, exact, exact, 1.7)
    yield _against_generate("candidates, bfloat16", size, subjects, coarse, coarse, 1.7)
    yield _against_generate("candidates, bfloat16 over float32", size, subjects, coarse, exact, 3.0)
    yield _against_recomputing("candidates, one by one", size, subjects, exact, 25.0)
    yield _beams("beams, image by image", subjects, exact, 10.0)


def _config(subjects: Subjects, candidates: int) -> GenerationConfig:
    return GenerationConfig(candidates=candidates, num_beams=1, max_new_tokens=subjects.sizes.tokens)


def _against_generate(
    name: str, size: str, subjects: Subjects, model: CaptionModel, plain: CaptionModel, target: float
) -> Comparison:
    sizes, dtype = subjects.sizes, model.language_model.dtype
    prefix = subjects.prefix(1, dtype)
    config = _config(subjects, sizes.candidates)

    def ours() -> object:
        return write_captions(model, subjects.tokenizer, prefix, config, [b"photo"])

    def generate() -> object:
        inputs = prefix.to(plain.language_model.dtype).expand(sizes.candidates, -1, -1)
        with torch.inference_mode():
            return plain.language_model.generate(
                inputs_embeds=inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device),
                do_sample=True, top_p=config.top_p, top_k=0, temperature=config.temperature,
                max_new_tokens=sizes.tokens, min_new_tokens=sizes.tokens, pad_token_id=plain.end_token,
            )  # fmt: skip

    slow = f"transformers' generate with expanded inputs, {_format(plain)}"
    return Comparison(
        name, size, f"one prefill, {_format(model)}", slow, target, ours, generate,
        lambda: _same_logits(subjects, model, plain),
    )  # fmt: skip


@torch.inference_mode()
def _same_logits(subjects: Subjects, model: CaptionModel, plain: CaptionModel) -> str:
    """Compares our logits, token by token after one prefill, with those of the plain model over the whole text."""
    vocabulary, steps = plain.language_model.config.vocab_size, 6
    prefix = subjects.prefix(1, model.language_model.dtype)
    tokens = torch.randint(vocabulary, (1, steps), generator=torch.Generator().manual_seed(6)).to(prefix.device)
    past, first = Past.prefill(model, prefix)
    ours = torch.stack([first, *(past.read(model, token) for token in tokens.T)], dim=1)  # [1, steps + 1, V]
    expected = _whole(plain, prefix, tokens)[:, prefix.shape[1] - 1 :]
    if model.language_model.dtype is torch.float32:
        difference = (ours - expected).abs().max().item() / expected.std().item()
        if difference > 1e-4:
            raise Disagreement(f"logits differ by {difference:.2g} of their spread")
        return f"logits of forced tokens differ by at most {difference:.1g} of their spread"
    cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=-1).min().item()
    if cosine < 0.999:
        raise Disagreement(f"the smallest cosine of logits is {cosine:.5f}")
    return f"smallest cosine of the logits of forced tokens {cosine:.5f}"


def _whole(model: CaptionModel, prefix: Tensor, tokens: Tensor) -> Tensor:
    """Logits [B, P+T, V] of the whole sequence, float32."""
    language_model = model.language_model
    words = language_model.get_input_embeddings()(tokens)
    inputs = torch.cat([prefix.to(words.dtype).expand(len(words), -1, -1), words], dim=1)
    return language_model(inputs_embeds=inputs, use_cache=False).logits.float()


def _against_recomputing(name: str, size: str, subjects: Subjects, model: CaptionModel, target: float) -> Comparison:
    sizes = subjects.sizes
    prefix, config = subjects.prefix(1, model.language_model.dtype), _config(subjects, sizes.candidates)

    def ours() -> list[tuple[int, ...]]:
        (written,) = write_captions(model, subjects.tokenizer, prefix, config, [b"photo"])
        return [candidate.tokens for candidate in written]

    @torch.inference_mode()
    def one_by_one() -> list[tuple[int, ...]]:
        random = torch.from_numpy(uniforms(config.seed, b"photo", sizes.candidates - 1, sizes.tokens))
        sequences = []
        for number in range(sizes.sample):
            tokens = torch.empty(1, 0, dtype=torch.long, device=prefix.device)
            for step in range(sizes.tokens):
                logits = _whole(model, prefix, tokens)[:, -1]
                if step == 0:
                    logits[:, model.end_token] = -torch.inf
                token = choose(logits, random[number : number + 1, step].to(prefix.device), config)
                tokens = torch.cat([tokens, token[:, None]], dim=1)
                if token.item() == model.end_token:
                    break
            sequences.append(tuple(tokens[0].tolist()))
        return sequences

    def agree() -> str:
        fast, slow = ours()[1 : 1 + sizes.sample], one_by_one()
        return _equal(fast, slow)

    return Comparison(
        name, size, "one prefill, all at once, float32",
        f"the whole sequence again for every token, float32 ({sizes.sample} times {sizes.candidates // sizes.sample})",
        target, ours, one_by_one, agree, scale=sizes.candidates / sizes.sample,
    )  # fmt: skip


def _beams(name: str, subjects: Subjects, model: CaptionModel, target: float) -> Comparison:
    sizes = subjects.sizes
    prefix = subjects.prefix(sizes.beam_images, model.language_model.dtype)
    config = GenerationConfig(decoding="beam", num_beams=5, max_new_tokens=sizes.tokens)
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(sizes.beam_images)]

    def ours() -> list[tuple[int, ...]]:
        written = write_captions(model, subjects.tokenizer, prefix, config, digests)
        return [candidate.tokens for candidates in written for candidate in candidates]

    def one_by_one() -> list[tuple[int, ...]]:
        return [tokens for image in prefix[: sizes.sample] for tokens in _plain_beam(model, image[None], sizes.tokens)]

    def agree() -> str:
        return _equal(ours()[: 5 * sizes.sample], one_by_one())

    return Comparison(
        name, f"5 beams of {sizes.beam_images} photos, {sizes.tokens} tokens", "all photos at once, cached, float32",
        f"photo by photo, no cache, float32 ({sizes.sample} times {sizes.beam_images // sizes.sample})",
        target, ours, one_by_one, agree, scale=sizes.beam_images / sizes.sample,
    )  # fmt: skip


@torch.inference_mode()
def _plain_beam(model: CaptionModel, prefix: Tensor, steps: int, beams: int = 5) -> list[tuple[int, ...]]:
    """Beam search by mean log-probability over whole sequences, in the simplest words."""
    found = [((), 0.0)]
    for step in range(steps):
        longer = [(tokens, total) for tokens, total in found if tokens and tokens[-1] == model.end_token]
        open_ones = [(tokens, total) for tokens, total in found if not tokens or tokens[-1] != model.end_token]
        if not open_ones:
            break
        batch = torch.tensor([tokens for tokens, _ in open_ones], dtype=torch.long).view(len(open_ones), step)
        logits = _whole(model, prefix, batch)[:, -1]
        if step == 0:
            logits[:, model.end_token] = -torch.inf
        likely, ids = logits.log_softmax(-1).topk(beams)
        for (tokens, total), row, chosen in zip(open_ones, likely.tolist(), ids.tolist(), strict=True):
            longer += [((*tokens, token), total + value) for token, value in zip(chosen, row, strict=True)]
        found = sorted(longer, key=lambda entry: entry[1] / len(entry[0]), reverse=True)[:beams]
    return [tokens for tokens, _ in found]


def _equal(fast: list[tuple[int, ...]], slow: list[tuple[int, ...]]) -> str:
    equal = sum(a == b for a, b in zip(fast, slow, strict=True)) / len(slow)
    if equal < 0.99:
        raise Disagreement(f"only {100 * equal:.0f} percent of the sequences are equal")
    return f"{100 * equal:.0f} percent of {len(slow)} sequences equal"


def _format(model: CaptionModel) -> str:
    return str(model.language_model.dtype).removeprefix("torch.")
