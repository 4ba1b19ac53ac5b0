"""The packages import each other exactly as `docs/architecture.md` says; sizes and widths hold.

Imports are read from the syntax trees, so those inside functions and under TYPE_CHECKING count too.
"""

import ast
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "xinslm"
PAGE = ROOT / "docs" / "architecture.md"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
PACKAGES = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}

ROOT_MODULES = {"__main__": {"cli"}}
"""Modules outside the packages that import one; all others import none."""
DYNAMIC = {"commands.py"}
"""Files that import modules whose names are computed: the table of commands."""
LONG_FILES: dict[str, str] = {}
"""Files over 400 lines, and why."""
MAX_LINES, MAX_COLUMNS = 400, 100


def owner(path: Path) -> str:
    """The package or root module that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path, tree: ast.AST) -> list[str]:
    """Dotted names of the modules of xinslm that a file imports, wherever in it."""
    package = ["xinslm", *path.relative_to(SOURCE).parent.parts]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            found.append(constant_start(node.args[0], path))
    return [name for name in found if name.split(".")[0] == "xinslm"]


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def constant_start(name: ast.expr, path: Path) -> str:
    """What is constant at the beginning of a dynamic import's argument."""
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            text += part.value
        elif ast.unparse(part) in ("{__name__}", "__name__"):
            text += ".".join(["xinslm", *path.relative_to(SOURCE).parent.parts])
        else:
            break
    if len(text.rstrip(".").split(".")) < 2:
        assert path.name in DYNAMIC, f"{path}: import of a computed name, {ast.unparse(name)}"
    return text


def arrows_in_code() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        targets = {name.split(".")[1] for name in imported(path, tree) if "." in name}
        arrows.setdefault(owner(path), set()).update(targets - {owner(path)})
    return arrows


def arrows_on_page() -> dict[str, set[str]]:
    """The table `| package | may import | ...`, in its order."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(r"^\| package \| may import \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M)
    assert table, f"{PAGE} has no table '| package | may import |'"
    rows = [line.split("|")[1:3] for line in table[1].splitlines()]
    return {re.sub(r"[`/ ]", "", name): set(re.findall(r"\w+", cell)) for name, cell in rows}


def test_the_page_lists_every_package():
    assert set(arrows_on_page()) == PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_are_those_on_the_page(package):
    assert arrows_in_code()[package] & PACKAGES == arrows_on_page()[package]


def test_each_package_imports_only_from_those_above_it():
    above: set[str] = set()
    for package, targets in arrows_on_page().items():
        assert targets <= above, f"{package} imports from below: {targets - above}"
        above.add(package)


def test_root_modules_import_no_package():
    arrows = arrows_in_code()
    for module in arrows.keys() - PACKAGES:
        assert arrows[module] & PACKAGES == ROOT_MODULES.get(module, set()), module


def test_only_the_command_line_reads_the_table_of_commands():
    readers = {name for name, targets in arrows_in_code().items() if "commands" in targets}
    assert readers == {"__init__", "cli"}


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
    }
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert long.keys() == LONG_FILES.keys(), f"over {MAX_LINES} lines: {long}"


def test_lines_are_no_wider_than_100_columns():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = settings["tool"]["ruff"]["lint"]["per-file-ignores"]
    wide_files = [pattern for pattern, codes in ignored.items() if "E501" in codes]
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        if not any(fnmatch.fnmatch(str(path.relative_to(ROOT)), p) for p in wide_files)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS and len(line.split()) > 1  # as ruff's E501
    ]
    assert not wide


def test_nothing_is_kept_from_the_formatter():
    skipping = "fmt: " + "skip"
    assert not [path for path in FILES if skipping in path.read_text(encoding="utf-8")]


def test_private_names_stay_in_their_module():
    used = []
    for path, tree in TREES.items():
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xinslm"):
                names = [alias.name for alias in node.names]
                used += [f"{path.name}: {name}" for name in names if is_private(name)]
                modules |= {alias.asname or alias.name for alias in node.names}
        used += [
            f"{path.name}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and ast.unparse(node.value) in modules
        ]
    assert not used


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("import xinslm.cli.main", "cli"),
        ("def f():\n    from xinslm.cli import main", "cli"),
        ("from xinslm import cli", "cli"),
        ("from ..cli import main", "cli"),
        ("from .. import cli", "cli"),
        ("import importlib\nimportlib.import_module('xinslm.cli.main')", "cli"),
        ("if TYPE_CHECKING:\n    from xinslm.cli.main import main", "cli"),
        ("importlib.import_module(f'xinslm.cli.{name}')", "cli"),
        ("importlib.import_module(f'{__name__}.{name}')", "data"),
    ],
)
def test_every_spelling_of_an_import_is_seen(line, target):
    names = imported(SOURCE / "data" / "read.py", ast.parse(line))
    assert [name.split(".")[1] for name in names] == [target]
