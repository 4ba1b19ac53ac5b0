"""Pace, back-off and the order of work in flight, without a clock that ticks."""

import json
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.teachers.client import Client, Pace, RefusedError, in_flight
from xinslm.teachers.endpoint_config import EndpointConfig


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def pace(self, *limits):
        return Pace(*limits, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Script:
    """A server that answers by a list of (status, headers, body)."""

    def __init__(self, *answers):
        self.answers, self.keys = list(answers), []

    def __enter__(self):
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                script.keys.append(self.headers.get("Authorization"))
                status, headers, body = script.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Bytes:
    """A server that sends `head` and then `piece` again and again, until the client hangs up.

    It stops by itself after 400 MB or 20 s, so that a test of a client that reads on can end.
    """

    def __init__(self, head, piece=b"", pause=0.0):
        self.head, self.piece, self.pause = head, piece, pause
        self.sent = 0

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def serve(self):
        try:
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    self.send(connection)
        except OSError:
            pass  # the listener was closed

    def send(self, connection):
        end = time.monotonic() + 20
        try:
            connection.recv(1 << 16)
            connection.sendall(self.head)
            while self.piece and self.sent < 4e8 and time.monotonic() < end:
                connection.sendall(self.piece)
                self.sent += len(self.piece)
                time.sleep(self.pause)
        except OSError:
            pass  # the client hung up, as it should

    def __exit__(self, *_):
        self.listener.close()


GOOD = (200, {}, b'{"fine": true}')


def test_overload_and_server_errors_are_tried_again_with_growing_waits():
    clock = Clock()
    busy = (429, {}, b'{"error": {"message": "slow down"}}')
    with Script(busy, (503, {}, b"down"), (500, {}, b""), GOOD) as server:
        client = Client(server.url, EndpointConfig(), pace=clock.pace(None, None))
        assert client.post("/x", {}) == {"fine": True}
    assert len(clock.slept) == 3
    for wait, longest in zip(clock.slept, (0.5, 1.0, 2.0), strict=True):
        assert longest / 2 <= wait <= longest
    assert client.url.endswith("/v1")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_all_requests(form):
    clock = Clock()
    after = "7" if form == "seconds" else formatdate(time.time() + 7.9, usegmt=True)
    with Script((429, {"Retry-After": after}, b"{}"), GOOD) as server:
        pace = clock.pace(None, None)
        Client(server.url, EndpointConfig(), pace=pace).post("/x", {})
    assert sum(clock.slept) == pytest.approx(7, abs=1.5)
    assert clock.slept[0] > 5, "the wait is the server's, not ours"


def test_when_all_tries_fail_the_last_reason_is_told():
    clock = Clock()
    with Script(*[(502, {}, b'{"detail": "no route"}')] * 3) as server:
        client = Client(server.url, EndpointConfig(retries=2), pace=clock.pace(None, None))
        with pytest.raises(
            XinslmError,
            match=r"POST .*/v1/x: the server returned 502 no route \(3 attempts in .*same command",
        ):
            client.post("/x", {})


def test_connection_that_is_refused_is_a_clear_error():
    client = Client("http://127.0.0.1:9", EndpointConfig(retries=1), pace=Clock().pace(None, None))
    with pytest.raises(XinslmError, match=r"the connection failed .*2 attempts"):
        client.get("/models")


def test_refusals_are_not_tried_again_and_keys_are_never_shown():
    with Script(
        (400, {}, b'{"error": {"message": "bad sk-secret"}}'),
        (401, {}, b'{"error": "wrong sk-secret"}'),
    ) as server:
        client = Client(server.url, EndpointConfig(), "sk-secret")
        with pytest.raises(RefusedError, match=r"the server returned 400 bad \*\*\*$"):
            client.post("/x", {})
        with pytest.raises(
            UsageError, match=r"401: wrong \*\*\*. Pass the API key with --endpoint.api-key-file"
        ):
            client.post("/x", {})
        assert server.keys == ["Bearer sk-secret"] * 2


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown():
    for key in ("sk-a\nsk-b", "sk-a sk-b", "sk-a\x00", "sk-ä", "  "):
        with pytest.raises(UsageError, match="must contain one key and nothing else") as caught:
            Client("http://localhost/v1", EndpointConfig(), key)
        assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-" + "x" * 40, 'sk"quoted\\key/with+marks'])
def test_a_key_is_hidden_before_a_message_is_cut(key):
    spelled = json.dumps({"error": "y" * 280 + key}).encode()
    answers = [
        (400, {}, spelled),
        (400, {}, b"z" * 290 + key.encode()),
        (400, {}, b'{"detail": ["' + json.dumps(key)[1:-1].encode() + b'"]}'),
        (200, {}, b"w" * 40 + key.encode()),
    ]
    for answer in answers:
        with Script(answer) as server:
            client = Client(server.url, EndpointConfig(retries=0), key, Clock().pace(None, None))
            with pytest.raises(XinslmError) as caught:
                client.post("/x", {})
            assert key[:8] not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@h/v1",
        "HTTPS://hunter2@h",
        "http://u:hunter2#x@h",
        "http://u:hunter2/x@h",
    ],
)
def test_passwords_in_addresses_are_refused_and_not_shown(url):
    with pytest.raises(UsageError) as caught:
        Client(url, EndpointConfig())
    assert "hunter2" not in str(caught.value) and "h" in str(caught.value)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("head", "piece", "pause"),
    [
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" ", 0.02),
        (HEAD + b"\r\n", b" ", 0.02),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0", 0.02),
        (HEAD + b"X: ", b"y", 0.02),
        (b"", b"H", 0.02),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    ],
    ids=["body", "body without length", "chunk", "header", "status", "100 Continue"],
)
def test_an_answer_that_drips_ends_at_the_deadline(head, piece, pause):
    with Bytes(head, piece, pause) as server:
        client = Client(server.url, EndpointConfig(retries=0, timeout_seconds=0.3))
        with pytest.raises(XinslmError, match=r"no response within 0.3 s \(1 attempt"):
            client.post("/x", {})
        assert server.sent < 400 * len(piece), "the client hung up before the server stopped"


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (HEAD + b"\r\n", b" " * 65536),
        (HEAD + b"Content-Length: 1000000000000\r\n\r\n", b" " * 65536),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nE8D4A51000\r\n", b" " * 65536),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
    ],
    ids=["endless", "a claimed terabyte", "endless chunks", "huge chunk", "100 Continue"],
)
def test_an_answer_that_does_not_end_is_not_kept_in_memory(head, piece):
    config = EndpointConfig(max_answer_megabytes=2, timeout_seconds=10)
    with Bytes(head, piece) as server:
        with pytest.raises(XinslmError, match=r"exceeds 2 MB.*--endpoint.max-answer-megabytes"):
            Client(server.url, config).post("/x", {})
        assert server.sent < 1e8


def test_answers_that_break_off_or_lie_about_their_size_are_tried_again():
    for head in (b"Content-Length: 9\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}"):
        with Bytes(HEAD + head) as server:
            client = Client(server.url, EndpointConfig(retries=1), pace=Clock().pace(None, None))
            with pytest.raises(XinslmError, match="2 attempts"):
                client.post("/x", {})


def test_answers_that_are_no_json_are_tried_again():
    with Script((200, {}, b'{"choices": [{"te'), GOOD) as server:
        assert Client(server.url, EndpointConfig(), pace=Clock().pace(None, None)).post(
            "/x", {}
        ) == {"fine": True}


def test_limits_a_minute():
    clock = Clock()
    pace = clock.pace(30, None)
    for _ in range(4):
        pace.wait(1000)
    assert clock.now == pytest.approx(106), "30 a minute is one every 2 seconds"
    clock = Clock()
    pace = clock.pace(600, 6000)
    for _ in range(3):
        pace.wait(500)
    assert clock.now == pytest.approx(110), "500 tokens at 6,000 a minute take 5 seconds"
    free = Clock()
    free.pace(None, None).wait(10**9)
    assert not free.slept


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://h/v1?k=1"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError, match="is not the address of an endpoint"):
        Client(url, EndpointConfig())


def test_work_in_flight_is_finished_and_given_before_the_error():
    begun, gate = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == 1:
            time.sleep(0.05)
            gate.set()
            raise XinslmError("one is bad")
        gate.wait(5)
        time.sleep(0.05)
        return item * 10

    found = []
    with pytest.raises(XinslmError, match="one is bad"):
        for item, result in in_flight(work, range(100), 3):
            found.append((item, result))
    assert sorted(found) == [(0, 0), (2, 20)]
    assert sorted(begun) == [0, 1, 2], "nothing new after the error"
    assert dict(in_flight(lambda x: x + 1, range(50), 4)) == {x: x + 1 for x in range(50)}
    assert list(in_flight(lambda x: x, [], 4)) == []


def test_more_than_one_request_is_under_way():
    barrier = threading.Barrier(4, timeout=5)
    assert len(list(in_flight(lambda _: barrier.wait(), range(8), 4))) == 8
