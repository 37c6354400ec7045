"""Encodes captioned photos: the command `clipcap-rag extract`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["extract", *sys.argv[1:]])
