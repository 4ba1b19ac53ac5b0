import threading
import time

import pytest

from xinslm.evaluate.code import pool


@pytest.mark.parametrize("cores, asked, most", [(2, None, 2), (2, 5, 2), (3, 1, 1)])
def test_no_more_programs_run_at_once_than_the_process_has_cores(
    cores: int, asked: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, running, highest = threading.Lock(), 0, 0

    def run(source: str, limits: object) -> str:
        nonlocal running, highest
        with lock:
            running += 1
            highest = max(highest, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return source

    monkeypatch.setattr(pool, "usable_cores", lambda: cores)
    monkeypatch.setattr(pool, "run_program", run)
    sources = [str(number) for number in range(12)]
    assert pool.run_programs(sources, num_workers=asked) == sources
    assert highest == most
