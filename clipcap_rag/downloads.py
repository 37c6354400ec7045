"""Files from the web, one URL at a time: deadlines that hold, retries of what may pass, a name for each failure."""

import http.client
import io
import socket
import ssl
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from urllib.parse import quote, urlsplit

from clipcap_rag import __version__
from clipcap_rag.config import DownloadConfig

_AGENT = f"clipcap-rag/{__version__}"
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may change
_FIRST_PAUSE = 0.5  # seconds before the second try; doubled before each further one


class Failure(Exception):
    """Why there is no file: `outcome` is one of a few names to count by, the message says more."""

    def __init__(self, outcome: str, detail: str, passing: bool = False) -> None:
        super().__init__(detail)
        self.outcome, self.passing = outcome, passing


def fetch(url: str, config: DownloadConfig) -> bytes:
    """The content behind an http or https URL, whatever type the server says it has.

    Redirects are followed, ten at most, and the proxies of the environment are used. All tries together end at the
    total timeout, even if the server sends a byte now and then.

    Raises:
        Failure: there is none; its outcome is `http STATUS`, `timeout`, `no connection`, `bad answer`, `truncated`,
            `too large`, `redirects` or `bad url`.
    """
    ends = time.monotonic() + config.total_timeout
    pause, tries_left = _FIRST_PAUSE, config.retries
    while True:
        try:
            return _get(url, ends, config)
        except Failure as failure:
            if not failure.passing or not tries_left or time.monotonic() + pause >= ends:
                raise
        time.sleep(pause)
        pause, tries_left = pause * 2, tries_left - 1


def _get(url: str, ends: float, config: DownloadConfig) -> bytes:
    """One try."""
    largest = int(config.max_megabytes * 1e6)
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise Failure("bad url", "not http or https")
        request = urllib.request.Request(quote(url, safe=string.punctuation), headers={"User-Agent": _AGENT})
        with _opener(ends, config.read_timeout).open(request, timeout=_left(ends, config.connect_timeout)) as response:
            if (response.length or 0) > largest:
                raise Failure("too large", f"{response.length} bytes")
            content = response.read(largest + 1)
            if len(content) > largest:
                raise Failure("too large", f"more than {largest} bytes")
            if response.length:
                raise Failure("truncated", f"{response.length} bytes are missing after {len(content)}", passing=True)
            return content
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            raise Failure("redirects", f"status {error.code}: in a circle, too many, or to no web page") from error
        raise Failure(f"http {error.code}", str(error.reason), error.code in _PASSING) from error
    except http.client.IncompleteRead as error:
        raise Failure("truncated", str(error), passing=True) from error
    except OSError as error:
        raise _unreached(getattr(error, "reason", error)) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise Failure("bad url", str(error)) from error
    except http.client.HTTPException as error:
        raise Failure("bad answer", f"{type(error).__name__}: {error}") from error


def _unreached(error: Any) -> Failure:
    """A broken or missing connection; `error` is an exception or, from urllib, also a sentence."""
    if isinstance(error, TimeoutError):
        return Failure("timeout", str(error), passing=True)
    passing = isinstance(error, ConnectionResetError | BrokenPipeError)
    unsure = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
    return Failure("no connection", str(error), passing or unsure)


def _left(ends: float, longest: float) -> float:
    """Seconds that one wait may last."""
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("the total timeout is over")
    return min(left, longest)


def _opener(ends: float, silence: float) -> urllib.request.OpenerDirector:
    """An opener without the handlers of ftp:, file: and data:, whose answers end in time."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Web(ends, silence),
        urllib.request.ProxyHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _Web(urllib.request.AbstractHTTPHandler):
    """Opens http and https with connections whose answers obey the deadline."""

    def __init__(self, ends: float, silence: float) -> None:
        super().__init__()
        self._ends, self._silence = ends, silence

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._timed(http.client.HTTPConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._timed(partial(http.client.HTTPSConnection, context=_tls())), request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _timed(self, kind: Callable[..., http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            made = kind(host, **options)
            made.response_class = lambda sock, **more: http.client.HTTPResponse(
                _TimedSocket(sock, self._ends, self._silence), **more
            )
            return made

        return connection


class _TimedSocket(io.RawIOBase):
    """What a socket receives; a timeout of sockets alone begins anew with each byte, header lines included."""

    def __init__(self, sock: socket.socket, ends: float, silence: float) -> None:
        self._socket, self._ends, self._silence = sock, ends, silence
        self._stream = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(_left(self._ends, self._silence))
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
