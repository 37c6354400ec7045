"""Measures speed side by side: `clipcap-rag bench`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
