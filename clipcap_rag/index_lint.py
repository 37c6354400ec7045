"""What should be mended in an index: duplicates, cut captions, outliers, and photos that it has no words for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcap_rag.errors import InputError
from clipcap_rag.index_names import resolve_index
from clipcap_rag.index_store import IndexFiles, open_files
from clipcap_rag.progress import bar
from clipcap_rag.sources import normalize_caption

if TYPE_CHECKING:  # without photos neither torch nor open_clip is loaded where `quick` is asked for
    from clipcap_rag.encoder import Encoder

_BLOCK = 16_384  # rows compared at a time
_SAMPLE = 2000  # captions that are compared with all others
_NEAR = 0.98  # cosine from which on captions of other words count as near duplicates
_FENCE = 3.0  # interquartile ranges below the lower quartile: Tukey's far out
_SHOWN = 5
_NOBODY = -1


@dataclass(frozen=True)
class Finding:
    """How many captions or photos show something, of how many that were looked at, and some of them."""

    name: str
    count: int
    looked_at: int
    examples: list[str]


@dataclass
class LintReport:
    """What `lint_index` found.

    Attributes:
        captions: how many the index holds.
        findings: one per kind of fault, in a fixed order, those without a case included.
        typical_cosine: median over the photos of the cosine with the nearest caption; None without photos.
    """

    path: Path
    captions: int
    findings: list[Finding] = field(default_factory=list)
    typical_cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}

    def table(self) -> str:
        lines = [f"{self.path}: {self.captions} captions"]
        if self.typical_cosine is not None:
            lines.append(f"  a photo's nearest caption has a cosine of {self.typical_cosine:.3f} (median)")
        for finding in self.findings:
            share = f" ({finding.count / finding.looked_at:.1%} of {finding.looked_at})" if finding.looked_at else ""
            lines.append(f"  {finding.name:<24}{finding.count}{share}")
            lines += [f"      {example}" for example in finding.examples]
        return "\n".join(lines)


def lint_index(
    index: str | Path,
    *,
    images: Sequence[str | Path] = (),
    features: str | Path | None = None,
    quick: bool = False,
    clip: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> LintReport:
    """Looks for what makes an index worse than it could be; nothing is changed.

    Near duplicates and outliers are looked for among at most 2,000 captions, evenly spaced, each compared with all.

    Args:
        index: name or path.
        images, features: photos, or a feature set of them, that the index should have words for. A photo counts as
            poorly covered when the cosine of its nearest caption is far below that of the other photos: more than three
            interquartile ranges below their lower quartile, or not half their median.
        quick: load no CLIP model: cut captions are not looked for.
        clip: CLIP model, where the one named in the index has moved.

    Raises:
        InputError: the index or the photos cannot be read, or another model made the features.
    """
    files = open_files(resolve_index(index))
    live = np.flatnonzero(files.live)
    report = LintReport(files.path, len(live))
    texts, groups = _texts(files)
    report.findings += _repeated(files, texts, groups)
    sound, faulty = _lengths(files)
    report.findings.append(_finding(files, "not of unit length", faulty, len(live)))
    sample = sound[np.unique(np.linspace(0, len(sound) - 1, min(_SAMPLE, len(sound))).astype(np.int64))]
    report.findings += _neighbourhood(files, sample, groups)
    encoder = None if quick else _encoder(files.path, clip, device, dtype)
    if encoder:
        report.findings.append(_cut(files, live, encoder))
    if images or features:
        names, photos = _photos(files, encoder, images, features, report)
        _cover(files, names, photos, report)
    return report


def _encoder(path: Path, clip: str | None, device: str, dtype: str) -> "Encoder":
    from clipcap_rag.index_editor import index_encoder

    return index_encoder(path, clip, device, dtype)


def _texts(files: IndexFiles) -> tuple[list[str], np.ndarray]:
    """Each different normalised text, and its number for every row [N] int64; -1 for removed rows."""
    numbers: dict[str, int] = {}
    groups = np.full(files.rows, _NOBODY, np.int64)
    for start, captions in files.column_batches("caption"):
        for row, caption in enumerate(captions, start):
            if files.live[row]:
                groups[row] = numbers.setdefault(normalize_caption(caption), len(numbers))
    return list(numbers), groups


def _repeated(files: IndexFiles, texts: list[str], groups: np.ndarray) -> list[Finding]:
    """Captions that only repeat another one, and those without a word."""
    live = groups[groups >= 0]
    counts = np.bincount(live, minlength=len(texts))
    often = [group for group in np.argsort(-counts, kind="stable")[:_SHOWN].tolist() if counts[group] > 1]
    examples = [f"{counts[group]} times: {texts[group]}" for group in often]
    empty = np.flatnonzero(groups == texts.index("")) if "" in texts else np.zeros(0, np.int64)
    repeated = Finding("repeats of a caption", int(len(live) - len(texts)), len(live), examples)
    return [repeated, _finding(files, "without a word", empty, len(live))]


def _lengths(files: IndexFiles) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are left, with a vector of length 1 and without."""
    lengths = np.concatenate([np.zeros(0), *(np.linalg.norm(block.astype(np.float32), axis=1)
                                             for _, block in files.blocks(_BLOCK))])  # fmt: skip
    unit = np.abs(lengths - 1) < 0.01
    return np.flatnonzero(files.live & unit), np.flatnonzero(files.live & ~unit)


def _neighbourhood(files: IndexFiles, sample: np.ndarray, groups: np.ndarray) -> list[Finding]:
    """Captions of a sample whose nearest caption of other words is almost the same, or is far away."""
    queries = files.embeddings(sample)
    cosines, nearest = _best(files, queries, groups[sample], groups)
    near = np.flatnonzero(cosines >= _NEAR)
    shown = near[:_SHOWN]
    beside = zip(cosines[shown], files.captions(sample[shown]), files.captions(nearest[shown]), strict=True)
    pairs = [f"{cosine:.3f}: {caption[:100]} | {other[:100]}" for cosine, caption, other in beside]
    known = cosines[np.isfinite(cosines)]
    alone = np.flatnonzero(np.isfinite(cosines) & (cosines < _low_fence(known))) if len(known) else near[:0]
    alone = alone[np.argsort(cosines[alone])]
    lonely = [f"{cosines[place]:.3f}: {files.captions([sample[place]])[0][:100]}" for place in alone[:_SHOWN]]
    return [
        Finding("near duplicates", len(near), len(sample), pairs),
        Finding("far from every other", len(alone), len(sample), lonely),
    ]


def _best(files: IndexFiles, queries: np.ndarray, own: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per query [Q, D] the largest cosine [Q] with a row of another group than its own, and that row [Q]."""
    cosines, rows = np.full(len(queries), -np.inf, np.float32), np.full(len(queries), _NOBODY, np.int64)
    with bar("comparing", total=files.rows, unit="caption") as progress:
        for start, block in files.blocks(_BLOCK):
            there = groups[start : start + len(block)]
            scores = queries @ np.nan_to_num(block.astype(np.float32), posinf=0, neginf=0).T  # [Q, n]
            scores[:, there == _NOBODY] = -np.inf
            scores[own[:, None] == there] = -np.inf
            place = scores.argmax(axis=1)
            found = scores[np.arange(len(queries)), place]
            better = found > cosines
            cosines[better], rows[better] = found[better], start + place[better]
            progress.update(len(block))
    return cosines, rows


def _low_fence(values: np.ndarray) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(low - _FENCE * (high - low))


def _cut(files: IndexFiles, live: np.ndarray, encoder: "Encoder") -> Finding:
    """Captions whose last character the text tower does not see."""
    cut = []
    for start in range(0, len(live), _BLOCK):
        rows = live[start : start + _BLOCK]
        captions = files.captions(rows)
        longest = [place for place, caption in enumerate(captions) if len(caption) >= encoder.context_length - 2]
        if longest:
            whole = encoder.tokenizer([captions[place] for place in longest])
            shorter = encoder.tokenizer([captions[place][:-1] for place in longest])
            same = (whole == shorter).all(dim=1).tolist()
            cut += [int(rows[place]) for place, unseen in zip(longest, same, strict=True) if unseen]
    return _finding(files, f"cut at {encoder.context_length} tokens", np.array(cut, np.int64), len(live))


def _photos(
    files: IndexFiles,
    encoder: "Encoder | None",
    images: Sequence[str | Path],
    features: str | Path | None,
    report: LintReport,
) -> tuple[list[str], np.ndarray]:
    """Names and image embeddings [P, D] of the photos; those that cannot be read become a finding."""
    if features:
        from clipcap_rag.encoder import check_same_encoder
        from clipcap_rag.features import FeatureSet

        photos = FeatureSet.open(features)
        owner = f"the feature set {features}"
        check_same_encoder(photos.encoder, owner, files.manifest["encoder"], f"the index {files.path}")
        return photos.images, photos.unit_embeddings()
    if encoder is None:
        raise InputError("photos need the CLIP model; leave quick out, or give a feature set")
    from clipcap_rag.images import expand_images

    paths = expand_images([str(image) for image in images])
    encoded = encoder.encode_image(paths)
    read = [place for place, error in enumerate(encoded.errors) if error is None]
    errors = [error for error in encoded.errors if error is not None]
    report.findings.append(Finding("unreadable photos", len(errors), len(paths), errors[:_SHOWN]))
    return [str(paths[place]) for place in read], encoded.embeddings.vectors[read]


def _cover(files: IndexFiles, names: list[str], photos: np.ndarray, report: LintReport) -> None:
    groups = np.where(files.live, 0, _NOBODY)
    cosines, rows = _best(files, photos, np.full(len(photos), -2), groups)
    if not len(photos) or not files.live.any():
        return
    report.typical_cosine = round(float(np.median(cosines)), 4)
    poor = np.flatnonzero(cosines < max(_low_fence(cosines), report.typical_cosine / 2))
    poor = poor[np.argsort(cosines[poor])]
    shown = [f"{cosines[p]:.3f}: {names[p]} | {files.captions([rows[p]])[0]}" for p in poor[:_SHOWN]]
    report.findings.append(Finding("photos poorly covered", len(poor), len(photos), shown))


def _finding(files: IndexFiles, name: str, rows: np.ndarray, looked_at: int) -> Finding:
    examples = [f"id {record['caption_id']}: {record['caption'][:100]}" for record in files.records(rows[:_SHOWN])]
    return Finding(name, len(rows), looked_at, examples)
