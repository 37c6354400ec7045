"""`python -m clipcap_rag` is the command `clipcap-rag`."""

import sys

from clipcap_rag.cli import main

if __name__ == "__main__":
    sys.exit(main())
