"""Prepares COCO: the command `clipcap-rag prepare coco`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["prepare", "coco", *sys.argv[1:]])
