"""The page of a report, in a real browser: rows, order, filter, links, texts that look like markup, and no network."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from clipcap_rag.report_page import page
from clipcap_rag.report_tables import sections

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"]
MARKUP = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> & <!--"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
UNDEFINED = {"value": None, "low": None, "high": None}
browser = pytest.mark.skipif(BROWSER is None, reason="the page was not opened, as no chromium was found; install it")


def figure(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def row(study, neighbors, decoding, value, shown=3, features="photos"):
    return {
        "study": study,
        "features": features,
        "neighbors": neighbors,
        "decoding": decoding,
        "photos": 3,
        "metrics": {"CIDEr": figure(value), "BLEU-4": figure(value / 3), "length": UNDEFINED},
        "shown": shown,
        "seconds_per_image": 0.01 + value / 10,
        "predictions": f"{neighbors}-{decoding}.jsonl",
    }  # fmt: skip


def results():
    rows = [row("table", "birds", "sample", 0.5), row("table", "none", "sample", 0.4, 0)]
    rows += [row("table", "birds", f"sample, weight {weight}", 0.3) for weight in (0, 2.5)]
    rows += [row("robustness", f"nearest {k} of birds", "greedy", 0.3 + k / 100, k) for k in (8, 1)]
    rows += [row("robustness", "none", "greedy", 0.2, 0), row("robustness", "random of birds", "greedy", 0.1)]
    names = ("greedy", "beam 3", "beam 2", "4 by CLIP", "16 by CLIP", "4 by both")
    rows += [row("decoding", "birds", name, 0.2 + number / 10) for number, name in enumerate(names)]
    rows += [row("leaks", "birds, leaks retrieved", "greedy", 0.6)]
    effect = {"effect": "benefit", "metric": "CIDEr", "decoding": "greedy", "features": "photos", **figure(0.05)}
    effect |= {"of": {"neighbors": "nearest 1 of birds", **figure(0.3)}, "minus": {"neighbors": "none", **figure(0.2)}}
    pair = {"image": "a.jpg", "other": "b.jpg", "cosine": 0.97}
    leak = {"index": "birds", "features": "photos", "ids": {"photos": 0, "captions": 0}, "leaking": ["a.jpg"]}
    leak |= {
        "strings": {"photos": 1, "captions": 2},
        "doubles": {"photos": 1, "captions": 5, "compared": 9, "pairs": [pair]},
    }
    features = {"name": "photos", "path": MARKUP, "photos": 3, "recall": {"R@1": 0.5}, "excluded_rows": {"birds": 1}}
    return {
        "model": f"runs/{MARKUP}",
        "num_neighbors": 3,
        "generation": {"seed": 0},
        "retrieval": {"route": "image"},
        "config": {"images": 0},
        "features": [features],
        "rows": rows,
        "effects": [effect],
        "leaks": [leak],
    }


def written(caption, cider):
    candidate = {"caption": caption, "clip_similarity": 0.3, "log_probability": -9.5, "score": 0.1}
    neighbor = {"caption": f"{MARKUP} near {caption}", "score": 0.8, "index": "birds", "route": "image"}
    return {"caption": caption, "cider": cider, "candidates": [candidate], "neighbors": [neighbor]}


@pytest.fixture(scope="module")
def report():
    made = results()
    scores = {"first.jpg": (0.9, 0.8), "second.jpg": (0.5, 0.1), f"third {MARKUP}": (0.2, 0.4)}
    entries = [
        {
            "image": name,
            "references": [f"a heron {MARKUP}"],
            "captions": [written(f"{MARKUP} {name} on", on), written("a heron", off)],
        }
        for name, (on, off) in scores.items()
    ]
    entries[1]["problem"] = f"there is no image {MARKUP}"
    gallery = {
        "features": "photos",
        "photos": 9,
        "decoding": "sample",
        "conditions": ["birds", "none"],
        "on": 0,
        "off": 1,
    }
    gallery |= {
        "scores": {"on": figure(0.5), "off": figure(0.4), "gain": figure(0.1)},
        "changed": 3,
        "better": 2,
        "worse": 1,
    }
    return {"results": made, "sections": sections(made), "galleries": [gallery | {"entries": entries}]}


class Document(HTMLParser):
    """The elements of a page with their attributes and text, script and style left out."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in ("meta", "input", "img"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        while self.open and self.open.pop()["tag"] != tag:
            pass

    def handle_data(self, text):
        if not any(element["tag"] in ("script", "style") for element in self.open):
            for element in self.open:
                element["text"] += text

    def all(self, tag, **attributes):
        found = [element for element in self.elements if element["tag"] == tag]
        return [element for element in found if all(element.get(name) == value for name, value in attributes.items())]

    @property
    def photos(self):
        return [element["data-image"] for element in self.all("article")]


@pytest.fixture
def opened(report, tmp_path):
    """A function that opens the page at a fragment, runs a script in it, and returns what it shows."""

    def run(fragment="", script="", report=report) -> Document:
        file = tmp_path / "report.html"
        thumbnails = {"photos": {"first.jpg": PIXEL, f"third {MARKUP}": PIXEL}}
        file.write_text(page(report, thumbnails).replace("</body>", f"<script>{script}</script></body>"))
        command = [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"{file.as_uri()}{fragment}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        document = Document(done.stdout)
        (errors,) = document.all("div", id="errors")
        assert errors["text"] == "" and "hidden" in errors, errors["text"]
        return document

    return run


@browser
def test_every_study_is_shown(opened, report):
    document = opened()
    assert [section["id"] for section in document.all("section")] == [
        "captions", "robustness", "decoding", "leaks", "data", "gallery", "settings"
    ]  # fmt: skip
    tables = [part["table"] for section in report["sections"] for part in section["parts"] if "table" in part]
    shown = document.all("table")
    assert len(shown) == len(tables) and len(document.all("figure")) == 3
    for table, spec in zip(shown, tables, strict=True):
        assert all(column["name"] in table["text"] for column in spec["columns"])
        assert all(str(line[0]) in table["text"] for line in spec["rows"])
    assert "+10.0" in next(div["text"] for div in document.all("div") if div.get("class") == "tiles")
    assert "50.0" in shown[0]["text"] and "40.0 to 60.0" in shown[0]["text"]


@browser
def test_photos_are_sorted_and_filtered_by_the_address(opened):
    first, second, third = "first.jpg", "second.jpg", f"third {MARKUP}"
    assert opened().photos == [first, second, third]
    assert opened("#sort=gain").photos == [second, first, third]
    assert opened("#sort=off&order=worst").photos == [second, third, first]
    assert opened("#filter=heron+THIRD").photos == [third]
    assert opened("#sort=nonsense&filter=nothing").photos == []


@browser
def test_controls_work(opened):
    script = """
        const give = (id, value, kind) => {
          const control = document.getElementById(id);
          control.value = value;
          control.dispatchEvent(new Event(kind));
        };
        give("sort", "gain", "change");
        addEventListener("hashchange", () => document.body.setAttribute("data-address", location.hash));
        const head = document.querySelector("#captions thead th:nth-child(3) button");
        head.click();
        head.click();
    """
    document = opened(script=script)
    assert document.photos[0] == "second.jpg"
    assert "sort=gain" in document.all("body")[0]["data-address"]
    rows = [element["text"] for element in document.all("tr")][1:3]
    assert rows[0].startswith("none") and rows[1].startswith("birds")
    assert document.all("th", **{"aria-sort": "ascending"})[0]["text"] == "CIDEr"


@browser
def test_each_feature_set_has_its_gallery(opened, report):
    (gallery,) = report["galleries"]
    entries = [{**gallery["entries"][0], "image": "elsewhere.jpg", "problem": "there is no image elsewhere.jpg"}]
    one_sided = {"features": "others", "on": None, "scores": {"off": gallery["scores"]["off"]}, "entries": entries}
    both = {**report, "galleries": [gallery, {**gallery, **one_sided}]}
    assert len(opened(report=both).photos) == 3
    document = opened("#photos=others&sort=on", report=both)
    assert document.photos == ["elsewhere.jpg"] and "with retrieval" not in document.all("article")[0]["text"]
    choices = [option["text"] for option in document.all("option")]
    assert choices == ["photos", "others", "CIDEr without", "best first", "worst first"]


@browser
def test_a_link_to_a_photo_unfolds_it(opened):
    document = opened("#photo=first.jpg")
    assert len([one for one in document.all("details") if "open" in one]) == 1
    titles = [heading["text"] for heading in document.all("h4")]
    assert titles == ["Neighbours", "Candidates with retrieval", "Candidates without"]
    shown = " ".join(table["text"] for table in document.all("table"))
    assert f"{MARKUP} near {MARKUP} first.jpg on0.800birds, by photo" in shown and "0.1000.300−9.5" in shown


@browser
def test_texts_are_never_markup(opened):
    document = opened("#photo=first.jpg")
    assert document.all("title")[0]["text"].startswith("Evaluation of ")
    assert {image["src"] for image in document.all("img")} == {PIXEL}
    assert len(document.all("script")) == 3  # the data, the page's, and that of the test
    first, second, third = document.all("article")
    assert f"{MARKUP} first.jpg on" in first["text"] and f"a heron {MARKUP}" in first["text"]
    assert f"This photo cannot be shown: there is no image {MARKUP}" in second["text"]
    assert "1 of these photos cannot be shown" in document.all("section", id="gallery")[0]["text"]


def test_nothing_is_loaded_from_anywhere(report):
    text = page(report, {})
    data = re.search(r'<script type="application/json".*?</script>', text, re.DOTALL)[0]
    own = text.replace(data, "")
    assert own.count("</script>") == 1 and "default-src 'none'" in own
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(|\b(src|href)=", own)
