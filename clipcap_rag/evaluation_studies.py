"""The studies of an evaluation on one feature set: each gives rows of scores, and what else it finds."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from clipcap_rag.baselines import BASELINES, baseline_predictions
from clipcap_rag.config import EvaluationConfig, GenerationConfig
from clipcap_rag.decoding_study import DecodingStudy
from clipcap_rag.errors import InputError
from clipcap_rag.evaluated import Photos, Subject
from clipcap_rag.features import FeatureSet
from clipcap_rag.leak_audit import LeakAudit, audit
from clipcap_rag.neighbor_conditions import Condition, none, random_neighbors, robustness
from clipcap_rag.neighbors import Neighbors
from clipcap_rag.prediction_files import PredictionFiles, Predictions, candidates_of
from clipcap_rag.progress import say
from clipcap_rag.rerank import RerankWeights, reweighted
from clipcap_rag.retrievable import Exclusion
from clipcap_rag.retriever import Retriever
from clipcap_rag.robustness import effects
from clipcap_rag.scoring import score

WEIGHTS = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0)  # of the log-probability, tried by the sweep
AGREEMENTS = (0.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0)  # weights of the agreement, likewise
Found = Iterator[tuple[str, dict[str, Any]]]  # a list of results.json and an entry of it, but for `features`


class Studies:
    """Each method named as in `config.STUDIES` makes that study."""

    def __init__(
        self,
        subject: Subject,
        photos: Photos,
        retrievers: Mapping[str, Retriever],
        k: int,
        generation: GenerationConfig,
        config: EvaluationConfig,
        files: PredictionFiles,
        rivals: Mapping[str, Subject],
        training: FeatureSet | None,
    ):
        """Prepares; the arguments are those of `evaluation.evaluate`, opened.

        Args:
            retrievers: over one index each, by the name of that index, or over all at once.
            k: neighbours per photo.
            rivals: checkpoints that are captioned without retrieval.
            training: photos to compare with for the leak study.
        """
        self._subject, self._photos, self._retrievers, self._k = subject, photos, retrievers, k
        self._generation, self._config, self._files = generation, config, files
        self._rivals, self._training = rivals, training

    @cached_property
    def _found(self) -> dict[str, Neighbors]:
        """The neighbours in each index."""
        for name, own in self.excluded_rows.items():
            if own:
                say(f"{name} holds {own} captions of the evaluated photos; they are not retrieved")
        return {name: self._search(name, self._k, self._own) for name in self._retrievers}

    @cached_property
    def _own(self) -> list[Exclusion]:
        return [Exclusion(image_id, frozenset()) for image_id in self._photos.image_ids]

    def _search(self, name: str, count: int, exclusions: Sequence[Exclusion] | None) -> Neighbors:
        images = self._photos.embeddings
        return self._retrievers[name].search(images.vectors, count, exclusions, images.trunk)

    @cached_property
    def excluded_rows(self) -> dict[str, int]:
        """For each index and for all at once, how many of its captions belong to evaluated photos."""
        ids = set(self._photos.image_ids)
        return {
            name: sum(len(index.rows_of_images(ids)) for index in retriever.indexes)
            for name, retriever in self._retrievers.items()
        }

    @property
    def _none(self) -> Condition:
        return none(self._photos.embeddings.vectors)

    def _indexed(self) -> list[Condition]:
        return [Condition(name, found) for name, found in self._found.items()]

    def _first_index(self, study: str) -> str:
        if not self._retrievers:
            raise InputError(f"{study} needs an index that neighbours come from; pass --index")
        return next(iter(self._retrievers))

    def table(self) -> Found:
        """Each index with its baselines, no retrieval, random neighbours if asked for, other checkpoints."""
        for condition in self._indexed():
            for name in BASELINES:
                written = baseline_predictions(self._files, name, self._photos, condition)
                yield self._row("table", condition, name, written)
            yield from self._decoded("table", condition)
        yield from self._decoded("table", self._none)
        if self._config.random_neighbors:
            name = self._first_index("--random-neighbors")
            vectors, ids = self._photos.embeddings.vectors, self._photos.image_ids
            random = np.random.default_rng([self._generation.seed, 0])
            shown = random_neighbors(self._retrievers[name].indexes[0], vectors, ids, self._k, random)
            yield from self._decoded("table", Condition(f"random of {name}", shown))
        for name, rival in self._rivals.items():
            yield from self._decoded("table", dataclasses.replace(self._none, name=name), rival)

    def robustness(self) -> Found:
        """The first index with its neighbours made worse and worse, and effects."""
        name = self._first_index("the robustness study")
        index, photos = self._retrievers[name].indexes[0], self._photos
        shown = (photos.embeddings.vectors, photos.image_ids, self._k, self._generation.seed)
        conditions = robustness(name, index, lambda count: self._search(name, count, self._own), *shown)
        written: dict[str, dict[str, Predictions]] = {}
        for decoding in self._config.names():
            written[decoding] = {short: self._captioned(shown, decoding) for short, shown in conditions.items()}
            for short, shown in conditions.items():
                yield self._row("robustness", shown, decoding, written[decoding][short])
            for effect in effects(self._photos, conditions, written[decoding], self._k):
                yield "effects", {"decoding": decoding, **effect}

    def decoding(self) -> Found:
        """The first index, or no retrieval where there is none, with every decoding."""
        condition = (self._indexed() or [self._none])[0]
        sizes = self._config.sizes()
        study = DecodingStudy(self._subject, self._photos, condition, self._generation, self._files, sizes)
        for name, predictions in study.predictions():
            yield self._row("decoding", condition, name, predictions)

    def leaks(self) -> Found:
        """What each index knows of the photos, and the scores with and without that."""
        self._first_index("the leak study")
        for name, retriever in self._retrievers.items():
            if len(retriever.indexes) > 1:
                continue  # each of them is studied by itself
            index = retriever.indexes[0]
            found = audit(index, self._photos, self._training, self._config.same_photo)
            yield "leaks", {"index": name, **found.to_json(self._photos)}
            yield from self._with_and_without(name, found, found.texts(index))
        yield from self._decoded("leaks", self._none)

    def _with_and_without(self, name: str, found: LeakAudit, texts: frozenset[str]) -> Found:
        """With the leaks and without: captions, then photos, whose rest no retrieval shows to be easier or harder."""
        everything = Condition(f"{name}, leaks retrieved", self._search(name, self._k, None))
        exclusions = [Exclusion(None, texts)] * len(self._photos)
        clean = Condition(f"{name}, leaking captions left out", self._search(name, self._k, exclusions))
        yield from self._decoded("leaks", everything)
        yield from self._decoded("leaks", clean)
        rest = [row for row in range(len(self._photos)) if row not in found.photos]
        for condition, short in ((everything, name), (self._none, "none")) if rest else ():
            for decoding in self._config.names():
                written = self._captioned(condition, decoding)
                named = dataclasses.replace(condition, name=f"{short}, leaking photos of {name} left out")
                yield self._row("leaks", named, decoding, written, rest)

    def _decoded(self, study: str, condition: Condition, subject: Subject | None = None) -> Found:
        for decoding in self._config.names():
            written = self._captioned(condition, decoding, subject)
            yield self._row(study, condition, decoding, written)
            if study == "table" and self._config.rerank_sweep and decoding == "sample":
                yield from self._reweighted(study, condition, written, subject or self._subject)

    def _reweighted(self, study: str, condition: Condition, written: Predictions, subject: Subject) -> Found:
        """The same samples in the order of other weights of log-probability and of agreement."""
        scale, settings = subject.captioner.encoder.logit_scale, self._generation
        tried = {f"weight {weight:g}": RerankWeights(weight, settings.agreement_weight) for weight in WEIGHTS} | {
            f"agreement {weight:g}": RerankWeights(settings.log_probability_weight, weight) for weight in AGREEMENTS
        }
        chosen: dict[str, list[str]] = {name: [] for name in tried}
        for line in written.lines():
            candidates = candidates_of(line)
            for name, weights in tried.items():
                best = reweighted(candidates, scale, weights)
                chosen[name].append(best[0].caption if best else "")
        for name, captions in chosen.items():
            ordered = dataclasses.replace(written, captions=captions)
            yield self._row(study, condition, f"sample, {name}", ordered)

    def _captioned(self, condition: Condition, decoding: str, subject: Subject | None = None) -> Predictions:
        settings = dataclasses.replace(self._generation, decoding=decoding)
        return self._files.captioned(subject or self._subject, self._photos, condition, settings, decoding)

    def _row(
        self, study: str, condition: Condition, decoding: str, written: Predictions, chosen: Sequence[int] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """A line of a table, over all photos or the chosen ones."""
        chosen = range(len(self._photos)) if chosen is None else chosen
        columns = (self._photos.references, written.captions, condition.neighbors.captions)
        references, captions, neighbors = ([column[row] for row in chosen] for column in columns)
        return "rows", {
            "study": study,
            "neighbors": condition.name,
            "decoding": decoding,
            "photos": len(chosen),
            "metrics": score(references, captions, neighbors=neighbors)["metrics"],
            "shown": condition.shown,
            "seconds_per_image": written.seconds_per_image,
            "predictions": str(written.path.relative_to(self._files.folder)),
        }
