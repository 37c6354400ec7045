"""Captions photos: the command `clipcap-rag caption`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["caption", *sys.argv[1:]]))
