"""The training loop: features and neighbour rows in, a checkpoint out; stops and continues without a trace."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcap_rag.artifact import disk_errors
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.checkpoint import Checkpoint
from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.encoder import check_same_encoder
from clipcap_rag.errors import InputError
from clipcap_rag.features import FeatureSet
from clipcap_rag.hardware import pick_device, pick_dtype, seed_everything
from clipcap_rag.loss_plot import draw_losses
from clipcap_rag.metrics import require_metrics
from clipcap_rag.objectives import batch_losses
from clipcap_rag.optimizer import make_optimizer, set_learning_rate, warmup_batches
from clipcap_rag.progress import bar, say
from clipcap_rag.run_directory import RunDirectory, refuse_finished, stop_signals
from clipcap_rag.stages import Stage, TrainingData
from clipcap_rag.starting_model import StartingModel
from clipcap_rag.validation import validate
from clipcap_rag.weight_average import WeightAverage

_SAVE_SECONDS = 300  # longest time whose work a kill can cost
_PROGRESS = ("step", "history", "losses", "best", "stale")  # what a resumed run takes over beside the weights


def train(
    features: str | Path,
    index: str | Path | None,
    language_model: str | None,
    out: str | Path,
    *,
    start: str | Path | None = None,
    model_config: ModelConfig | None = None,
    train_config: TrainConfig | None = None,
    text_index: str | Path | None = None,
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
        language_model: folder or hub id of a GPT-2-family model; None with `start`.
        start: a captioner to go on from, which has its shape and language model; `model_config` is not looked at then.
        text_index: caption index, made by the same CLIP, whose captions are trained on before those of the photos.
        validation_features: feature set to validate on; without it a part of the photos, by hash of image_id.

    Raises:
        InputError: contradictory or unusable input.
    """
    out = Path(out)
    refuse_finished(out, overwrite)
    if (start is None) == (language_model is None):
        raise InputError("give a language model to start from, or a captioner with --start, and not both")
    run = _Run(
        FeatureSet.open(features),
        None if index is None else CaptionIndex.open(index, device="cpu"),
        language_model,
        start,
        out,
        model_config or ModelConfig(),
        train_config or TrainConfig(),
        None if text_index is None else CaptionIndex.open(text_index, device="cpu"),
        None if validation_features is None else FeatureSet.open(validation_features),
        pick_device(device),
        dtype,
    )
    with disk_errors(out), stop_signals() as stop:
        run.fit(stop, overwrite)
    return out


def _version(index: CaptionIndex | None) -> list[Any] | None:
    return None if index is None else [str(index.path.resolve()), index.revision]


class _Run:
    """One training run: its data, its model and how far it is."""

    def __init__(
        self,
        features: FeatureSet,
        index: CaptionIndex | None,
        language_model: str | None,
        start: str | Path | None,
        out: Path,
        model_config: ModelConfig,
        config: TrainConfig,
        text_index: CaptionIndex | None,
        validation: FeatureSet | None,
        device: torch.device,
        dtype: str,
    ):
        require_metrics()
        for other in (index, text_index):
            if other is not None:
                check_same_encoder(
                    features.encoder, f"the feature set {features.path}", other.encoder, f"the index {other.path}"
                )
        if validation is not None:
            check_same_encoder(
                features.encoder, f"the feature set {features.path}", validation.encoder, str(validation.path)
            )
        self.config, self.device, self.index, self.text_index = config, device, index, text_index
        self.start, self.features, self.dtype = start, features, pick_dtype(dtype, device)
        seed_everything(config.seed)
        if start is None:
            begun = StartingModel.fresh(language_model, model_config, features)
        else:
            begun = StartingModel.of_captioner(start, features)
        begun.check(config, index is not None)
        self.model, self.tokenizer, self.model_config = begun.model.to(device), begun.tokenizer, begun.config
        self.language_model, room = begun.language_model, begun.room(config)
        shared = (self.tokenizer, self.model_config, config)
        self.data = TrainingData(features, validation, index, text_index, *shared, room=room)
        self.words = self.data.words | begun.words
        if index is not None:
            self.model.mapper.set_statistics(*self.data.photos.statistics())
        self.epochs = [(stage, epoch) for stage in self.data.stages for epoch in range(stage.epochs)]
        self.step, self.history, self.losses = 0, [], []
        self.best, self.stale = -math.inf, 0
        self._enter(self.data.stages[0])
        self.directory = RunDirectory(out, self._job())

    def _enter(self, stage: Stage) -> None:
        """A stage has its own optimiser and, of rewards, the mean of its weights; `step` counts its batches."""
        self.stage, self.step, self.stale = stage, 0, 0
        self.average = None if stage.reward is None else WeightAverage(self.model)
        self.optimizer = make_optimizer(self.model, stage.rates, self.config.weight_decay)

    # -- the job on disk

    def _job(self) -> dict[str, Any]:
        return {
            "features": str(self.features.path.resolve()),
            "validation_features": str(self.data.validation.features.path.resolve()),
            "index": _version(self.index),
            "text_index": _version(self.text_index),
            "language_model": self.language_model,
            "start": None if self.start is None else str(self.start),
            "model": self.model_config.to_json(),
            "train": self.config.to_json(),
            "device": self.device.type,
            "dtype": str(self.dtype),
        }

    def _resume(self) -> None:
        state = self.directory.restore(self.model)
        self._enter(self.data.stages[state["stage"]])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        for name in _PROGRESS:
            setattr(self, name, state[name])
        say(f"continuing {self.directory.path} at step {self.step} of {self.steps} of the stage {self.stage.name}")

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
            num_neighbors=0 if index is None else self.config.num_neighbors,
            mapper_neighbors=0 if index is None else self.config.max_neighbors,
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
        state |= {
            "stage": self.data.stages.index(self.stage),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average and self.average.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        self.directory.save_last(self._checkpoint(), state, self.history)

    # -- the loop

    def fit(self, stop: dict[str, bool], overwrite: bool) -> None:
        """Trains to the end, to early stopping, or until `stop["now"]`, which raises KeyboardInterrupt once saved."""
        if self.directory.begin(overwrite):
            self._resume()
        for number, (stage, epoch) in list(enumerate(self.epochs))[len(self.history) :]:
            if stage is not self.stage:
                self._enter(stage)
            if self.step == 0:
                self._announce()
            if self.config.patience and self.stale >= self.config.patience:
                say(f"stopped: {self.stale} epochs without a better validation CIDEr")
                break
            self._train_epoch(epoch, stop)
            self._validate(number)
            self._save()
            draw_losses(self.history, self.directory.path / "loss.png")
        self.directory.finish()

    @property
    def steps(self) -> int:
        """Batches of the stage."""
        return self.stage.steps * self.stage.epochs

    def _announce(self) -> None:
        warmup = warmup_batches(self.config, self.steps)
        if len(self.data.stages) > 1:
            say(f"stage {self.stage.name}: {self.stage.epochs} epochs of {self.stage.steps} batches")
        if warmup >= self.steps:
            say(
                f"the warm-up of {warmup} batches is longer than the {self.steps} batches of this training, so the "
                "learning rate stays below its peak; give a smaller --warmup, such as 0.05, or more --epochs"
            )

    def _train_epoch(self, epoch: int, stop: dict[str, bool]) -> None:
        per_epoch, saved = self.stage.steps, time.monotonic()
        done = self.step - epoch * per_epoch
        shown = "loss" if self.stage.reward is None else "reward"
        self.model.train()
        with bar(f"{self.stage.name} {epoch + 1}/{self.stage.epochs}", per_epoch, done, "step") as progress:
            parts = (self.model, self.tokenizer, self.config, self.dtype)
            for loss, figure in batch_losses(self.stage, epoch, done, *parts):
                self._train_step(loss)
                self.losses.append(figure)
                self.step += 1
                progress.set_postfix_str(f"{shown} {np.mean(self.losses[-100:]):.3f}", refresh=False)
                progress.update(1)
                if self._complete(self.step) and (stop["now"] or time.monotonic() - saved > _SAVE_SECONDS):
                    self._save()
                    saved = time.monotonic()
                    if stop["now"]:
                        say(f"saved {self.directory.path} at step {self.step}; run the same command to continue")
                        raise KeyboardInterrupt

    def _complete(self, step: int) -> bool:
        """Whether no gradients are pending after `step` batches; the last batches of an epoch may be fewer."""
        return step % self.stage.steps % self.config.accumulate == 0

    def _train_step(self, loss: Tensor) -> None:
        config = self.config
        (loss / config.accumulate).backward()
        if self._complete(self.step + 1):
            set_learning_rate(self.optimizer, config, self.step, self.steps)
            if config.gradient_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.add(self.model)

    def _validate(self, epoch: int) -> None:
        """Measures the epoch, logs it, and keeps the checkpoint if it is the best so far."""
        with nullcontext() if self.average is None else self.average.used_by(self.model):
            self._judge(epoch)

    def _judge(self, epoch: int) -> None:
        scores = validate(self.model, self.tokenizer, self.data.validation, self.device)
        figure = "train_loss" if self.stage.reward is None else "train_reward"
        entry = {"epoch": epoch + 1, "step": self.step, figure: float(np.mean(self.losses)), **scores}
        self.history.append(entry)
        self.losses = []
        say(" ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        entry["stage"] = self.stage.name
        self.stale += 1
        if entry["CIDEr"] > self.best:
            self.best, self.stale = entry["CIDEr"], 0
            self.directory.save_best(self._checkpoint())
