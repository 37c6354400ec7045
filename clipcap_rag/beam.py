"""Beam search over one prefill per image."""

import torch
from torch import Tensor

from clipcap_rag.model import CaptionModel
from clipcap_rag.past import Past, ended, looks


def beam_search(
    model: CaptionModel, past: Past, logits: Tensor, beams: int, steps: int, ends: list[int]
) -> list[list[tuple[list[int], float]]]:
    """Beam search by mean log-probability in which a finished beam keeps its place (ClipCap's rule).

    Args:
        past: of B images, with the logits [B, V] of their first tokens.

    Returns:
        Per image, its beams as tokens and sum of log-probabilities, best mean first.
    """
    B, V = logits.shape
    device = logits.device
    width = min(beams, V - len(ends))
    totals, first = logits.log_softmax(-1).topk(width)  # [B, M]
    tokens = first[..., None]  # [B, M, 1]
    lengths = torch.ones_like(totals)
    stopped = ended(first, ends)
    images = torch.arange(B, device=device)
    past = past.rows(images.repeat_interleave(width))
    finished: list[list[tuple[list[int], float]]] = [[] for _ in range(B)]
    for step in range(1, steps + 1):
        done = stopped.all(-1) if step < steps else torch.ones_like(stopped[:, 0])
        looking = step == steps or looks(step, device)
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
            past = past.rows((keep[:, None] * width + torch.arange(width, device=device)).flatten())
            images, tokens, totals = images[keep], tokens[keep], totals[keep]
            lengths, stopped = lengths[keep], stopped[keep]
        log_probs = past.read(model, tokens[..., -1].flatten()).log_softmax(-1).view(-1, width, V)
        log_probs = log_probs.masked_fill(stopped[..., None], -torch.inf)
        log_probs[..., ends[0]].masked_fill_(stopped, 0.0)
        sums = totals[..., None] + log_probs  # [B, M, V]
        new_lengths = lengths + ~stopped
        best, flat = (sums / new_lengths[..., None]).flatten(1).topk(width)  # [B, M]
        parent, token = flat // V, flat % V
        totals = best * new_lengths.gather(1, parent)
        lengths, stopped = new_lengths.gather(1, parent), stopped.gather(1, parent) | ended(token, ends)
        tokens = tokens.gather(1, parent[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens, token[..., None]], dim=2)
        offsets = torch.arange(len(images), device=device)[:, None] * width
        past = past.rows((offsets + parent).flatten())
    return finished
