"""The picture of a training run: losses and validation CIDEr by epoch."""

import math
from pathlib import Path
from typing import Any

from clipcap_rag.errors import missing_extra


def draw_losses(history: list[dict[str, Any]], out: Path) -> None:
    """Writes a PNG with training and validation loss and CIDEr from the entries of log.jsonl.

    Epochs that were trained on rewards have no training loss.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "train") from error
    epochs = [entry["epoch"] for entry in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    losses = figure.subplots()
    losses.plot(epochs, [entry.get("train_loss", math.nan) for entry in history], "o-", label="training loss")
    losses.plot(epochs, [entry["validation_loss"] for entry in history], "s-", label="validation loss")
    losses.set(xlabel="epoch", ylabel="loss (nats per token)")
    losses.xaxis.get_major_locator().set_params(integer=True)
    cider = losses.twinx()
    cider.plot(epochs, [100 * entry["CIDEr"] for entry in history], "^--", color="tab:green", label="validation CIDEr")
    cider.set_ylabel("CIDEr (points)")
    lines = losses.get_lines() + cider.get_lines()
    losses.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.savefig(out, dpi=120)
