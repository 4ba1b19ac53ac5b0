"""JSON over HTTP with rate limits, timeouts and retries with exponential backoff.

Retried: 408, 409, 425, 429 and 5xx responses, lost connections, timeouts, incomplete responses. The
wait doubles from half a second to a minute, with jitter, so that concurrent requests do not retry
at the same time. If the server sends Retry-After, all requests wait for it. Uses the standard
library only; ignores proxy settings of the environment.
"""

import email.utils
import http.client
import io
import json
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from xinslm.display import hide_passwords
from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.endpoint_config import EndpointConfig

RETRIED = (408, 409, 425, 429)
CHUNK_BYTES = 1 << 16
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class RefusedError(XinslmError):
    """The server refused the request for a reason that a retry does not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _PassingError(Exception):
    """An error that a retry may fix; `wait` is the server's Retry-After in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _TooLongError(Exception):
    """The server sent more bytes than a response may have."""


class _BoundedReader(io.RawIOBase):
    """Reads a connection until a deadline of `time.monotonic()`, and at most `most` bytes.

    http.client's own timeout restarts with each byte, and it skips any number of 100 Continue.
    """

    def __init__(self, inner: Any, connection: socket.socket, until: float, most: int) -> None:
        self._inner, self._connection = inner, connection
        self._until, self._left = until, most

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read available bytes, or wait for some until the deadline."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._connection.settimeout(seconds)
        count: int | None = self._inner.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise _TooLongError
        return count

    def close(self) -> None:
        """Close the connection's reader."""
        self._inner.close()
        super().close()


class Pace:
    """Rate limiter: delays each request to stay within the requests and tokens per minute."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds_a_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_a_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self.sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, tokens: int) -> None:
        """Sleep until a request of `tokens` tokens may be sent."""
        with self._lock:
            now = self._clock()
            moment = max(now, self._next)
            self._next = moment + max(self._seconds_a_request, tokens * self._seconds_a_token)
        if moment > now:
            self.sleep(moment - now)

    def hold(self, seconds: float) -> None:
        """Delay all requests for `seconds`."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


@dataclass(frozen=True)
class _Place:
    """A parsed base URL."""

    secure: bool
    host: str
    port: int | None
    path: str


class Client:
    """A client of one server; thread-safe."""

    def __init__(
        self, url: str, config: EndpointConfig, api_key: str | None = None, pace: Pace | None = None
    ) -> None:
        self._place = _take_apart(url)
        self.url = f"{url.rstrip('/')}{'' if urlsplit(url).path.strip('/') else '/v1'}"
        self._timeout, self._retries = config.timeout_seconds, config.retries
        self._most = int(config.max_answer_megabytes * 1e6)
        self._key = None if api_key is None else read_key(api_key, "the API key")
        self._pace = pace or Pace(config.requests_per_minute, config.tokens_per_minute)

    def get(self, path: str) -> Any:
        """Send GET and return the parsed response; errors as in `post`."""
        return self._with_retries("GET", path, None, 0)

    def post(self, path: str, body: dict[str, Any], tokens: int = 0) -> Any:
        """POST a JSON body that costs about `tokens` tokens; return the parsed response.

        RefusedError if the server refuses and a retry would not help, UsageError for a wrong key,
        XinslmError if all attempts fail.
        """
        return self._with_retries("POST", path, json.dumps(body).encode(), tokens)

    def _with_retries(self, method: str, path: str, body: bytes | None, tokens: int) -> Any:
        began, wait = time.monotonic(), FIRST_WAIT_SECONDS
        for attempt in range(self._retries + 1):
            self._pace.wait(tokens)
            try:
                return self._once(method, path, body)
            except _PassingError as error:
                reason, asked = error, error.wait
            if attempt < self._retries:
                if asked is not None:
                    self._pace.hold(asked)
                else:
                    self._pace.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        tries = "1 attempt" if self._retries == 0 else f"{self._retries + 1} attempts"
        raise XinslmError(
            f"{method} {self.url}{path}: {reason} ({tries} in {time.monotonic() - began:.0f} s). "
            "Finished work is kept: check the server and run the same command again"
        )

    def _once(self, method: str, path: str, body: bytes | None) -> Any:
        kind = http.client.HTTPSConnection if self._place.secure else http.client.HTTPConnection
        connection = kind(self._place.host, self._place.port, timeout=self._timeout)
        until = time.monotonic() + self._timeout
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, f"{self._place.path}{path}", body, headers)
            answer = self._receive(connection, until)
            content = self._scrub(_read(answer))
        except TimeoutError:
            raise _PassingError(f"no response within {self._timeout:g} s") from None
        except http.client.IncompleteRead as error:
            raise _PassingError(
                f"the response is incomplete: it ended after {len(error.partial):,} bytes"
            ) from None
        except _TooLongError:
            raise XinslmError(
                f"{method} {self.url}{path}: the response exceeds {self._most / 1e6:,.6g} MB. "
                "Request less, or increase --endpoint.max-answer-megabytes"
            ) from None
        # ValueError: a chunk of negative size
        except (http.client.HTTPException, OSError, ValueError) as error:
            reason = self._scrub(str(error).encode()).decode()[:300]
            raise _PassingError(
                f"the connection failed ({reason or type(error).__name__})"
            ) from None
        finally:
            connection.close()
        if answer.status in RETRIED or answer.status >= 500:
            wait = _retry_after(answer.headers.get("Retry-After"))
            raise _PassingError(f"the server returned {answer.status} {_reason(content)}", wait)
        if answer.status in (401, 403):
            raise UsageError(
                f"{self.url} returned {answer.status}: {_reason(content)}. Pass the API key with "
                "--endpoint.api-key-file FILE or --endpoint.api-key-env NAME"
            )
        if answer.status != 200:
            message = (
                f"{method} {self.url}{path}: the server returned {answer.status} {_reason(content)}"
            )
            raise RefusedError(message, answer.status)
        try:
            return json.loads(content)
        except ValueError:
            raise _PassingError(
                f"the response is not valid JSON; it begins with {content[:60]!r}"
            ) from None

    def _receive(
        self, connection: http.client.HTTPConnection, until: float
    ) -> http.client.HTTPResponse:
        """Receive status and headers; the body can be read until the same deadline."""

        def bounded(sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
            answer = http.client.HTTPResponse(sock, *args, **options)
            reader = _BoundedReader(answer.fp.detach(), sock, until, self._most)
            answer.fp = io.BufferedReader(reader, CHUNK_BYTES)
            return answer

        connection.response_class = bounded  # type: ignore[assignment]
        return connection.getresponse()

    def _scrub(self, content: bytes) -> bytes:
        """Hide the API key in a response that contains it, plain or JSON-escaped."""
        for spelling in {self._key or "", json.dumps(self._key or "")[1:-1]} - {""}:
            content = content.replace(spelling.encode(), b"***")
        return content


def in_flight(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) in order of completion, `workers` at a time.

    After an error, no new item starts; results of running items are still yielded, then the first
    error is raised.
    """
    pending = iter(list(items))
    lock, stopped = threading.Lock(), threading.Event()
    done: queue.Queue[tuple[Item, Result] | BaseException | None] = queue.Queue()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                item = next(pending, done)
            if item is done:
                break
            try:
                done.put((item, work(item)))  # type: ignore[arg-type]
            except BaseException as error:  # any error is raised in the caller's thread
                stopped.set()
                done.put(error)
        done.put(None)

    for _ in range(workers):
        threading.Thread(target=run, daemon=True).start()  # Ctrl-C need not wait for answers
    running, failure = workers, None
    try:
        while running:
            entry = done.get()
            if entry is None:
                running -= 1
            elif isinstance(entry, BaseException):
                failure = failure or entry
            else:
                yield entry
    finally:
        stopped.set()
    if failure is not None:
        raise failure


def read_key(text: str, where: str) -> str:
    """Return the API key in `text`, without surrounding whitespace; `where` is its origin in
    errors.
    """
    key = text.strip()
    if not key or not all("!" <= char <= "~" for char in key):
        raise UsageError(
            f"{where} must contain one key and nothing else: printable ASCII without spaces or "
            "line breaks"
        )
    return key


def _read(answer: http.client.HTTPResponse) -> bytes:
    """Read the body in chunks: one read would allocate any size that the server claims."""
    content = io.BytesIO()
    while piece := answer.read(CHUNK_BYTES):
        content.write(piece)
    if answer.length:  # bytes of Content-Length that did not arrive
        raise http.client.IncompleteRead(content.getvalue(), answer.length)
    return content.getvalue()


def refuse_password(url: str) -> None:
    """Raise UsageError if the address has a user name or password: addresses are stored."""
    if "@" in url:
        raise UsageError(
            f"{hide_passwords(url)}: an endpoint's address must not contain a password. Leave it "
            "out and pass the API key with --endpoint.api-key-file or --endpoint.api-key-env"
        )


def _take_apart(url: str) -> _Place:
    refuse_password(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise UsageError(
            f"{url.partition('?')[0]} is not the address of an endpoint; an example is "
            "http://localhost:8000/v1"
        )
    return _Place(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/") or "/v1")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None


def _reason(content: bytes) -> str:
    """Return the message of an error's body in OpenAI's form, FastAPI's, or plain text, at most 300
    characters.
    """
    try:
        body = json.loads(content)
    except ValueError:
        return content[:300].decode("utf-8", "replace").strip() or "without a message"
    for key in ("error", "detail", "message"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return (body if isinstance(body, str) else json.dumps(body))[:300]
