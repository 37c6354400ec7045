"""Prepares Conceptual Captions: the command `clipcap-rag prepare conceptual`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["prepare", "conceptual", *sys.argv[1:]])
