"""Captioning on several devices: a process for each, the work dealt out in turn, results as they are done."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from clipcap_rag.caption_inputs import StoredEmbeddings, checked_texts
from clipcap_rag.caption_result import CaptionResult
from clipcap_rag.captioner import Captioner
from clipcap_rag.errors import InputError
from clipcap_rag.images import image_name


def caption_on(
    devices: Sequence[str],
    model: str | Path,
    images: Sequence[str | Path] | None = None,
    embeddings: StoredEmbeddings | None = None,
    texts: Sequence[str] | None = None,
    *,
    dtype: str = "auto",
    index_device: str = "auto",
    batch_size: int = 64,
    **options: Any,
) -> Iterator[CaptionResult]:
    """Captions photos, stored embeddings or texts like `Captioner.stream`, in the order in which they are done.

    Of D devices the first takes batches 0, D, 2D and so on, so that each photo has the batch mates that it has on one
    device. Each process opens the model itself. They end with the iterator, so close it if you leave it early. As
    always with processes that are spawned, a program that calls this needs `if __name__ == "__main__":`.

    Args:
        devices: such as cuda:0 and cuda:1; one that is named twice gets two processes.
        model: as `Captioner.from_pretrained` takes it.
        options: further arguments of `Captioner.stream`, with indexes by name or path.

    Yields:
        One result for each input; those of a process that failed carry its error.

    Raises:
        InputError: every process failed before its first result; the message is that of the first.
    """
    kind, given, names = _one_of(images, embeddings, texts)
    turns = _turns(len(given), batch_size, len(devices))
    answered, failures = 0, []
    with _workers(devices[: len(turns)]) as workers:
        for worker, turn in zip(workers, turns, strict=True):
            part = given.part(turn) if isinstance(given, StoredEmbeddings) else [given[place] for place in turn]
            settings = {"dtype": dtype, "index_device": index_device, "batch_size": batch_size}
            worker.send({"model": model, kind: part} | settings | options, [names[place] for place in turn])
        running = {worker.connection: worker for worker in workers}
        while running:
            for connection in wait(list(running)):
                worker = running[connection]
                answer = worker.answer()
                if isinstance(answer, CaptionResult):
                    worker.names.popleft()
                    answered += 1
                    yield answer
                    continue
                del running[connection]
                if worker.names:
                    failures.append((answer, worker.names))
    if failures and not answered:
        raise InputError(failures[0][0])
    for reason, unanswered in failures:
        yield from (CaptionResult(name, None, error=f"{name}: {reason}") for name in unanswered)


@dataclass
class _Worker:
    """A process that captions; `names` are those of its inputs that it has not answered yet."""

    device: str
    process: BaseProcess
    connection: Connection
    names: deque[str] = field(default_factory=deque)

    def send(self, job: dict[str, Any], names: list[str]) -> None:
        self.names.extend(names)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, and `answer` says so
            self.connection.send(job)

    def answer(self) -> CaptionResult | str:
        """A result, or why no further one will come; to a process that is done it does not matter."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            reason = f"the process for {self.device} was ended (exit code {self.process.exitcode})"
            return f"{reason}, most often for lack of memory; use a smaller --batch-size or fewer devices"


@contextmanager
def _workers(devices: Sequence[str]) -> Iterator[list[_Worker]]:
    """A started process for each device, ended at exit."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    threads = max(1, torch.get_num_threads() // max(1, list(devices).count("cpu")))
    workers = []
    try:
        with _deaf_to_interrupts():
            for device in devices:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, device, threads))
                with _visible(device):
                    process.start()
                theirs.close()  # or its end would go unnoticed
                workers.append(_Worker(device, process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to the whole group; their parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _visible(device: str) -> Iterator[None]:
    """Processes started inside see no GPU but this one, so that FAISS takes the same."""
    name = "CUDA_VISIBLE_DEVICES"
    kind, _, number = device.partition(":")
    before = os.environ.get(name)
    visible = dict(enumerate(before.split(","))) if before else {}
    if kind == "cuda":
        os.environ[name] = visible.get(int(number or 0), number or "0")
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _work(connection: Connection, device: str, threads: int) -> None:
    """What a process does: takes one job, sends its results, and at last, or at once if it fails, a sentence."""
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        job = connection.recv()
        kind = device.partition(":")[0]  # of GPUs it sees its own alone
        captioner = Captioner.from_pretrained(job.pop("model"), kind, job.pop("dtype"), job.pop("index_device"))
        for result in captioner.stream(**job):
            connection.send(result)
        reason = "no result came"
    except InputError as error:
        reason = str(error)
    except Exception as error:  # of whatever kind, the other devices go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    with suppress(BrokenPipeError):
        connection.send(reason)


def _turns(count: int, batch_size: int, devices: int) -> list[list[int]]:
    """For each device that gets any, the places of its inputs among `count`: whole batches in turn."""
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    turns = [[place for batch in batches[number::devices] for place in batch] for number in range(devices)]
    return [turn for turn in turns if turn]


def _one_of(
    images: Sequence[str | Path] | None, embeddings: StoredEmbeddings | None, texts: Sequence[str] | None
) -> tuple[str, Sequence[str | Path] | StoredEmbeddings, list[str]]:
    """The keyword, the inputs and their names."""
    if sum(given is not None for given in (images, embeddings, texts)) != 1:
        raise InputError("give either images or embeddings or texts")
    if images is not None:
        return "images", images, [image_name(image, position) for position, image in enumerate(images)]
    if embeddings is not None:
        return "embeddings", embeddings, embeddings.names
    return "texts", checked_texts(texts), checked_texts(texts)
