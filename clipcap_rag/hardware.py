"""Which device and number format to compute in, and how much memory is free."""

import random
from pathlib import Path

import numpy as np
import torch

from clipcap_rag.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`: a GPU where there is one, else the CPU.

    Raises:
        InputError: a GPU is demanded and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if not torch.cuda.is_available() or number >= torch.cuda.device_count():
            raise InputError(f"device {device} was demanded but there is no such GPU; use --device cpu or auto")
    elif device != "cpu":
        raise InputError(f"device is {device!r}; choose auto, cpu, cuda or cuda:N")
    return torch.device(device)


def pick_devices(devices: str = "auto") -> list[str]:
    """The devices for `all` GPUs, or for names separated by commas, each as `pick_device` takes it.

    Raises:
        InputError: one of them is not there, or for `all` there is no GPU.
    """
    if devices == "all":
        if not torch.cuda.is_available():
            raise InputError("device all means every GPU, and there is none; use --device cpu or auto")
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(pick_device(device.strip())) for device in devices.split(",")]


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format for `auto` or a name: bfloat16 where the hardware is really faster in it, else float32.

    On CPUs that means instructions for it, AMX tiles or AVX512-BF16.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; choose auto or one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bfloat16_instructions() else torch.float32


def bfloat16_instructions() -> str | None:
    """The name of the processor's instructions for bfloat16 matrices, None without any."""
    known = {"amx_bf16": "AMX tiles", "avx512_bf16": "AVX512-BF16"}
    flags = cpu_flags()
    return next((name for flag, name in known.items() if flag in flags), None)


def cpu_flags() -> set[str]:
    """Instruction sets of the processor, empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def free_memory() -> int:
    """Bytes of main memory that can be used now without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
