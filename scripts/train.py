"""Trains a captioner: the command `clipcap-rag train`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
