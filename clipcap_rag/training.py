"""The training loop: features and neighbour rows in, a checkpoint out; stops and continues without a trace."""

import dataclasses
import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.artifact import disk_errors
from clipcap_rag.batches import CaptionBatches
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.hardware import pick_device, pick_dtype, seed_everything
from clipcap_rag.loss_plot import draw_losses
from clipcap_rag.metrics import require_metrics
from clipcap_rag.model import CaptionModel, build_mapper, load_language_model, tune
from clipcap_rag.optimizer import make_optimizer, set_learning_rate, warmup_batches
from clipcap_rag.progress import bar, say
from clipcap_rag.retriever import stored_neighbors
from clipcap_rag.run_directory import RunDirectory, refuse_finished, stop_signals
from clipcap_rag.validation import validate
from clipcap_rag.word_bonus import words_of

_SAVE_SECONDS = 300  # longest time whose work a kill can cost
_PROGRESS = ("step", "history", "losses", "best", "stale")  # what a resumed run takes over beside the weights


def train(
    features: str | Path,
    index: str | Path | None,
    language_model: str,
    out: str | Path,
    *,
    model_config: ModelConfig | None = None,
    train_config: TrainConfig | None = None,
    validation_features: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Trains a captioner and returns its directory: `best/` and `last/` checkpoints, log.jsonl and loss.png.

    An unfinished run with the same settings is continued where it was; on a CPU in float32 the result is bit for bit
    that of an uninterrupted run. Ctrl-C saves first.

    Args:
        features: feature set of the training photos.
        index: caption index to retrieve from; required by the retrieval mapper and refused by the others.
        language_model: folder or hub id of a GPT-2-family model.
        validation_features: feature set to validate on; without it a part of the photos, by hash of image_id.

    Raises:
        InputError: contradictory or unusable input.
    """
    out = Path(out)
    refuse_finished(out, overwrite)
    run = _Run(
        FeatureSet.open(features),
        None if index is None else CaptionIndex.open(index, device="cpu"),
        language_model,
        out,
        model_config or ModelConfig(),
        train_config or TrainConfig(),
        None if validation_features is None else FeatureSet.open(validation_features),
        pick_device(device),
        dtype,
    )
    with disk_errors(out), stop_signals() as stop:
        run.fit(stop, overwrite)
    return out


def _is_validation(image_id: str, fraction: float) -> bool:
    """Whether a photo is kept for validation; a property of its id alone."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) / 16**8 < fraction


class _Run:
    """One training run: its data, its model and how far it is."""

    def __init__(
        self,
        features: FeatureSet,
        index: CaptionIndex | None,
        language_model: str,
        out: Path,
        model_config: ModelConfig,
        config: TrainConfig,
        validation: FeatureSet | None,
        device: torch.device,
        dtype: str,
    ):
        require_metrics()
        if index is None and model_config.mapper == "retrieval":
            raise InputError("the retrieval mapper needs an index; pass --index, or --mapper transformer to do without")
        if index is not None and model_config.mapper != "retrieval":
            raise InputError(f"the {model_config.mapper} mapper looks at no neighbours; drop --index")
        if index is None and config.text_neighbors:
            raise InputError("text_neighbors needs an index whose words are shown; pass --index, or leave it at 0")
        if index is not None:
            check_same_encoder(
                features.encoder, f"the feature set {features.path}", index.encoder, f"the index {index.path}"
            )
        if validation is not None:
            check_same_encoder(
                features.encoder, f"the feature set {features.path}", validation.encoder, str(validation.path)
            )
        seed_everything(config.seed)
        network, self.tokenizer = load_language_model(language_model)
        self.model_config = dataclasses.replace(
            model_config, clip_dim=features.embeddings.shape[1], lm_dim=network.config.n_embd
        )
        room = network.config.n_positions - model_config.prefix_length - 1
        if config.max_caption_tokens > room:
            raise InputError(
                f"max_caption_tokens {config.max_caption_tokens} and prefix_length {model_config.prefix_length} exceed "
                f"the {network.config.n_positions} positions of {language_model}; at most {room} tokens fit"
            )
        self.room = room - config.max_caption_tokens  # for the neighbours' words
        self.config, self.device, self.index = config, device, index
        self.language_model, self.features = language_model, features
        self.dtype = pick_dtype(dtype, device)
        mapper = build_mapper(self.model_config)
        self.model = CaptionModel(mapper, tune(network, self.model_config), self.tokenizer.eos_token_id).to(device)
        self._split(features, validation)
        if index is not None:
            self._set_statistics()
        self.optimizer = make_optimizer(self.model, config)
        self.steps = len(self.batches) * config.epochs
        self.step, self.history, self.losses = 0, [], []
        self.best, self.stale = -math.inf, 0
        self.directory = RunDirectory(out, self._job())

    def _split(self, features: FeatureSet, validation: FeatureSet | None) -> None:
        held_out = [
            row
            for row, image_id in enumerate(features.image_ids)
            if validation is None and _is_validation(image_id, self.config.validation_fraction)
        ]
        kept = sorted(set(range(len(features))) - set(held_out))
        judged = features if validation is None else validation
        rows = held_out if validation is None else range(len(validation))
        if not kept or not rows:
            raise InputError(
                f"{features.path} has {len(features)} photos: {len(kept)} to train on, {len(rows)} to validate on; "
                "give more photos, another --validation-fraction or --validation-features"
            )
        self.batches = self._batches(features, kept)
        self.words = frozenset(word for row in kept for text in features.captions[row] for word in words_of(text))
        self.validation = self._batches(judged, rows)

    def _batches(self, features: FeatureSet, rows: Any) -> CaptionBatches:
        neighbors = None if self.index is None else stored_neighbors(features, self.index, self.config.neighbor_pool)
        data = (features, rows, self.tokenizer, self.model_config, self.config, self.index, neighbors)
        return CaptionBatches(*data, room=self.room)

    def _set_statistics(self) -> None:
        """Centre and spread of the index's embeddings and of the training neighbours' similarities."""
        random = np.random.default_rng(self.config.seed)
        texts = self.index.embeddings(self.index.random_rows(min(20_000, len(self.index)), random))
        photos = random.permutation(np.unique(self.batches.photo))[:1000]
        _, _, scores, mask = self.batches.inputs(photos, self.batches.nearest(photos))
        self.model.mapper.set_statistics(torch.from_numpy(texts.astype(np.float32)), scores[mask])

    # -- the job on disk

    def _job(self) -> dict[str, Any]:
        return {
            "features": str(self.features.path.resolve()),
            "validation_features": str(self.validation.features.path.resolve()),
            "index": None if self.index is None else [str(self.index.path.resolve()), self.index.revision],
            "language_model": self.language_model,
            "model": self.model_config.to_json(),
            "train": self.config.to_json(),
            "device": self.device.type,
            "dtype": str(self.dtype),
        }

    def _resume(self) -> None:
        state = self.directory.restore(self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        for name in _PROGRESS:
            setattr(self, name, state[name])
        say(f"continuing {self.directory.path} at step {self.step} of {self.steps}")

    def _checkpoint(self) -> Checkpoint:
        index = self.index
        return Checkpoint(
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.model_config,
            encoder=self.features.encoder,
            language_model=self.language_model,
            index=None
            if index is None
            else {"path": str(index.path.resolve()), "name": index.name, "revision": index.revision},
            num_neighbors=0 if index is None else self.config.max_neighbors,
            text_neighbors=self.config.text_neighbors,
            words=self.words,
            training={
                "features": self.features.name,
                "settings": self.config.to_json(),
                "scores": self.history[-1] if self.history else {},
            },
        )

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in _PROGRESS}
        state |= {"optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        self.directory.save_last(self._checkpoint(), state, self.history)

    # -- the loop

    def fit(self, stop: dict[str, bool], overwrite: bool) -> None:
        """Trains to the end, to early stopping, or until `stop["now"]`, which raises KeyboardInterrupt once saved."""
        if self.directory.begin(overwrite):
            self._resume()
        warmup = warmup_batches(self.config, self.steps)
        if warmup >= self.steps:
            say(
                f"the warm-up of {warmup} batches is longer than the {self.steps} batches of this training, so the "
                "learning rate stays below its peak; give a smaller --warmup, such as 0.05, or more --epochs"
            )
        for epoch in range(len(self.history), self.config.epochs):
            if self.config.patience and self.stale >= self.config.patience:
                say(f"stopped: {self.stale} epochs without a better validation CIDEr")
                break
            self._train_epoch(epoch, stop)
            self._validate(epoch)
            self._save()
            draw_losses(self.history, self.directory.path / "loss.png")
        self.directory.finish()

    def _train_epoch(self, epoch: int, stop: dict[str, bool]) -> None:
        per_epoch, saved = len(self.batches), time.monotonic()
        done = self.step - epoch * per_epoch
        self.model.train()
        with bar(f"epoch {epoch + 1}/{self.config.epochs}", per_epoch, done, "step") as progress:
            for batch in self.batches.epoch(epoch, skip=done):
                self.losses.append(self._train_step(batch.to(self.device)))
                self.step += 1
                progress.set_postfix_str(f"loss {np.mean(self.losses[-100:]):.3f}", refresh=False)
                progress.update(1)
                if self._complete(self.step) and (stop["now"] or time.monotonic() - saved > _SAVE_SECONDS):
                    self._save()
                    saved = time.monotonic()
                    if stop["now"]:
                        say(f"saved {self.directory.path} at step {self.step}; run the same command to continue")
                        raise KeyboardInterrupt

    def _complete(self, step: int) -> bool:
        """Whether no gradients are pending after `step` batches; the last batches of an epoch may be fewer."""
        return step % len(self.batches) % self.config.accumulate == 0

    def _train_step(self, batch: Any) -> float:
        config = self.config
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            total, count = self.model.loss(batch.tokens, *batch.inputs, context=batch.context)
        loss = total / count
        (loss / config.accumulate).backward()
        if self._complete(self.step + 1):
            set_learning_rate(self.optimizer, config, self.step, self.steps)
            if config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _validate(self, epoch: int) -> None:
        """Measures the epoch, logs it, and keeps the checkpoint if it is the best so far."""
        scores = validate(self.model, self.tokenizer, self.validation, self.device)
        entry = {"epoch": epoch + 1, "step": self.step, "train_loss": float(np.mean(self.losses)), **scores}
        self.history.append(entry)
        self.losses = []
        say(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        self.stale += 1
        if entry["CIDEr"] > self.best:
            self.best, self.stale = entry["CIDEr"], 0
            self.directory.save_best(self._checkpoint())
