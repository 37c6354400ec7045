"""The programs in Java that pycocoevalcap brings: tokenizer, METEOR, SPICE, each with a deadline."""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipcap_rag.bootstrap import Measure, mean
from clipcap_rag.errors import InputError
from clipcap_rag.metrics import require_metrics

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # what coco-caption takes away
JAVA_TOKENIZER = {"name": "PTBTokenizer of Stanford CoreNLP 3.4.1, in Java", "agreement": 1.0}
_TOKENIZER, _METEOR, _SPICE = "tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar", "spice/spice-1.0.jar"
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_START, _PER_CAPTION = 300, 0.1  # seconds until a program is taken to hang; SPICE parses a sentence in a few hundredths

# METEOR 1.5 for English (Denkowski and Lavie 2014): weight of recall, of fragmentation, of content words, of the four
# ways to match a word: exact, by stem, by synonym, by paraphrase
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WAYS = np.array([1.0, 0.6, 0.8, 0.6])


def java_fault() -> str | None:
    """Why the programs cannot run: a sentence with the remedy, or None if Java is there."""
    if shutil.which("java"):
        return None
    return "there is no java on the PATH; install a Java runtime, such as openjdk-17-jre-headless"


def spice_fault() -> str | None:
    """Why SPICE cannot run: a sentence with the remedy, or None if Java and its models are there."""
    folder = _home() / "spice" / "lib"
    missing = [name for name in _SPICE_MODELS if not (folder / name).is_file()]
    if java_fault() or not missing:
        return java_fault()
    return (
        f"{' and '.join(missing)} must be in {folder}; with a network run "
        "python -m pycocoevalcap.spice.get_stanford_models, else copy them there"
    )


def java_tokenize(captions: Sequence[str]) -> list[str]:
    """Lower-case words joined by spaces, without punctuation, from the tokenizer that coco-caption uses.

    Raises:
        InputError: it does not run or gives something else than one line for each caption.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    asked = [line for line in lines if line]
    if not asked:
        return lines
    arguments = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    output = _run(("-cp",), _TOKENIZER, arguments, "\n".join(asked) + "\n", len(asked))
    answered = output.removesuffix("\n").split("\n")
    if len(answered) != len(asked):
        raise InputError(f"the Java tokenizer made {len(answered)} lines of {len(asked)} captions; use --no-java")
    words = iter(" ".join(word for word in line.split() if word not in _PUNCTUATION) for line in answered)
    return [next(words) if line else "" for line in lines]


def meteor(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of the corpus, from what its program counts in each photo.

    Args:
        references: per photo, references that are words joined by spaces.
        captions: likewise.

    Raises:
        InputError: the program does not run or answers with something else than counts.
    """
    lines = [f"SCORE ||| {' ||| '.join(map(_plain, texts))} ||| {_plain(caption)} \n"
             for texts, caption in zip(references, captions, strict=True)]  # fmt: skip
    arguments = ("-", "-", "-stdio", "-l", "en", "-norm")
    answered = _run(("-Xmx2G", "-jar"), _METEOR, arguments, "".join(lines), len(lines)).splitlines()
    try:
        counts = np.array([[float(number) for number in line.split()] for line in answered]).reshape(len(lines), 23)
    except ValueError as error:
        raise InputError(f"METEOR answers with something else than its counts ({answered[-1][:60]!r})") from error
    return {"METEOR": Measure(_meteor_statistics(counts), _meteor)}


def _meteor_statistics(counts: np.ndarray) -> np.ndarray:
    """[N, 6] of the program's counts: lengths and matches of caption and reference, weighted, chunks, matched words.

    Its counts are words and function words of both, for each way to match content words and function words of both,
    then chunks and matched words of both.
    """
    lengths, function = counts[:, 0:2], counts[:, 2:4]
    matches = counts[:, 4:20].reshape(-1, 4, 2, 2)  # way, content or function, caption or reference
    weights = np.array([_DELTA, 1 - _DELTA])
    weighted_lengths = _DELTA * (lengths - function) + (1 - _DELTA) * function
    weighted_matches = np.einsum("nwks,w,k->ns", matches, _WAYS, weights)
    chunks = counts[:, 20]
    perfect = (matches.sum(axis=(1, 2)) == lengths).all(axis=1) & (chunks == 1)  # not fragmented at all
    words = counts[:, 21:23].mean(axis=1)
    return np.column_stack([weighted_lengths, weighted_matches, np.where(perfect, 0, chunks), words])


def _meteor(sums: np.ndarray) -> np.ndarray:
    """METEOR from [..., 6] sums; 0 where nothing matches."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = sums[..., 2] / sums[..., 0], sums[..., 3] / sums[..., 1]
        harmonic = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        return np.nan_to_num(harmonic * (1 - _GAMMA * (sums[..., 4] / sums[..., 5]) ** _BETA))


def spice(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Measure]:
    """SPICE (Anderson et al. 2016): the mean over photos of the F-score of scene graphs.

    Raises:
        InputError: the program does not run or answers with something else than scores.
    """
    photos = [{"image_id": row, "test": caption, "refs": list(texts)}
              for row, (texts, caption) in enumerate(zip(references, captions, strict=True))]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
        asked.write_text(json.dumps(photos), encoding="utf-8")
        arguments = (str(asked), "-out", str(answered), "-silent")
        _run(("-Xmx8G", "-jar"), _SPICE, arguments, "", sum(map(len, references)) + len(captions))
        try:
            scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answered.read_text())}
            values = np.nan_to_num([float(scores[row] or 0) for row in range(len(captions))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"SPICE answers with something else than scores ({error!r})") from error
    return {"SPICE": mean(values)}


def _plain(words: str) -> str:
    """Words without the mark that parts captions in METEOR's input."""
    return re.sub(r"\|\|+", " ", words)


def _home() -> Path:
    require_metrics()
    places = importlib.util.find_spec("pycocoevalcap").submodule_search_locations
    return Path(next(iter(places)))


def _run(options: Sequence[str], jar: str, arguments: Sequence[str], text: str, captions: int) -> str:
    """What `java OPTIONS JAR ARGUMENTS` prints; it is killed when it takes far too long for so many captions."""
    fault = java_fault()
    if fault:
        raise InputError(fault)
    path, deadline = _home() / jar, _START + _PER_CAPTION * captions
    command = ["java", "-Dfile.encoding=UTF-8", *options, str(path), *arguments]
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=deadline, cwd=path.parent, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{path.name} was stopped after {deadline:.0f} s without an end; use --no-java") from error
    except OSError as error:
        raise InputError(f"java does not start ({error.strerror}); mend it or use --no-java") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        raise InputError(f"{path.name} failed with status {done.returncode} ({said[-1][:200]}); use --no-java")
    return done.stdout.decode(errors="replace")
