"""Candidate captions from a prefix: greedy, sampling and beam search over one prefill per image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from clipcap_rag.config import GenerationConfig
from clipcap_rag.model import CaptionModel
from clipcap_rag.prompt import with_prompt

_SEQUENCES = 256  # written at once; bounds memory whatever the number of candidates
_NUCLEUS = 256  # tokens looked at first on a CPU when the nucleus is cut out of the vocabulary
_LOOK_EVERY = 8  # steps between two looks, on a GPU, at what is finished: each look makes the host wait for the GPU


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
) -> list[list[Written]]:
    """Writes candidates for each image.

    Greedy gives one; sampling gives the greedy one and `candidates - 1` samples (Holtzman et al. 2020, arXiv
    1904.09751) in the order drawn; beam search gives `num_beams`, best mean log-probability first. So does `clipcap`,
    the rule of ClipCap's notebooks (Mokady et al. 2021, arXiv 2111.09734), which differs in two points: the first token
    may be any, and only the stop token ends a caption, not the end token.

    Args:
        prefix: [B, P, E].
        digests: per image, the bytes that together with the seed determine its samples.
        stop_token: text whose first token ends a caption and belongs to it; empty if only the end token does.

    Raises:
        InputError: the prompt leaves the language model no position to write at.
    """
    prefix, prompt = with_prompt(model, tokenizer, prefix, config.prompt)
    steps = min(config.longest, model.language_model.config.n_positions - prefix.shape[1])
    per_image, ends = config.captions_per_image, _ends(model, tokenizer, config, stop_token)
    images = max(1, _SEQUENCES // per_image)
    written: list[list[Written]] = []
    for start in range(0, len(prefix), images):
        part = prefix[start : start + images]
        cache, logits = prefill(model, part)
        if config.decoding != "clipcap":
            logits[:, ends] = -torch.inf  # a caption has at least one token
        if config.decoding in ("beam", "clipcap"):
            decoded = _beam(model, cache, logits, config.num_beams, steps, ends)
        else:
            decoded = _sample(model, cache, logits, config, per_image, digests[start : start + images], steps, ends)
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


def _ended(tokens: Tensor, ends: list[int]) -> Tensor:
    return torch.stack([tokens == end for end in ends]).any(0)


def _read(
    tokenizer: PreTrainedTokenizerBase, end: int, prompt: list[int], tokens: list[int], log_probability: float
) -> Written:
    text = tokenizer.decode([*prompt, *(token for token in tokens if token != end)], skip_special_tokens=True)
    return Written(" ".join(text.split()), tuple(tokens), log_probability)


def prefill(model: CaptionModel, prefix: Tensor) -> tuple[DynamicCache, Tensor]:
    """Runs the prefix once: its keys and values, and the logits [B, V] of the first token."""
    output = model.language_model(inputs_embeds=prefix.to(model.language_model.dtype), use_cache=True, logits_to_keep=1)
    return output.past_key_values, output.logits[:, -1].float()


def next_logits(model: CaptionModel, cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Feeds one token [S] to each sequence; returns the logits [S, V] of the next."""
    return model.language_model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()


def _rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache that holds these rows of `cache`, which stays as it is."""
    chosen = DynamicCache()
    for number, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows], layer.values[rows], number)
    return chosen


def uniforms(seed: int, digest: bytes, count: int, steps: int) -> np.ndarray:
    """Random numbers [count, steps] float32 in [0, 1) that belong to an image; more candidates keep the first ones."""
    key = hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.random((count, steps), np.float32)


def _sample(
    model: CaptionModel,
    cache: DynamicCache,
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
        decoded += _decode(model, _rows(cache, owner[part]), logits[owner[part]], random[part], config, ends)
    return [decoded[start : start + per_image] for start in range(0, len(decoded), per_image)]


def _decode(
    model: CaptionModel, cache: DynamicCache, logits: Tensor, random: Tensor, config: GenerationConfig, ends: list[int]
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
        finished = finished | _ended(chosen, ends)
        if step + 1 == steps:
            break
        if _looks(step + 1, device):
            if finished.all():
                break
            if finished.any():
                kept = (~finished).nonzero()[:, 0]
                cache, alive, chosen, finished = _rows(cache, kept), alive[kept], chosen[kept], finished[kept]
        logits = next_logits(model, cache, chosen)
    return [
        (row[: next((place for place, token in enumerate(row) if token in ends), steps) + 1], total)
        for row, total in zip(tokens.tolist(), log_probability.tolist(), strict=True)
    ]


def _looks(step: int, device: torch.device) -> bool:
    return device.type == "cpu" or step % _LOOK_EVERY == 0


def choose(logits: Tensor, random: Tensor, config: GenerationConfig) -> Tensor:
    """The next token [S]: the likeliest where `random` is NaN, else drawn from the nucleus by inverse distribution."""
    likeliest = logits.argmax(-1)
    if config.decoding == "greedy":
        return likeliest
    on_cpu = logits.device.type == "cpu"
    probabilities = (logits / config.temperature).softmax(-1)
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


def _beam(
    model: CaptionModel, cache: DynamicCache, logits: Tensor, beams: int, steps: int, ends: list[int]
) -> list[list[tuple[list[int], float]]]:
    """Beam search by mean log-probability in which a finished beam keeps its place (ClipCap's rule)."""
    B, V = logits.shape
    device = logits.device
    width = min(beams, V - len(ends))
    totals, first = logits.log_softmax(-1).topk(width)  # [B, M]
    tokens = first[..., None]  # [B, M, 1]
    lengths = torch.ones_like(totals)
    stopped = _ended(first, ends)
    images = torch.arange(B, device=device)
    cache = _rows(cache, images.repeat_interleave(width))
    finished: list[list[tuple[list[int], float]]] = [[] for _ in range(B)]
    for step in range(1, steps + 1):
        done = stopped.all(-1) if step < steps else torch.ones_like(stopped[:, 0])
        looking = step == steps or _looks(step, device)
        for place in done.nonzero()[:, 0].tolist() if looking else ():
            finished[images[place]] = [
                (row[: int(length)], total)
                for row, length, total in zip(
                    tokens[place].tolist(), lengths[place].tolist(), totals[place].tolist(), strict=True
                )
            ]
        if looking and done.all():
            break
        if looking and done.any():
            keep = (~done).nonzero()[:, 0]
            cache = _rows(cache, (keep[:, None] * width + torch.arange(width, device=device)).flatten())
            images, tokens, totals = images[keep], tokens[keep], totals[keep]
            lengths, stopped = lengths[keep], stopped[keep]
        log_probs = next_logits(model, cache, tokens[..., -1].flatten()).log_softmax(-1).view(-1, width, V)
        log_probs = log_probs.masked_fill(stopped[..., None], -torch.inf)
        log_probs[..., ends[0]].masked_fill_(stopped, 0.0)
        sums = totals[..., None] + log_probs  # [B, M, V]
        new_lengths = lengths + ~stopped
        best, flat = (sums / new_lengths[..., None]).flatten(1).topk(width)  # [B, M]
        parent, token = flat // V, flat % V
        totals = best * new_lengths.gather(1, parent)
        lengths, stopped = new_lengths.gather(1, parent), stopped.gather(1, parent) | _ended(token, ends)
        tokens = tokens.gather(1, parent[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens, token[..., None]], dim=2)
        offsets = torch.arange(len(images), device=device)[:, None] * width
        cache.reorder_cache((offsets + parent).flatten())
    return finished
