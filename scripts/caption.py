"""Captions photos: the command `clipcap-rag caption`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["caption", *sys.argv[1:]])
