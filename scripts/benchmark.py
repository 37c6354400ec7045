"""Measures speed side by side: `clipcap-rag bench`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["bench", *sys.argv[1:]])
