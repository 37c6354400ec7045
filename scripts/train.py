"""Trains a captioner: the command `clipcap-rag train`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
