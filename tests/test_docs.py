"""Every command in a code block of the documentation parses, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from xinslm.cli.arguments import parse
from xinslm.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in block.splitlines()
    if line.startswith("xinslm ")
]
RUNTIMES = re.search(
    r"^### Which file for which runtime\n.*?(?=^### )",
    (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"),
    re.M | re.S,
)[0]


@pytest.mark.parametrize("line", [*SHOWN, *re.findall(r"`(xinslm [^`]+)`", RUNTIMES)])
def test_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    size = next(n for n in (2, 1) if " ".join(words[:n]) in COMMANDS)
    config = COMMANDS[" ".join(words[:size])].load("config")
    parse(config, words[size:])


def test_commands_were_found():
    assert len(SHOWN) > 20


@pytest.mark.parametrize(
    "runtime",
    [
        "llama.cpp",
        "Ollama",
        "LM Studio",
        "OpenVINO",
        "transformers",
        "vLLM",
        "mlx-lm",
        "iOS",
        "Core ML",
        "Neural Engine",
    ],
)
def test_the_guide_names_a_file_and_a_command_for_each_runtime(runtime):
    rows = [row.split(" | ") for row in RUNTIMES.splitlines() if row.startswith("| ")]
    found = [row for row in rows if runtime in row[0]]
    assert found and all(len(row) == 3 and row[2].strip(" |") for row in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]
