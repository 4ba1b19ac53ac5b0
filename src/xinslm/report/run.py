"""The stage `xinslm report`: write a report from the files of a run.

xinslm report runs/student --compare runs/undistilled
"""

from dataclasses import dataclass
from pathlib import Path

from xinslm.errors import UsageError
from xinslm.files import write_text
from xinslm.progress import Listener, ignore
from xinslm.report import markdown, page
from xinslm.report.config import ReportConfig
from xinslm.report.read import read_run


@dataclass(frozen=True)
class Result:
    """Paths of the report."""

    html: Path
    markdown: Path
    notes: tuple[str, ...]
    """Warnings about the run folders."""

    def describe(self) -> str:
        """Aligned lines for the terminal."""
        lines = [f"report    {self.html}", f"markdown  {self.markdown}"]
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])


def run(config: ReportConfig, on_progress: Listener = ignore) -> Result:
    """Write report.html and report.md of a run folder."""
    if config.output_dir is not None and config.output_dir.is_file():
        raise UsageError(f"--output-dir {config.output_dir} is a file; a folder is needed")
    main, others = read_run(config.run), [read_run(folder) for folder in config.compare]
    folder = config.output_dir or config.run
    write_text(folder / "report.html", page.render(main, others, config.x, config.log_x))
    write_text(folder / "report.md", markdown.render(main, others))
    notes = tuple(f"{r.folder}: {note}" for r in [main, *others] for note in r.notes)
    return Result(folder / "report.html", folder / "report.md", notes)
