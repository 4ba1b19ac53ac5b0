"""What a figure needs beside it: machine, versions, date, commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def describe(packages: tuple[str, ...] = ("torch", "transformers")) -> str:
    """One line: date, commit, processor, cores, versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").is_file()
        else iter(()),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    date = datetime.date.today().isoformat()
    return (
        f"{date}, commit {commit}, {model}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, {versions}"
    )
