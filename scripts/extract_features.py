"""Encodes captioned photos: the command `clipcap-rag extract`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
