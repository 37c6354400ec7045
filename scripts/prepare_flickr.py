"""Prepares Flickr8k and Flickr30k: the command `clipcap-rag prepare flickr`."""

import sys

from clipcap_rag.cli import run

if __name__ == "__main__":
    run(["prepare", "flickr", *sys.argv[1:]])
