"""Several devices: what one process writes, each result once, and errors for what a failed process leaves."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from clipcap_rag.caption_inputs import StoredEmbeddings
from clipcap_rag.captioner import Captioner
from clipcap_rag.config import GenerationConfig
from clipcap_rag.errors import InputError
from clipcap_rag.hardware import pick_devices
from clipcap_rag.many_devices import _visible, caption_on

FEW = GenerationConfig(candidates=4, max_new_tokens=8)
BOTH = ("cpu", "cpu")


@pytest.fixture(scope="module")
def photos(world):
    return [world.photos / name for name in world.features.images]


@pytest.fixture
def one_thread():
    """Two processes on the CPU share two threads; one process that is compared with them has one of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_write_what_one_writes(world, photos, one_thread, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:200])
    images = [*photos[:5], broken, *photos[5:]]
    options = {"generation": FEW, "batch_size": 2, "explain_prefix": True}
    alone = Captioner.from_pretrained(world.run, "cpu", "float32").caption(images, **options)
    found = {result.image: result for result in caption_on(BOTH, world.run, images, dtype="float32", **options)}
    assert set(found) == {str(image) for image in images} and len(found) == len(images)
    assert [found[result.image].to_json() for result in alone] == [result.to_json() for result in alone]
    assert found[str(broken)].error and (found[str(photos[0])].caption_embedding == alone[0].caption_embedding).all()
    assert not multiprocessing.active_children()


def test_embeddings_keep_their_names(world):
    stored = StoredEmbeddings.open(world.features.path)
    results = list(caption_on(BOTH, world.run, embeddings=stored, dtype="float32", batch_size=3, generation=FEW))
    assert sorted(result.image for result in results) == sorted(world.features.image_ids)
    expected = Captioner.from_pretrained(world.run, "cpu", "float32").caption(embeddings=stored, generation=FEW)
    assert {result.image: result.caption for result in results} == {result.image: result.caption for result in expected}


def test_a_process_that_cannot_start_leaves_an_error_for_each_of_its_photos(world, photos):
    results = list(caption_on(("cpu", "cuda:99"), world.run, photos, batch_size=2, generation=FEW))
    assert sorted(result.image for result in results) == sorted(str(photo) for photo in photos)
    failed = {result.image for result in results if result.error}
    assert failed == {str(photo) for place, photo in enumerate(photos) if place // 2 % 2 == 1}
    assert all("no such GPU" in result.error for result in results if result.error)


def test_a_killed_process_loses_only_what_it_had_not_answered(world, photos):
    images = photos * 60
    with closing(caption_on(BOTH, world.run, images, batch_size=4, generation=FEW)) as running:
        results = [next(running)]
        multiprocessing.active_children()[0].kill()
        results += running
    assert sorted(result.image for result in results) == sorted(str(image) for image in images)
    lost = [result for result in results if result.error]
    assert 0 < len(lost) <= len(images) // 2
    assert all("exit code -9" in result.error and result.caption is None for result in lost)


def test_when_all_fail_it_is_one_error(world, photos, tmp_path):
    with pytest.raises(InputError, match="no model at"):
        list(caption_on(BOTH, tmp_path / "none", photos, batch_size=2))
    with pytest.raises(InputError, match="either images or embeddings or texts"):
        list(caption_on(BOTH, world.run))


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_ctrl_c_ends_all(world, photos):
    command = [sys.executable, "-m", "clipcap_rag", "caption", *map(str, photos * 100), "--model", str(world.run)]
    command += ["--device", "cpu,cpu", "--batch-size", "2", "--json"]
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from clipcap_rag.cli import run"
    )
    guarded = f"{code}\nif __name__ == '__main__': run(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", guarded, *command[3:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert json.loads(process.stdout.readline())["image"] in [str(photos[0]), str(photos[2])]
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


def test_each_process_sees_its_own_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-b")
    for device, seen in (("cuda:0", "2"), ("cuda", "2"), ("cuda:1", "GPU-b"), ("cpu", "2,GPU-b")):
        with _visible(device):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,GPU-b"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with _visible("cuda:1"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize("named", ["cpu", "cpu, cpu", "auto,cpu"])
def test_devices_by_name(named):
    assert [device.partition(":")[0] in ("cpu", "cuda") for device in pick_devices(named)] == [True] * len(
        named.split(",")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("named", ["all", "cpu,cuda:7", "cpu,,cpu", "gpu"])
def test_devices_that_are_not_there(named):
    with pytest.raises(InputError, match="--device|choose"):
        pick_devices(named)
