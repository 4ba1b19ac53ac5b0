"""Settings of `xinslm report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import Settings


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Turn a run folder into report.html, one page that needs nothing else, and report.md."""

    run: Annotated[Path, POSITIONAL]
    """Run folder."""
    compare: tuple[Path, ...] = ()
    """Other run folders to compare this run's curves and metrics with."""
    output_dir: Annotated[Path | None, Alias("-o")] = None
    """Folder to write to, by default the run folder; an older report there is replaced."""
    x: Literal["tokens", "step"] = "tokens"
    """What the curves run along: target tokens seen, or optimizer steps."""
    log_x: bool = False
    """Make that axis logarithmic."""
