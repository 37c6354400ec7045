"""Long training in rounds: each ends with everything on disk, so that a killed run repeats one round at most."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipcap_rag.progress import say

_STATE, _LOG = "state.pt", "log.jsonl"


def train_rounds(
    folder: Path, parts: dict[str, Any], rounds: int, train_round: Callable[[int], dict[str, float]]
) -> None:
    """Calls train_round(0), train_round(1), ... and stores `parts` after each.

    Args:
        folder: keeps state.pt and log.jsonl; what is there is continued.
        parts: whatever has state_dict and load_state_dict.
        train_round: seeds itself from the number of the round and returns what is to be logged.
    """
    start, state = 0, folder / _STATE
    if state.is_file():
        stored = torch.load(state, weights_only=True)
        start = stored["rounds"]
        for name, part in parts.items():
            part.load_state_dict(stored[name])
    for number in range(start, rounds):
        began = time.monotonic()
        torch.manual_seed(number)
        entry = {"round": number + 1, **train_round(number), "seconds": round(time.monotonic() - began, 1)}
        new = state.with_suffix(".tmp")
        torch.save({"rounds": number + 1} | {name: part.state_dict() for name, part in parts.items()}, new)
        os.replace(new, state)
        with (folder / _LOG).open("a") as log:
            log.write(json.dumps(entry) + "\n")
        say(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    state.unlink(missing_ok=True)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
