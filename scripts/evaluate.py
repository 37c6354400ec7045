"""Scores a captioner on photos with reference captions: the command `clipcap-rag evaluate`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
