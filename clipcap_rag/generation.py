"""Candidate captions from a prefix: one prefill per image, then greedy, sampling or beam search."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipcap_rag.beam import beam_search
from clipcap_rag.config import GenerationConfig
from clipcap_rag.model import CaptionModel
from clipcap_rag.past import Past, ended, left_padded, looks
from clipcap_rag.prompt import with_prompt
from clipcap_rag.token_bonus import TokenBonus

_SEQUENCES = 256  # written at once; bounds memory whatever the number of candidates
_NUCLEUS = 256  # tokens looked at first on a CPU when the nucleus is cut out of the vocabulary


@dataclass(frozen=True)
class Written:
    """A caption as the language model wrote it, behind its prompt if there was one.

    Attributes:
        caption: the prompt and what was written after it.
        tokens: what was written, with the end token; the prompt is not among them.
        log_probability: in nats, over `tokens`.
    """

    caption: str
    tokens: tuple[int, ...]
    log_probability: float


@torch.inference_mode()
def write_captions(
    model: CaptionModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Tensor,
    config: GenerationConfig,
    digests: Sequence[bytes],
    stop_token: str = "",
    context: Tensor | None = None,
    bonus: TokenBonus | None = None,
) -> list[list[Written]]:
    """Writes candidates for each image.

    Greedy gives one; beam search gives `num_beams`, best mean log-probability first; sampling gives the captions of a
    beam search with `candidate_beams` beams, one beam being greedy, and samples (Holtzman et al. 2020, arXiv
    1904.09751) in the order drawn, `candidates` in all. As beam search does `clipcap`,
    the rule of ClipCap's notebooks (Mokady et al. 2021, arXiv 2111.09734), which differs in two points: the first token
    may be any, and only the stop token ends a caption, not the end token.

    Args:
        prefix: [B, P, E].
        digests: per image, the bytes that together with the seed determine its samples.
        stop_token: text whose first token ends a caption and belongs to it; empty if only the end token does.
        context: [B, C] tokens to read behind the prefix, IGNORED behind them.
        bonus: of B sequences; log-probabilities are those of the logits that it raised.

    Raises:
        InputError: the prompt leaves the language model no position to write at.
    """
    prefix, mask = left_padded(*model.with_context(prefix, context))
    prefix, mask, prompt = with_prompt(model, tokenizer, prefix, mask, config.prompt)
    steps = min(config.longest, model.language_model.config.n_positions - prefix.shape[1])
    per_image, ends = config.captions_per_image, _ends(model, tokenizer, config, stop_token)
    images = max(1, _SEQUENCES // per_image)
    written: list[list[Written]] = []
    for start in range(0, len(prefix), images):
        part = slice(start, start + images)
        own = None if bonus is None else bonus.rows(torch.arange(len(prefix), device=prefix.device)[part])
        past, logits = Past.prefill(model, prefix[part], mask[part], own)
        if config.decoding != "clipcap":
            logits[:, ends] = -torch.inf  # a caption has at least one token
        if config.decoding in ("beam", "clipcap"):
            decoded = beam_search(model, past, logits, config.num_beams, steps, ends)
        else:
            decoded = _candidates(model, past, logits, config, digests[part], steps, ends)
        for sequences in decoded:
            written.append([_read(tokenizer, model.end_token, prompt, *sequence) for sequence in sequences])
    return written


def _ends(
    model: CaptionModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, stop_token: str
) -> list[int]:
    """The tokens that end a caption."""
    if not stop_token:
        return [model.end_token]
    stop = tokenizer.encode(stop_token, add_special_tokens=False)[0]
    return [stop] if config.decoding == "clipcap" else [stop, model.end_token]


def _read(
    tokenizer: PreTrainedTokenizerBase, end: int, prompt: list[int], tokens: list[int], log_probability: float
) -> Written:
    text = tokenizer.decode([*prompt, *(token for token in tokens if token != end)], skip_special_tokens=True)
    return Written(" ".join(text.split()), tuple(tokens), log_probability)


def uniforms(seed: int, digest: bytes, count: int, steps: int) -> np.ndarray:
    """Random numbers [count, steps] float32 in [0, 1) that belong to an image; more candidates keep the first ones."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.random((count, steps), np.float32)


def _candidates(
    model: CaptionModel,
    past: Past,
    logits: Tensor,
    config: GenerationConfig,
    digests: Sequence[bytes],
    steps: int,
    ends: list[int],
) -> list[list[tuple[list[int], float]]]:
    """Beams, or the greedy sequence, and samples of each prefilled image."""
    beams = config.candidate_beams
    if beams == 1:
        return _sample(model, past, logits, config, config.captions_per_image, digests, steps, ends)
    searched = beam_search(model, past, logits, beams, steps, ends)
    sampled = _sample(model, past, logits, config, 1 + config.captions_per_image - beams, digests, steps, ends)
    return [best + drawn[1:] for best, drawn in zip(searched, sampled, strict=True)]


def _sample(
    model: CaptionModel,
    past: Past,
    logits: Tensor,
    config: GenerationConfig,
    per_image: int,
    digests: Sequence[bytes],
    steps: int,
    ends: list[int],
) -> list[list[tuple[list[int], float]]]:
    """The greedy sequence and `per_image - 1` samples for each prefilled image, in groups of bounded size."""
    B, device = len(logits), logits.device
    random = np.stack([uniforms(config.seed, digest, per_image - 1, steps) for digest in digests])
    random = np.concatenate([np.full((B, 1, steps), np.nan, np.float32), random], axis=1)  # NaN marks greedy
    random = torch.from_numpy(random).view(B * per_image, steps).to(device)
    owner = torch.arange(B, device=device).repeat_interleave(per_image)
    decoded = []
    for start in range(0, len(owner), _SEQUENCES):
        part = slice(start, start + _SEQUENCES)
        decoded += _decode(model, past.rows(owner[part]), logits[owner[part]], random[part], config, ends)
    return [decoded[start : start + per_image] for start in range(0, len(decoded), per_image)]


def _decode(
    model: CaptionModel, past: Past, logits: Tensor, random: Tensor, config: GenerationConfig, ends: list[int]
) -> list[tuple[list[int], float]]:
    """Writes S sequences from their first logits [S, V]; a finished sequence leaves the batch when it is looked at."""
    S, steps = random.shape
    device, end = logits.device, ends[0]
    tokens = torch.full((S, steps), end, device=device)
    log_probability = torch.zeros(S, device=device)
    alive = torch.arange(S, device=device)
    finished = torch.zeros(S, dtype=torch.bool, device=device)  # of those alive
    for step in range(steps):
        chosen = choose(logits, random[alive, step], config).masked_fill(finished, end)
        tokens[alive, step] = chosen
        gained = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        log_probability[alive] += gained.masked_fill(finished, 0.0)
        finished = finished | ended(chosen, ends)
        if step + 1 == steps:
            break
        if looks(step + 1, device):
            if finished.all():
                break
            if finished.any():
                kept = (~finished).nonzero()[:, 0]
                past, alive, chosen, finished = past.rows(kept), alive[kept], chosen[kept], finished[kept]
        logits = past.read(model, chosen)
    return [
        (row[: next((place for place, token in enumerate(row) if token in ends), steps) + 1], total)
        for row, total in zip(tokens.tolist(), log_probability.tolist(), strict=True)
    ]


def choose(logits: Tensor, random: Tensor, config: GenerationConfig) -> Tensor:
    """The next token [S]: the likeliest where `random` is NaN, else drawn from the nucleus by inverse distribution."""
    likeliest = logits.argmax(-1)
    if config.decoding == "greedy":
        return likeliest
    on_cpu = logits.device.type == "cpu"
    probabilities = (logits / config.temperature).softmax(-1)
    if config.top_p == 1:
        mass = probabilities.cumsum(-1)
        drawn = torch.searchsorted(mass, (random.nan_to_num(0.0) * mass[:, -1])[:, None], right=True)[:, 0]
        return torch.where(random.isnan(), likeliest, drawn.clamp_max(probabilities.shape[1] - 1))
    size = min(_NUCLEUS, probabilities.shape[1]) if on_cpu else probabilities.shape[1]
    top, ids = probabilities.topk(size)  # [S, size], best first
    while size < probabilities.shape[1] and top.sum(-1).min() < config.top_p:
        size = min(4 * size, probabilities.shape[1])
        top, ids = probabilities.topk(size)
    before = top.cumsum(-1) - top
    mass = top.masked_fill(before >= config.top_p, 0.0).cumsum(-1)
    drawn = torch.searchsorted(mass, (random.nan_to_num(0.0) * mass[:, -1])[:, None], right=True)
    drawn = drawn.clamp_max((before < config.top_p).sum(-1, keepdim=True) - 1)
    return torch.where(random.isnan(), likeliest, ids.gather(1, drawn)[:, 0])
