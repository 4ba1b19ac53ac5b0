"""Shared fixtures: where the optional real data is, and one thread a test process."""

import os
from pathlib import Path

import pytest

# the suite runs on as many processes as there are cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models and text; tests that need it are skipped, by name, where it is
    absent.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("XINSLM_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set XINSLM_TEST_DATA)")
    return folder
