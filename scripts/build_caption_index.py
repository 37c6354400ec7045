"""Builds a caption index: the command `clipcap-rag index build`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", "build", *sys.argv[1:]]))
