"""Pace, back-off and the order of work in flight, without a clock that ticks."""

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
            match=r"POST .*/v1/x: the server says 502 no route \(3 tries in .*same command",
        ):
            client.post("/x", {})


def test_connection_that_is_refused_is_a_clear_error():
    client = Client("http://127.0.0.1:9", EndpointConfig(retries=1), pace=Clock().pace(None, None))
    with pytest.raises(XinslmError, match=r"the connection failed .*2 tries"):
        client.get("/models")


def test_refusals_are_not_tried_again_and_keys_are_never_shown():
    with Script(
        (400, {}, b'{"error": {"message": "bad sk-secret"}}'),
        (401, {}, b'{"error": "wrong sk-secret"}'),
    ) as server:
        client = Client(server.url, EndpointConfig(), "sk-secret")
        with pytest.raises(RefusedError, match=r"the server says 400 bad \*\*\*$"):
            client.post("/x", {})
        with pytest.raises(
            UsageError, match=r"401: wrong \*\*\*. Give the key with --endpoint.api-key-file"
        ):
            client.post("/x", {})
        assert server.keys == ["Bearer sk-secret"] * 2


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
