"""How an index grows: build time, size, opening, memory, search time and recall for Flat, IVF and HNSW.

The rows are the starter's phrase embeddings with a little noise, 128 wide, so that they lie as captions do. Each
measurement runs in a process of its own; its memory is the peak above what the libraries hold. Results are JSON Lines.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from clipcap_rag.bench_searching import perturbed, write_index
from clipcap_rag.caption_index import CaptionIndex
from clipcap_rag.flat_search import BLOCK, flat_search
from clipcap_rag.progress import say

ROWS = (10_000, 100_000, 1_000_000)
QUERIES, K = 256, 10


def keys(rows: int) -> list[str]:
    """The structures that are compared at this size."""
    return ["Flat", f"IVF{round(4 * rows**0.5)},Flat", "HNSW32"]


def measure(folder: Path, rows: int, key: str, step: str) -> dict[str, object]:
    """Builds an index in `folder`, or opens and searches the one there; one of the two in each process."""
    starter = CaptionIndex.open("starter", "cpu")
    seeds = starter.embeddings(np.arange(len(starter)))
    before, began = peak(), time.perf_counter()
    if step == "build":
        write_index(folder, seeds, rows, starter.encoder, key)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"build_s": time.perf_counter() - began, "bytes": size, "build_peak_bytes": peak() - before}
    index = CaptionIndex.open(folder, "cpu")
    opened = time.perf_counter() - began
    queries = perturbed(seeds, QUERIES, start=rows)
    index.search(queries[:8], K)
    began = time.perf_counter()
    found = np.concatenate([index.search(part, K)[1] for part in np.split(queries, QUERIES // 64)])
    seconds = (time.perf_counter() - began) / QUERIES
    used = peak() - before
    blocks = ((np.arange(start, start + len(block)), block) for start, block in index.files.blocks(BLOCK))
    exact = flat_search(blocks, queries, K)[1]
    hits = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    return {"open_s": opened, "search_ms_per_query": 1000 * seconds, "recall_at_10": hits, "peak_bytes": used}


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs every measurement, or the one of a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="sizes to measure")
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "ROWS", "KEY", "STEP"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, rows, key, step = given.one
        print(json.dumps(measure(Path(folder), int(rows), key, step)))
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w") as out:
        for rows in given.rows:
            for key in keys(rows):
                with tempfile.TemporaryDirectory() as folder:
                    result: dict[str, object] = {"rows": rows, "key": key}
                    for step in ("build", "search"):
                        one = [folder, str(rows), key, step]
                        command = [sys.executable, __file__, "--out", str(given.out), "--one", *one]
                        result |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                out.write(json.dumps(result) + "\n")
                out.flush()
                say(json.dumps(result))


if __name__ == "__main__":
    main()
