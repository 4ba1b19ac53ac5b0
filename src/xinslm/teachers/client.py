"""JSON over HTTP to a server that is slow, limited and sometimes broken: pace, time-outs, retries
with back-off.

Tried again: 408, 429 and 5xx answers, lost connections, time-outs, answers that end in the middle.
The wait doubles from half a second to a minute, with jitter, so that requests in flight do not come
back together; where the server's Retry-After says when, all requests wait for that. Standard
library only; no proxy is taken from the environment.
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
    """The server answered, and said no for a reason that another try does not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _PassingError(Exception):
    """What another try may cure; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _TooLongError(Exception):
    """The server sent more bytes than an answer may have."""


class _BoundedReader(io.RawIOBase):
    """Reads a connection until a moment of `time.monotonic()`, and at most so many bytes.

    http.client's own timeout starts anew with each byte, and it skips any number of 100 Continue.
    """

    def __init__(self, inner: Any, connection: socket.socket, until: float, most: int) -> None:
        self._inner, self._connection = inner, connection
        self._until, self._left = until, most

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what has arrived, or wait for it."""
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
    """Gives each request its moment, so that a minute holds no more requests and tokens than
    allowed.
    """

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
        """Sleep until a request of so many tokens may go out."""
        with self._lock:
            now = self._clock()
            moment = max(now, self._next)
            self._next = moment + max(self._seconds_a_request, tokens * self._seconds_a_token)
        if moment > now:
            self.sleep(moment - now)

    def hold(self, seconds: float) -> None:
        """Let nothing go out for so long."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


@dataclass(frozen=True)
class _Place:
    """A base URL taken apart."""

    secure: bool
    host: str
    port: int | None
    path: str


class Client:
    """One server; may be used from many threads."""

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
        """Parsed answer to GET; errors as in `post`."""
        return self._patiently("GET", path, None, 0)

    def post(self, path: str, body: dict[str, Any], tokens: int = 0) -> Any:
        """Parsed answer to POST of a JSON body that costs about so many tokens.

        RefusedError for an answer that no further try changes, UsageError for a wrong key,
        XinslmError where all tries failed.
        """
        return self._patiently("POST", path, json.dumps(body).encode(), tokens)

    def _patiently(self, method: str, path: str, body: bytes | None, tokens: int) -> Any:
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
        tries = "one try" if self._retries == 0 else f"{self._retries + 1} tries"
        raise XinslmError(
            f"{method} {self.url}{path}: {reason} ({tries} in "
            f"{time.monotonic() - began:.0f} s). "
            f"What was finished is kept: see to the server and run the same command again"
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
            raise _PassingError(f"no answer within {self._timeout:g} s") from None
        except http.client.IncompleteRead as error:
            raise _PassingError(
                f"the answer ended after {len(error.partial):,} bytes, in the middle"
            ) from None
        except _TooLongError:
            raise XinslmError(
                f"{method} {self.url}{path}: the answer has more than {self._most / 1e6:,.6g} MB. "
                "Ask for less, or raise --endpoint.max-answer-megabytes"
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
            raise _PassingError(f"the server says {answer.status} {_reason(content)}", wait)
        if answer.status in (401, 403):
            raise UsageError(
                f"{self.url} says {answer.status}: {_reason(content)}. Give the key with "
                "--endpoint.api-key-file FILE or --endpoint.api-key-env NAME"
            )
        if answer.status != 200:
            message = (
                f"{method} {self.url}{path}: the server says {answer.status} {_reason(content)}"
            )
            raise RefusedError(message, answer.status)
        try:
            return json.loads(content)
        except ValueError:
            raise _PassingError(
                f"the answer is not valid JSON; it begins with {content[:60]!r}"
            ) from None

    def _receive(
        self, connection: http.client.HTTPConnection, until: float
    ) -> http.client.HTTPResponse:
        """Status and headers; the body can be read until the same moment."""

        def bounded(sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
            answer = http.client.HTTPResponse(sock, *args, **options)
            reader = _BoundedReader(answer.fp.detach(), sock, until, self._most)
            answer.fp = io.BufferedReader(reader, CHUNK_BYTES)
            return answer

        connection.response_class = bounded  # type: ignore[assignment]
        return connection.getresponse()

    def _scrub(self, content: bytes) -> bytes:
        """Hide the key in an answer that repeats it, as it is and as JSON spells it."""
        for spelling in {self._key or "", json.dumps(self._key or "")[1:-1]} - {""}:
            content = content.replace(spelling.encode(), b"***")
        return content


def in_flight(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Give (item, result) as they are done, `workers` at a time, in no order.

    After an error nothing new is begun; what is under way is waited for and given, then the first
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
            except BaseException as error:  # handed to the caller, whatever it is
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
    """The API key in `text`, without surrounding whitespace; `where` names its origin in errors."""
    key = text.strip()
    if not key or not all("!" <= char <= "~" for char in key):
        raise UsageError(
            f"{where} must hold one key and nothing else: printable ASCII without spaces or line "
            "breaks"
        )
    return key


def _read(answer: http.client.HTTPResponse) -> bytes:
    """The body, in pieces: one read would reserve memory for whatever size the server claims."""
    content = io.BytesIO()
    while piece := answer.read(CHUNK_BYTES):
        content.write(piece)
    if answer.length:  # what Content-Length promised and did not come
        raise http.client.IncompleteRead(content.getvalue(), answer.length)
    return content.getvalue()


def refuse_password(url: str) -> None:
    """Raise UsageError if the address has a user name or password: addresses are stored."""
    if "@" in url:
        raise UsageError(
            f"{hide_passwords(url)}: an endpoint's address must not hold a password. Leave it out "
            "and give the API key with --endpoint.api-key-file or --endpoint.api-key-env"
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
            f"{url.partition('?')[0]} is not the address of an endpoint; one looks "
            "like http://localhost:8000/v1"
        )
    return _Place(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/") or "/v1")


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110, section
    10.2.3).
    """
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
    """What an error's body says, in at most 300 characters: OpenAI's form, FastAPI's, or plain
    text.
    """
    try:
        body = json.loads(content)
    except ValueError:
        return content[:300].decode("utf-8", "replace").strip() or "without a word"
    for key in ("error", "detail", "message"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return (body if isinstance(body, str) else json.dumps(body))[:300]
