"""Stage `texts`: the caption files in one spelling, for the language model, the CLIP and the captioner alike."""

import json
import re
from pathlib import Path

from clipcap_rag.artifact import new_directory
from clipcap_rag.lines import BadLines
from clipcap_rag.sources import SourceOptions, read_captions

CAPTIONS, EVERYTHING = "flickr8k-train.jsonl", "all.txt"

_JOINED = re.compile(r"\s+([.,;:!?)]|'s\b|n't\b|'t\b)|([(])\s+")


def prepare(data: Path, out: Path) -> None:
    """Writes the training captions with their images, and every caption of the text stores, one a line."""
    with new_directory(out) as folder:
        rows = []
        for line in (data / "flickr8k/captions_train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["captions"] = [tidy(caption) for caption in row["captions"] if caption.strip(" .")]
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / CAPTIONS).write_text("".join(rows), encoding="utf-8")
        stores = sorted((data / "captions").glob("*.jsonl.gz"))
        texts = dict.fromkeys(tidy(record.caption) for record in read_captions(stores, SourceOptions(), BadLines()))
        (folder / EVERYTHING).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def tidy(caption: str) -> str:
    """Undoes tokenisation: "two dogs play ." becomes "Two dogs play."."""
    text = " ".join(caption.replace('"', " ").replace("`", " ").split())
    text = _JOINED.sub(lambda found: found[1] or found[2], text).strip(" ,;:-")
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
