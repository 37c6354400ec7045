"""Stage `card`: the model card of the starter, with figures from the evaluation stage."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from starter.release import INDEX, MODEL, release

_DECODINGS = {"nearest caption": "nearest caption", "greedy": "greedy", "beam": "beam 5", "sample": "16 reranked"}
_NEIGHBORS = {"starter": "starter index", "flickr8k": "Flickr8k training captions", "none": "none (retrieval off)"}


def write(work: Path, root: Path) -> None:
    """Writes the starter again, with the card."""
    results = json.loads((work / "evaluation/results.json").read_text())
    model, index = root / MODEL, root / INDEX
    weights = {"CLIP": model / "clip/open_clip_model.safetensors", "captioner": model / "model.safetensors"}
    manifest = json.loads((index / "index.json").read_text())
    log = [json.loads(line) for line in (work / "clip/log.jsonl").read_text().splitlines()]
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        parts="\n".join(_part(name, file) for name, file in weights.items()),
        phrases=sum(segment["rows"] for segment in manifest["segments"]),
        index_size=_size(*(path for path in index.rglob("*") if path.is_file())),
        times=_times(work / "stages.jsonl"),
        rounds=len(log),
        passes=len(list((work / "views").iterdir())),
        scores=_scores(results["rows"]),
        recall=", ".join(f"{name} {100 * value:.1f}" for name, value in results["features"][0]["recall"].items()),
    )
    release(work, root, text)
    (work / "card").mkdir()


def _part(name: str, file: Path) -> str:
    with safe_open(file, "pt") as stored:
        counts = {key: stored.get_tensor(key).numel() for key in stored.keys()}  # noqa: SIM118
    if name == "CLIP":
        photo = sum(count for key, count in counts.items() if key.startswith("visual."))
        what = f"RegNetX-200MF for photos ({photo / 1e6:.2f} M) and a 3-layer causal transformer for captions"
    else:
        mapper = sum(count for key, count in counts.items() if key.startswith("mapper."))
        what = f"retrieval mapper ({mapper / 1e6:.2f} M) and a 4-layer GPT-2, 224 wide"
    return f"| {name} | {what} | {sum(counts.values()) / 1e6:.2f} M | {_size(file)} |"


def _size(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _times(log: Path) -> str:
    seconds: dict[str, float] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        seconds[entry["stage"]] = seconds.get(entry["stage"], 0) + entry["seconds"]
    names, values = " | ".join(seconds), " | ".join(f"{value:.0f}" for value in seconds.values())
    return f"| {names} |\n|{'---|' * len(seconds)}\n| {values} |"


def _scores(rows: list[dict[str, Any]]) -> str:
    cells = {
        (row["neighbors"], row["decoding"]): " / ".join(
            f"{100 * row['metrics'][name]['value']:.1f}" for name in ("CIDEr", "BLEU-4")
        )
        for row in rows
    }
    lines = ["| neighbours | " + " | ".join(_DECODINGS.values()) + " |", "|---" * (len(_DECODINGS) + 1) + "|"]
    for neighbors, title in _NEIGHBORS.items():
        lines.append(f"| {title} | " + " | ".join(cells.get((neighbors, name), "") for name in _DECODINGS) + " |")
    return "\n".join(lines)
