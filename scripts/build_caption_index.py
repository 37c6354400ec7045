"""Builds a caption index: the command `clipcap-rag index build`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["index", "build", *sys.argv[1:]])
