"""`python -m clipcap_rag` is `clipcap-rag`."""

from clipcap_rag.cli import run

if __name__ == "__main__":
    run()
