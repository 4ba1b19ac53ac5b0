"""Runs many programs at once, and finds out how long they may take on this machine."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.code.sandbox import Limits, Outcome, run_program
from xinslm.machine import usable_cores

_CALIBRATION_SECONDS = 120.0


def run_programs(
    sources: Sequence[str],
    limits: Limits | None = None,
    num_workers: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run programs, `num_workers` at a time, by default and at most as many as it has cores.

    Outcomes are in the order of the sources; `on_outcome` gets them in the order of their ends. A
    thread for each worker is enough, because the work is done in the programs' own processes.
    """
    cores = usable_cores()
    if num_workers is not None and num_workers < 1:
        raise UsageError(f"number of workers is {num_workers}; it must be at least 1")
    with ThreadPoolExecutor(min(num_workers or cores, cores)) as pool:
        futures = [pool.submit(run_program, source, limits) for source in sources]
        try:
            for future in as_completed(futures):
                on_outcome(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def calibrate(
    sources: Sequence[str],
    limits: Limits | None = None,
    num_workers: int | None = None,
    minimum_seconds: float = 3.0,
    factor: float = 10.0,
) -> Limits:
    """Set the time limit by programs that are known to be correct, so slow machines are fair.

    The limit is `factor` times the slowest, at least `minimum_seconds`. The programs run as many at
    a time as later ones will. XinslmError if one of them does not pass: then failures say nothing.
    """
    if not sources:
        raise UsageError("no programs to calibrate the time limit with")
    limits = limits or Limits()
    outcomes = run_programs(
        sources, replace(limits, timeout_seconds=_CALIBRATION_SECONDS), num_workers
    )
    for number, outcome in enumerate(outcomes):
        if not outcome.passed:
            raise XinslmError(
                f"reference solution {number} of the calibration does not pass on this system: "
                f"{outcome.kind}: {outcome.message}"
            )
    slowest = max(outcome.seconds for outcome in outcomes)
    return replace(limits, timeout_seconds=max(minimum_seconds, factor * slowest))
