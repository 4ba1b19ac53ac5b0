"""One line a check: what was measured, against which threshold, and how it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from xinslm.errors import XinslmError
from xinslm.progress import Listener, Progress, ignore


class Skipped(Exception):
    """A check cannot be made; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """How a check ended."""

    name: str
    status: Literal["ok", "FAIL", "skipped"]
    detail: str

    def line(self, width: int) -> str:
        """'ok       alignment   99.8 % ...'."""
        first, *rest = self.detail.splitlines() or [""]
        lines = [f"{self.status:<8} {self.name:<{width}}  {first}"]
        return "\n".join([*lines, *(" " * (width + 11) + line for line in rest)])


@dataclass
class Examination:
    """Checks made so far. A check returns what it measured, or raises XinslmError or Skipped."""

    on_progress: Listener = ignore
    checks: list[Check] = field(default_factory=list)

    def make(self, name: str, check: Callable[[], str]) -> bool:
        """Make one check; return whether it is ok."""
        self.on_progress(Progress("doctor", len(self.checks), None, "checks", {"now": name}))
        try:
            result = Check(name, "ok", check())
        except Skipped as reason:
            result = Check(name, "skipped", str(reason))
        except XinslmError as error:
            result = Check(name, "FAIL", str(error))
        self.checks.append(result)
        return result.status == "ok"

    def skip(self, names: tuple[str, ...], reason: str) -> None:
        """Note checks that cannot be made."""
        self.checks += [Check(name, "skipped", reason) for name in names]


def require(measured: bool, detail: str, advice: str) -> str:
    """Return `detail` if the check passed, else raise it with advice."""
    if not measured:
        raise XinslmError(f"{detail}. {advice}")
    return detail
