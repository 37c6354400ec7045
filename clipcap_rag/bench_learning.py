"""The comparison of training steps: ours against the recipe of ClipCap (arXiv 2111.09734, its train.py)."""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from clipcap_rag.bench_protocol import Comparison, Disagreement
from clipcap_rag.bench_subjects import PREFIX, Subjects, with_amx
from clipcap_rag.model import IGNORED, CaptionModel

_PADDED = 40  # tokens to which ClipCap pads every caption


def comparisons(subjects: Subjects) -> Iterator[Comparison]:
    """In float32 and in bfloat16, both against float32."""
    yield _steps("training step, float32", subjects, torch.float32, 2.0)
    yield _steps("training step, bfloat16", subjects, torch.bfloat16, with_amx(4.0))


def _steps(name: str, subjects: Subjects, dtype: torch.dtype, target: float | None) -> Comparison:
    sizes, device = subjects.sizes, subjects.device
    random = torch.Generator().manual_seed(4)
    lengths = [min(_PADDED, len(caption.split()) + 3) for caption in subjects.captions(sizes.batch)]
    model, plain = subjects.caption_model(torch.float32), subjects.caption_model(torch.float32)
    vocabulary = model.language_model.config.vocab_size
    tokens = torch.full((sizes.batch, _PADDED), IGNORED)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, vocabulary - 1, (length,), generator=random)
    tokens, images = tokens.to(device), torch.randn(sizes.batch, subjects.float32.dim, generator=random).to(device)
    shortest = tokens[:, : max(lengths)]
    plain.language_model.requires_grad_(True)  # ClipCap's prefix-only training computes these gradients too
    ours = _trained(model, lambda: _our_loss(model, shortest, images, dtype))
    theirs = _trained(plain, lambda: _clipcap_loss(plain, tokens, images))

    def agree() -> str:
        with torch.no_grad():
            fast, slow = _our_loss(model, shortest, images, dtype).item(), _clipcap_loss(plain, tokens, images).item()
        difference = abs(fast - slow) / slow
        if difference > (1e-4 if dtype is torch.float32 else 1e-2):
            raise Disagreement(f"the losses are {fast:.4f} and {slow:.4f}")
        ours(), theirs()
        return f"losses {fast:.4f} and {slow:.4f} before the first step"

    mean = sum(lengths) / len(lengths)
    return Comparison(
        name, f"batch {sizes.batch}, prefix {PREFIX}, {mean:.1f} tokens in the mean",
        f"frozen language model, real lengths, {str(dtype).removeprefix('torch.')}",
        f"ClipCap: padded to {_PADDED}, gradients of all weights, float32", target, ours, theirs, agree,
    )  # fmt: skip


def _trained(model: CaptionModel, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.mapper.parameters(), lr=2e-5)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def _our_loss(model: CaptionModel, tokens: torch.Tensor, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
        total, count = model.loss(tokens, images)
    return total / count


def _clipcap_loss(model: CaptionModel, tokens: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    ids = tokens.masked_fill(tokens == IGNORED, 0)
    words = model.language_model.transformer.wte(ids)
    inputs = torch.cat([model.mapper(images), words], dim=1)
    mask = torch.cat([torch.ones(len(ids), PREFIX, device=ids.device), (tokens != IGNORED).float()], dim=1)
    logits = model.language_model(inputs_embeds=inputs, attention_mask=mask).logits[:, PREFIX - 1 : -1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.flatten(), ignore_index=0)
