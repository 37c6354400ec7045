"""A sweep: the same training with each of several values of one setting, evaluated on the same photos and drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcap_rag.artifact import disk_errors, read_json, refuse_existing, write_json
from clipcap_rag.checkpoint import read_checkpoint
from clipcap_rag.config import EvaluationConfig
from clipcap_rag.errors import InputError, missing_extra
from clipcap_rag.evaluation import evaluate
from clipcap_rag.model import learned_parameters
from clipcap_rag.presets import FIELDS, configure
from clipcap_rag.progress import say
from clipcap_rag.run_directory import differences, is_finished
from clipcap_rag.training import train

_RESULT = "sweep.json"
_DECODINGS = ("greedy", "beam")
_METRICS = ("CIDEr", "BLEU-4")


def sweep(
    features: str | Path,
    validation_features: str | Path,
    index: str | Path | None,
    language_model: str,
    out: str | Path,
    *,
    setting: str,
    values: Sequence[Any],
    presets: Sequence[str] = ("clipcap-mlp", "clipcap-transformer"),
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Trains every preset with every value and scores the best checkpoints on the validation photos.

    With `prefix_length` this is the figure of Mokady et al. 2021 (arXiv 2111.09734) over the length of the prefix. What
    is done is kept: a stopped sweep continues, and one with more values or presets adds to the same directory.

    Args:
        index: caption index of the presets with the retrieval mapper.
        out: a folder for `runs/PRESET-VALUE`, `evaluations/PRESET-VALUE`, sweep.json and sweep.png.
        setting: a field of ModelConfig or TrainConfig.
        settings: other fields, the same for all runs; they win over the presets.

    Returns:
        {"setting", "rows": [{"preset", "value", "learned_parameters", "greedy": {"CIDEr", ...}, "beam": {...}}], ...},
        all rows that `out` holds, by preset and value; metrics are raw fractions.

    Raises:
        InputError: an unusable setting or value, or `out` holds a sweep under other settings.
    """
    out, settings = Path(out), settings or {}
    job = {
        "setting": setting,
        "settings": settings,
        "features": str(Path(features).resolve()),
        "validation_features": str(Path(validation_features).resolve()),
        "index": None if index is None else str(index),
        "language_model": language_model,
    }
    if setting in settings:
        raise InputError(f"{setting} is swept and given as {settings[setting]}; give it once")
    variants = {(preset, value): configure(preset, **settings, **{setting: value})
                for preset in presets for value in values}  # fmt: skip
    if index is not None and all(model.mapper != "retrieval" for model, _ in variants.values()):
        raise InputError(f"none of {', '.join(presets)} looks at neighbours; drop --index or add --preset rag")
    rows = _begin(out, job)
    with disk_errors(out):
        for (preset, value), (model_config, train_config) in variants.items():
            if any((row["preset"], row["value"]) == (preset, value) for row in rows):
                continue
            name, own = f"{preset}-{value}", index if model_config.mapper == "retrieval" else None
            run = out / "runs" / name
            say(f"{setting} {value}, preset {preset}")
            if not is_finished(run):
                train(
                    features,
                    own,
                    language_model,
                    run,
                    model_config=model_config,
                    train_config=train_config,
                    validation_features=validation_features,
                    device=device,
                    dtype=dtype,
                )
            scores = evaluate(
                run,
                [validation_features],
                out / "evaluations" / name,
                indexes=() if own is None else ("default",),
                config=EvaluationConfig(decodings=",".join(_DECODINGS)),
                device=device,
                dtype=dtype,
            )
            rows.append(_row(preset, value, run, scores["rows"]))
            rows.sort(key=lambda row: (row["preset"], row["value"]))
            write_json(out / _RESULT, job | {"rows": rows})
        draw(job | {"rows": rows}, out / "sweep.png")
    return job | {"rows": rows}


def _begin(out: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are done; makes the directory where there is none."""
    if not (out / _RESULT).is_file():
        refuse_existing(out, overwrite=False)
        out.mkdir(parents=True)
        write_json(out / _RESULT, job | {"rows": []})
    before = read_json(out / _RESULT, "sweep")
    rows = before.pop("rows")
    different = differences(before, job)
    if different:
        raise InputError(
            f"{out} holds a sweep with other settings ({'; '.join(different)}); give the same ones or another --out"
        )
    return rows


def _row(preset: str, value: Any, run: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of one run: its scores with the index it was trained with, or without one."""
    own = rows[0]["neighbors"]
    scores = {row["decoding"]: row for row in rows if row["neighbors"] == own}
    return {
        "preset": preset,
        "value": value,
        "learned_parameters": learned_parameters(read_checkpoint(run / "best").model),
    } | {decoding: _values(scores[decoding]["metrics"]) for decoding in _DECODINGS}


def _values(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: metrics[name]["value"] for name in _METRICS}


def draw(result: dict[str, Any], file: Path) -> None:
    """CIDEr and BLEU-4 over the values as a PNG, a colour for each preset and a line style for each decoding."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "eval") from error
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(_METRICS))
    presets = list(dict.fromkeys(row["preset"] for row in result["rows"]))
    for axis, metric in zip(axes, _METRICS, strict=True):
        for number, preset in enumerate(presets):
            rows = [row for row in result["rows"] if row["preset"] == preset]
            values = [row["value"] if type(row["value"]) in (int, float) else str(row["value"]) for row in rows]
            for decoding, style in zip(_DECODINGS, ("o--", "o-"), strict=True):
                points = [100 * row[decoding][metric] for row in rows]
                axis.plot(values, points, style, color=f"C{number}", label=f"{preset}, {decoding}", markersize=4)
        axis.set(xlabel=result["setting"].replace("_", " "), ylabel=f"{metric} (points)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)


def table(result: dict[str, Any]) -> str:
    """The rows for people, as Markdown: metrics in points (times 100)."""
    heads = [f"{metric} {decoding}" for decoding in _DECODINGS for metric in _METRICS]
    lines = [f"| preset | {result['setting']} | learns | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for row in result["rows"]:
        scores = [f"{100 * row[decoding][metric]:.1f}" for decoding in _DECODINGS for metric in _METRICS]
        cells = [row["preset"], str(row["value"]), f"{row['learned_parameters']:,}", *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def setting_values(text: str) -> tuple[str, list[Any]]:
    """`prefix_length=1,5,10` -> ("prefix_length", [1, 5, 10]).

    Raises:
        InputError: the text has another form, names no setting, or a value is not of the setting's kind.
    """
    name, _, listed = text.partition("=")
    if name not in FIELDS or not listed:
        raise InputError(f"{text!r} names no setting with values; write one such as prefix_length=1,5,10")
    kind = type(FIELDS[name].default)
    try:
        values = [{"on": True, "off": False}[word] if kind is bool else kind(word) for word in listed.split(",")]
    except (KeyError, ValueError) as error:
        wanted = "on or off" if kind is bool else kind.__name__
        raise InputError(f"{text!r} holds a value that is not {wanted}; separate values by commas") from error
    return name, values
