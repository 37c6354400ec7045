"""clipcap-rag: an image captioner that you can teach without training it."""

__version__ = "0.1.0"
