"""Downloads: each failure of a server has its name, passing ones are tried again, and no server can hold a thread."""

import socket
import time

import pytest

from clipcap_rag.config import DownloadConfig
from clipcap_rag.downloads import Failure, fetch
from clipcap_rag.errors import InputError

QUICK = DownloadConfig(connect_timeout=1, read_timeout=0.3, total_timeout=1.5, retries=0)


def outcome(url, **changes) -> str:
    with pytest.raises(Failure) as failure:
        fetch(url, DownloadConfig(**QUICK.to_json() | changes))
    assert str(failure.value)
    return failure.value.outcome


def test_content_counts_and_redirects_are_followed(web):
    content = fetch(f"{web.url}/photo/1.jpg", QUICK)
    assert content.startswith(b"\xff\xd8")
    assert fetch(f"{web.url}/moved/1.jpg", QUICK) == content
    assert web.hits == {"/photo/1.jpg": 2, "/moved/1.jpg": 1}
    assert fetch(f"{web.url}/odd/1.jpg", QUICK).startswith(b"\xff\xd8")  # a JPEG that is called text/html


def test_addresses_with_spaces_and_letters_of_other_scripts(web):
    assert fetch(f"{web.url}/photo/a lamp é.jpg?size=2&x=%20", QUICK)
    assert web.hits == {"/photo/a%20lamp%20%C3%A9.jpg?size=2&x=%20": 1}


@pytest.mark.parametrize(
    "path, expected, requests",
    [("gone/1", "http 404", 1), ("cut/1", "truncated", 3), ("circle/1", "redirects", 5), ("page/1", None, 1)],
)
def test_only_what_may_pass_is_tried_again(web, monkeypatch, path, expected, requests):
    monkeypatch.setattr("clipcap_rag.downloads._FIRST_PAUSE", 0.01)
    if expected is None:
        assert b"not for you" in fetch(f"{web.url}/{path}", QUICK)
    else:
        assert outcome(f"{web.url}/{path}", retries=2) == expected
    assert web.hits[f"/{path}"] == requests


def test_a_server_error_passes(web):
    assert outcome(f"{web.url}/moody/1") == "http 500"
    start = time.monotonic()
    assert fetch(f"{web.url}/moody/2", DownloadConfig(**QUICK.to_json() | {"retries": 1}))
    assert time.monotonic() - start >= 0.5, "the second try comes after a pause"
    assert web.hits["/moody/2"] == 2


@pytest.mark.parametrize("path", ["mute/1", "drip/body", "drip/header"])
def test_no_server_can_hold_a_thread(web, path):
    start = time.monotonic()
    assert outcome(f"{web.url}/{path}", retries=5) == "timeout"
    assert time.monotonic() - start < QUICK.total_timeout + 0.5


def test_too_large_a_file_is_not_read(web):
    assert outcome(f"{web.url}/photo/1.jpg", max_megabytes=0.0005) == "too large"
    assert outcome(f"{web.url}/drip/body", max_megabytes=0.00001, read_timeout=1) == "too large"


def test_no_server_and_no_web_address(web):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert outcome(f"http://127.0.0.1:{unused.getsockname()[1]}/1.jpg") == "no connection"
    assert outcome("http://no-such-host.invalid/1.jpg") == "no connection"
    for url in (f"file://{__file__}", "ftp://127.0.0.1/1.jpg", "http://", "http://[1/2", "http://127.0.0.1:port/", ""):
        assert outcome(url) in ("bad url", "no connection"), url
    assert outcome(f"{web.url}/local/1") == "redirects"  # to a file of this machine


def test_impossible_settings_are_refused():
    for change in ({"threads": 0}, {"total_timeout": 0.0}, {"retries": -1}, {"max_megabytes": -1.0}):
        with pytest.raises(InputError, match=next(iter(change))):
            DownloadConfig(**change)
