"""Prepares nocaps: the command `clipcap-rag prepare nocaps`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["prepare", "nocaps", *sys.argv[1:]])
