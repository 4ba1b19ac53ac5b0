"""The command `xinslm native`: what the native library is, and whether it runs a model."""

from dataclasses import dataclass
from pathlib import Path

from xinslm.inference.config import NativeConfig
from xinslm.inference.load import native_problem
from xinslm.machine import usable_cores
from xinslm.native import library_path, reason
from xinslm.native.bindings import forced_kernels, kernels
from xinslm.progress import Listener, ignore


@dataclass(frozen=True)
class Result:
    """What there is."""

    library: Path | None
    """The file; None if there is none, for `reason`."""
    reason: str
    kernels: tuple[str, ...]
    """Names of the kernels that this processor runs, fastest first."""
    forced: str
    """What XINSLM_KERNELS names; empty if it is not set."""
    threads: int
    """Threads by default."""
    model: Path | None
    problem: str
    """Why the library does not run the model; empty if it does, or none was given."""

    def describe(self) -> str:
        """Lines for the terminal."""
        if self.library is None:
            lines = [f"native library: none ({self.reason}); models run in PyTorch, more slowly"]
        else:
            used = self.forced or self.kernels[0]
            lines = [
                f"native library: {self.library}",
                f"kernels: {used} (this processor runs {', '.join(self.kernels)})",
                f"threads: {self.threads}",
            ]
        if self.model is not None:
            engine = f"PyTorch engine ({self.problem})" if self.problem else "native engine"
            lines.append(f"{self.model}: {engine}")
        return "\n".join(lines)


def run(config: NativeConfig, on_progress: Listener = ignore) -> Result:
    """Look at the library and, if one is given, at a model."""
    path = library_path()
    problem = "" if config.model is None else native_problem(config.model)
    return Result(
        path,
        reason(),
        () if path is None else tuple(kernels()),
        "" if path is None else forced_kernels(),
        usable_cores(),
        config.model,
        problem,
    )
