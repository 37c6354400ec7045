"""Scores a captioner on photos with reference captions: the command `clipcap-rag evaluate`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
