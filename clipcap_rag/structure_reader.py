"""A search.faiss that is open for queries: memory-mapped or on a GPU, searched as thoroughly as each query asks."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcap_rag.errors import InputError
from clipcap_rag.flat_search import faiss_reason
from clipcap_rag.hardware import pick_device
from clipcap_rag.progress import say

_GPU_SHARE = 0.8  # of the free GPU memory that one index may take
_GPU_MOST = 2048  # results per query of FAISS on a GPU
_CODED_BREADTH = 32  # candidates per result from codes; 250 rows to a cluster and 32 bytes a row want about so many


class StructureReader:
    """The search structure of one segment.

    Attributes:
        effort: what says how thoroughly it looks: `nprobe`, `ef_search`, or "" where nothing does.
        breadth: candidates to take per result that is wanted, since codes order rows only roughly.
    """

    def __init__(self, file: Path, rows: int, dim: int, gpu: int | None):
        self._structure = _open(file, gpu)
        if self._structure.d != dim or self._structure.ntotal != rows:
            raise InputError(
                f"{file} holds {self._structure.ntotal} vectors of width {self._structure.d} where index.json says "
                f"{rows} of width {dim}; make the index again"
            )
        self.effort = next((name for name in ("nprobe", "ef_search") if _parameters(self._structure, {name: 1})), "")
        self.breadth = breadth_of(self._structure)
        self._most = _GPU_MOST if _on_any_gpu(self._structure) else rows

    def search(self, queries: np.ndarray, k: int, effort: dict[str, int]) -> np.ndarray:
        """Candidate places [B, up to k] in the segment, -1 where it finds fewer.

        Args:
            k: on a GPU at most 2048 are found, FAISS's limit there.
            effort: `nprobe` or `ef_search` instead of what the structure was tuned to.
        """
        return self._structure.search(queries, min(k, self._most), params=_parameters(self._structure, effort))[1]


def breadth_of(structure: Any) -> int:
    """Candidates to take per result: 1 from vectors in full, more from codes of them."""
    import faiss

    structure = faiss.downcast_index(structure)
    if isinstance(structure, faiss.IndexPreTransform):
        return breadth_of(structure.index) if structure.index.d == structure.d else _CODED_BREADTH
    if isinstance(structure, faiss.IndexHNSW):
        return breadth_of(structure.storage)
    full = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexRefine)
    if hasattr(faiss, "GpuIndexIVFFlat"):
        full += (faiss.GpuIndexFlat, faiss.GpuIndexIVFFlat)
    return 1 if isinstance(structure, full) else _CODED_BREADTH


def gpu_number(device: str) -> int | None:
    """The GPU that FAISS may use for `auto`, `cpu`, `gpu`, `cuda` or `cuda:N`; None is the CPU."""
    picked = pick_device("cuda" if device == "gpu" else device)
    if picked.type == "cpu":
        return None
    import faiss

    number = picked.index or 0
    if number < getattr(faiss, "get_num_gpus", int)():
        return number
    if device == "auto":
        return None
    raise InputError("the installed FAISS has no GPU support; install faiss-gpu, or use --index-device cpu")


def fits_gpu(what: str, needed: int, gpu: int) -> bool:
    """Whether so many bytes fit on a GPU beside what is there; says so where they do not."""
    free = torch.cuda.mem_get_info(gpu)[0]
    if needed > _GPU_SHARE * free:
        say(f"{what} needs {needed / 2**30:.1f} GB of GPU, {free / 2**30:.1f} are free: using the CPU")
    return needed <= _GPU_SHARE * free


@functools.cache
def gpu_resources() -> Any:
    """What FAISS keeps on GPUs for this process."""
    import faiss

    return faiss.StandardGpuResources()


def _open(file: Path, gpu: int | None) -> Any:
    import faiss

    try:
        if gpu is not None and fits_gpu(str(file), file.stat().st_size, gpu):
            moved = _on_gpu(file, gpu)
            if moved is not None:
                return moved
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"FAISS cannot open {file} ({faiss_reason(error)}); make the index again") from error


def _on_gpu(file: Path, gpu: int) -> Any:
    """The structure on a GPU, or None, with a word, where FAISS has no such kind for GPUs or no room."""
    import faiss

    whole = faiss.read_index(str(file))  # what is memory-mapped cannot be copied to a GPU
    try:
        moved = faiss.index_cpu_to_gpu(gpu_resources(), gpu, whole)
    except (RuntimeError, MemoryError) as error:
        say(f"FAISS cannot put {file} on the GPU ({faiss_reason(error)}): using the CPU")
        return None
    if _on_any_gpu(moved):
        return moved
    say(f"FAISS has no search on a GPU for {file}: using the CPU")
    return None


def _on_any_gpu(structure: Any) -> bool:
    import faiss

    return hasattr(faiss, "GpuIndex") and isinstance(faiss.downcast_index(structure), faiss.GpuIndex)


def _parameters(structure: Any, effort: dict[str, int]) -> Any:
    """FAISS's object for the effort of one search, or None where the structure takes none of what is given."""
    import faiss

    structure = faiss.downcast_index(structure)
    if isinstance(structure, faiss.IndexPreTransform):
        inner = _parameters(structure.index, effort)
        return inner and faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(structure, faiss.IndexRefine):
        inner = _parameters(structure.base_index, effort)
        return inner and faiss.IndexRefineSearchParameters(base_index_params=inner)
    inverted = (faiss.IndexIVF, *([faiss.GpuIndexIVF] if hasattr(faiss, "GpuIndexIVF") else []))
    if isinstance(structure, inverted) and "nprobe" in effort:
        return faiss.SearchParametersIVF(nprobe=effort["nprobe"])
    if isinstance(structure, faiss.IndexHNSW) and "ef_search" in effort:
        return faiss.SearchParametersHNSW(efSearch=effort["ef_search"])
    return None
