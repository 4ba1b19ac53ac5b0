"""Every shipped recipe loads, and its header names a command that is one."""

from pathlib import Path

import pytest

from xinslm.commands import COMMANDS
from xinslm.config import from_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_recipe(path):
    header = path.read_text().splitlines()[:5]
    command = next(line for line in header if line.startswith("# Command: xinslm ")).split()[3]
    missing = object()
    config = from_yaml(COMMANDS[command].load("config"), [path], missing)
    assert config.data_path is missing
    assert f"--config configs/{path.name}" in " ".join(header)
    assert all(
        any(line.startswith(f"# {word}") for line in header)
        for word in ("Purpose:", "Machine:", "Expect:")
    )
