"""How sure a captioner may be: the calibrated probability that a caption is good, from signals that need no truth."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from clipcap_rag.artifact import read_manifest, write_manifest
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.rerank import Candidate

KIND, VERSION, MANIFEST = "calibration", 1, "abstention.json"
_RIDGE, _STEPS = 1.0, 50  # of the regression: weight of the squared coefficients, most Newton steps
_SPREAD = 1e-3  # least standard deviation of cosines; what differs less is equal


def signals(
    image: np.ndarray, candidates: Sequence[Candidate], scores: np.ndarray, background: np.ndarray
) -> dict[str, float]:
    """What tells a good caption from a bad one without reference captions; larger speaks for the caption.

    `agreement` is the mean cosine of the best candidate with the others, 1 where there are none. `nearness` is the
    mean cosine of the neighbours, small for a photo far from the index; it is left out without neighbours.
    `similarity` is the cosine of image and caption, standardised by those of the image with captions of other images,
    since some images lie near every text (after MA-PaPSP, arXiv 2601.22570). `log_probability` is the mean per token.

    Args:
        image: [D], unit length.
        candidates: best first; the first is judged.
        scores: [K] cosines of its neighbours.
        background: [M, D] captions of other images, unit length.
    """
    best, usual = candidates[0], background @ image
    others = [float(best.embedding @ other.embedding) for other in candidates[1:]]
    found = {"agreement": float(np.mean(others)) if others else 1.0}
    if len(scores):
        found["nearness"] = float(scores.mean())
    spread = max(float(usual.std()), _SPREAD)
    return found | {
        "similarity": (best.clip_similarity - float(usual.mean())) / spread,
        "log_probability": best.mean_log_probability,
    }


@dataclass(frozen=True)
class Logistic:
    """The probability 1 / (1 + exp(-(bias + weights . (values - mean) / scale))) of F values."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    @classmethod
    def fit(cls, values: np.ndarray, good: np.ndarray) -> Self:
        """Ridge logistic regression by Newton's method (Platt 1999 calibrates scores so).

        Args:
            values: [N, F].
            good: [N] bool.

        Raises:
            InputError: all or none are good.
        """
        if good.all() or not good.any():
            which = "all" if good.all() else "none"
            raise InputError(f"{which} of {len(good)} captions count as good; give more photos or another --good")
        mean, scale = values.mean(0), np.maximum(values.std(0), 1e-6)
        rows = np.column_stack([np.ones(len(values)), (values - mean) / scale])  # [N, 1+F]
        ridge = _RIDGE * np.diag([0.0, *np.ones(values.shape[1])])
        weights = np.zeros(rows.shape[1])
        for _ in range(_STEPS):
            guess = _sigmoid(rows @ weights)
            curvature = (rows.T * (guess * (1 - guess))) @ rows + ridge
            step = np.linalg.solve(curvature, rows.T @ (good - guess) - ridge @ weights)
            weights = weights + step
            if np.abs(step).max() < 1e-9:
                break
        return cls(mean, scale, weights[1:], float(weights[0]))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Probabilities [N] of values [N, F]."""
        return _sigmoid(self.bias + (values - self.mean) / self.scale @ self.weights)


def _sigmoid(odds: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(odds / 2)  # which overflows nowhere


@dataclass(frozen=True)
class Confidence:
    """The probability that a caption is good, and whether that is too small to be sure."""

    sure: float
    abstained: bool


@dataclass(frozen=True)
class Abstention:
    """A calibration of one captioner under one way of writing.

    Attributes:
        names: the signals that `logistic` reads, in its order.
        background: [M, D] captions written for the photos that it was calibrated on, float16 values.
        level: below it a caption is marked as not sure.
        made_for: what `circumstances` gave when it was made.
        measured: how good it is, for people.
    """

    names: tuple[str, ...]
    logistic: Logistic
    background: np.ndarray
    level: float
    made_for: dict[str, Any]
    measured: dict[str, Any]

    def confidence(self, image: np.ndarray, candidates: Sequence[Candidate], scores: np.ndarray) -> Confidence:
        """How sure one caption is; arguments as those of `signals`."""
        found = signals(image, candidates, scores, self.background)
        missing = [name for name in self.names if name not in found]
        if missing:
            raise InputError("the index gave no neighbour, which this calibration reads; use another index")
        sure = float(self.logistic(np.array([[found[name] for name in self.names]]))[0])
        return Confidence(sure, sure < self.level)

    def check(self, checkpoint: Checkpoint, generation: GenerationConfig, num_neighbors: int) -> None:
        """Raises InputError if it was made for another captioner or another way of writing."""
        here = circumstances(checkpoint, generation, num_neighbors)
        if here["model"] != self.made_for["model"] or self.background.shape[1] != checkpoint.config.clip_dim:
            raise InputError("the calibration is of another model; make one with clipcap-rag calibrate --model")
        for name, made in (self.made_for["writing"]).items():
            if here["writing"].get(name, made) != made:
                raise InputError(
                    f"the calibration is for {name} {made!r}, here it is {here['writing'][name]!r}; "
                    "caption as it was calibrated, or calibrate for this"
                )

    def write(self, folder: Path) -> None:
        """Adds its two files to `folder`; what lies there already becomes part of it."""
        np.save(folder / "background.npy", self.background.astype(np.float16))
        fit = self.logistic
        fields = {
            "signals": {
                name: {"mean": mean, "scale": scale, "weight": weight}
                for name, mean, scale, weight in zip(
                    self.names, fit.mean.tolist(), fit.scale.tolist(), fit.weights.tolist(), strict=True
                )
            },
            "bias": fit.bias,
            "level": self.level,
            "made_for": self.made_for,
            "measured": self.measured,
        }
        write_manifest(folder, MANIFEST, KIND, VERSION, fields)

    @classmethod
    def open(cls, argument: str | Path) -> Self:
        """Opens the folder that `clipcap-rag calibrate` wrote; `FOLDER:LEVEL` takes another level.

        Raises:
            InputError: it is missing, altered, of another format version or damaged, or the level is none.
        """
        folder, level = _level(str(argument))
        manifest = read_manifest(folder, MANIFEST, KIND, VERSION)
        try:
            found = dict(manifest["signals"])
            columns = [np.array([found[name][key] for name in found], float) for key in ("mean", "scale", "weight")]
            logistic = Logistic(*columns, float(manifest["bias"]))
            own = float(manifest["level"])
            background = np.load(folder / "background.npy", allow_pickle=False).astype(np.float32)
            made_for = {name: dict(manifest["made_for"][name]) for name in ("model", "writing")}
            measured = dict(manifest["measured"])
            if not all(np.isfinite(part).all() for part in (*columns, logistic.bias, own, background)):
                raise ValueError("a number is not finite")
            if background.ndim != 2 or not columns[0].size or columns[1].min() <= 0:
                raise ValueError("its parts do not fit")
        except (LookupError, TypeError, ValueError, OSError, EOFError, AttributeError) as error:
            raise InputError(f"{folder} holds no usable calibration ({error!r}); run clipcap-rag calibrate") from error
        return cls(tuple(found), logistic, background, own if level is None else level, made_for, measured)


def circumstances(checkpoint: Checkpoint, generation: GenerationConfig, num_neighbors: int) -> dict[str, Any]:
    """What a calibration depends on: the model, told by its shape and training, and how its captions are written."""
    writing = {name: value for name, value in generation.to_json().items() if name != "seed"}
    model = {"mapper": checkpoint.config.to_json(), "training": checkpoint.training}
    return json.loads(json.dumps({"model": model, "writing": {"num_neighbors": num_neighbors} | writing}))


def _level(argument: str) -> tuple[Path, float | None]:
    folder, colon, text = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), None
    try:
        level = float(text)
    except ValueError:
        return Path(argument), None
    if not 0 <= level <= 1:
        raise InputError(f"the level of --abstain is {text}; it is a probability from 0 to 1")
    return Path(folder), level
