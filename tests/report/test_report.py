"""Reports of run folders in every state: whole, partly there, half-written, broken, hostile."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.report.config import ReportConfig
from xinslm.report.read import read_run
from xinslm.report.run import run
from xinslm.report.tables import size, summary
from xinslm.runs import add_row, read_rows

VOID = {"meta"}
HEADER = "# Resolved configuration. Run it again with: xinslm distill --config THIS_FILE\n"


def training_line(step: int, **changes) -> dict:
    line = {
        "step": step,
        "tokens": 1000 * step,
        "loss": 3.0,
        "ce": 3 - step / 100,
        "kd": 1.0,
        "lr": 1e-3,
    }
    return {**line, "grad_norm": 1.0, "tokens_per_second": 5000.0, "seconds": 0.2 * step, **changes}


def evaluation_row(name: str, bits: float, **changes) -> dict:
    row = {
        "name": name,
        "model": f"runs/{name}",
        "kind": "model",
        "parameters": 1_234_567,
        "file_bytes": 4_900_000,
    }
    row |= {
        "data": "data/stories",
        "documents": 20,
        "tokens": 4000,
        "bytes": 16000,
        "nats_per_token": 2.0,
    }
    return {
        **row,
        "perplexity": 7.389,
        "bits_per_byte": bits,
        "tokens_per_second": 9000.0,
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with everything in it."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(HEADER + "teacher: runs/big\nseed: 1\n")
    lines = [training_line(step) for step in range(1, 31)]
    lines += [
        {"step": step, "tokens": 1000 * step, "validation_ce": 2.5, "validation_kd": 0.9}
        for step in (10, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, bits in (("teacher", 1.0), ("student", 1.25)):
        add_row(folder, "evaluation.json", evaluation_row(name, bits))
        sample = {
            "name": name,
            "model": name,
            "prompt": "Once",
            "text": f" upon {name}",
            "settings": {"seed": 1},
        }
        add_row(folder, "samples.json", sample)
    add_row(
        folder,
        "files.json",
        {"name": "GGUF", "path": "out/a.gguf", "bytes": 1_234_000, "bits_per_weight": 4.61},
    )
    return folder


class Checker(HTMLParser):
    """Collects the text, and fails on tags that do not match or reach outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def check(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    assert not checker.open
    return checker


def make(folder: Path, **changes) -> tuple[str, str, Checker]:
    """The page's text, the Markdown and the parsed page."""
    result = run(ReportConfig(folder, **changes))
    page = check(result.html)
    return "\n".join(page.texts), result.markdown.read_text(), page


def test_a_whole_run(folder: Path) -> None:
    text, markdown, page = make(folder)
    for content in (text, markdown):
        assert "80.0 %" in content, "the teacher's 1.0 bits are 80 % of the student's 1.25"
        assert (
            "1,234,567" in content
            and "4.90 MB" in content
            and "1.23 MB" in content
            and "4.61" in content
        )
        assert (
            f"xinslm distill --config {folder}/config.yaml --output-dir {folder}-again" in content
        )
        assert "upon student" in content
    assert page.tags.count("figure") == 3  # cross-entropy, divergence, speed
    assert "seed: 1" in text
    assert "| student | 1.2500 | 80.0 % |" in markdown


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    make(folder)
    html = (folder / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "evaluation.json", "samples.json", "files.json"]
)
def test_what_is_missing_is_left_out(folder: Path, name: str) -> None:
    whole, _, _ = make(folder)
    (folder / name).unlink()
    text, _, _ = make(folder)
    heading = {
        "config.yaml": "Run it again",
        "metrics.jsonl": "Training",
        "evaluation.json": "Summary",
        "samples.json": "Samples",
        "files.json": "Files",
    }[name]
    assert heading in whole.split("\n") and heading not in text.split("\n")


def test_each_file_alone_makes_a_report(folder: Path, tmp_path: Path) -> None:
    for file in ("config.yaml", "metrics.jsonl", "evaluation.json", "samples.json", "files.json"):
        alone = tmp_path / f"only-{file}"
        alone.mkdir()
        (alone / file).write_bytes((folder / file).read_bytes())
        make(alone)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        run(ReportConfig(tmp_path))
    with pytest.raises(UsageError, match="is not a folder"):
        run(ReportConfig(tmp_path / "absent"))
    assert not list(tmp_path.iterdir())


def test_a_half_written_last_line_is_passed_over_and_said(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    last = json.dumps(training_line(31)).encode()
    for cut in range(1, len(last)):
        metrics.write_bytes(whole + last[:cut])
        read = read_run(folder)
        assert len(read.training) == 30 and len(read.notes) == 1
    metrics.write_bytes(whole + last)  # whole, only the line end is missing
    assert len(read_run(folder).training) == 31
    metrics.write_bytes(whole + last[:20])
    text, markdown, _ = make(folder)
    assert "half-written" in text and "half-written" in markdown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"loss": 1.0}', "whole number 'step'"),
        ('{"step": 1.5}', "whole number 'step'"),
        ('{"step": 3, "loss": "high"}', "'loss' must be a number"),
    ],
)
def test_any_other_broken_line_is_named(folder: Path, line: str, message: str) -> None:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(XinslmError, match=rf"metrics\.jsonl:5: .*{message}"):
        run(ReportConfig(folder))


def test_steps_written_twice_count_as_last_written(folder: Path) -> None:
    """A run killed at step 30 and resumed from step 20."""
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(21, 26):
            file.write(json.dumps(training_line(step, ce=9.0)) + "\n")
    training = read_run(folder).training
    assert [line["step"] for line in training] == list(range(1, 26))
    assert [line["ce"] for line in training[20:]] == [9.0] * 5


def test_null_and_nan_are_gaps(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(training_line(31, ce=None, tokens_per_second=None)) + "\n")
        file.write(json.dumps(training_line(32, ce=float("nan"))) + "\n")
    make(folder)


@pytest.mark.parametrize("name", ["evaluation.json", "samples.json", "files.json"])
@pytest.mark.parametrize(
    "content", ['{"rows": [', "[]", '{"rows": [1]}', '{"rows": [{"model": "x"}]}']
)
def test_broken_tables_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(XinslmError, match=re.escape(name)):
        run(ReportConfig(folder))


def test_rows_without_their_figures_are_named(folder: Path) -> None:
    add_row(folder, "evaluation.json", {"name": "odd", "bits_per_byte": 0})
    with pytest.raises(XinslmError, match="row 'odd' must have a number 'bits_per_byte' above 0"):
        run(ReportConfig(folder))


def test_broken_yaml_is_named(folder: Path) -> None:
    (folder / "config.yaml").write_text("a: [1\n")
    with pytest.raises(XinslmError, match=r"config\.yaml: not valid YAML"):
        run(ReportConfig(folder))


EVIL = "</pre><script>alert('x')</script>| *b* `````\n<img src=x onerror=alert(1)> &amp; \"q\""


def test_hostile_texts_stay_text(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("{")  # makes a note with the file's name
    (folder / "config.yaml").write_text(HEADER + "# " + EVIL.replace("\n", " ") + "\nteacher: x\n")
    add_row(
        folder,
        "samples.json",
        {
            "name": EVIL,
            "model": "m",
            "prompt": EVIL,
            "text": EVIL + "\x1b[31m",
            "settings": {"a": EVIL},
        },
    )
    add_row(folder, "evaluation.json", evaluation_row(EVIL, 2.0, data=EVIL))
    add_row(folder, "files.json", {"name": EVIL, "path": EVIL, "bytes": 10})
    _, markdown, page = make(folder)
    assert sum(text.count("<script>alert('x')</script>") for text in page.texts) >= 5
    table = next(
        block for block in markdown.split("\n\n") if "out/a.gguf" in block.replace("\\", "")
    )
    for line in table.splitlines():
        assert len(re.findall(r"(?<!\\)\|", line)) == 5
    tags = re.findall(r"</?[a-z]+", markdown)
    assert set(tags) == {"<pre", "</pre"} and tags.count("<pre") == tags.count("</pre")
    assert "\x1b" not in markdown and "[31m" in markdown


def test_compared_runs_stand_beside_it(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "b"
    other.mkdir()
    lines = [training_line(step, kd=None) for step in range(1, 11)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    add_row(other, "evaluation.json", evaluation_row("student", 1.6))
    add_row(other, "evaluation.json", evaluation_row("elsewhere", 0.5, data="other data"))
    text, markdown, page = make(folder, compare=(other,), x="step", log_x=True)
    assert (
        "| student (a) | 1.2500 | 80.0 % |" in markdown
        and "| student (b) | 1.6000 | 62.5 % |" in markdown
    )
    assert "b training" in text and "optimiser step" in text
    assert page.tags.count("polyline") == 7  # ce: 2 + 1 validation; kd: 1 + 1; speed: 2
    tables = summary(read_run(folder), [read_run(other)])
    assert len(tables) == 2 and "Retained" not in tables[1].head, (
        "other text has no teacher to compare with"
    )


def test_the_teacher_is_also_found_by_its_folder(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    add_row(folder, "evaluation.json", evaluation_row("big one", 1.0, model="runs/big"))
    add_row(folder, "evaluation.json", evaluation_row("small", 2.0))
    assert "| small | 2.0000 | 50.0 % |" in make(folder)[1]


def test_the_report_may_go_elsewhere(folder: Path, tmp_path: Path) -> None:
    result = run(ReportConfig(folder, output_dir=tmp_path / "out"))
    assert result.html == tmp_path / "out" / "report.html" and result.html.is_file()
    assert not (folder / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(ReportConfig(folder, output_dir=tmp_path / "file"))


def test_rows_replace_those_of_their_name(tmp_path: Path) -> None:
    assert read_rows(tmp_path, "samples.json") == []
    for name, text in (("a", "1"), ("b", "2"), ("a", "3")):
        add_row(tmp_path, "samples.json", {"name": name, "text": text})
    assert read_rows(tmp_path, "samples.json") == [
        {"name": "a", "text": "3"},
        {"name": "b", "text": "2"},
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (950, "950 B"),
        (12_345, "12.3 kB"),
        (4_560_000, "4.56 MB"),
        (935_000, "935 kB"),
        (2.2e9, "2.20 GB"),
        (None, "–"),
    ],
)
def test_sizes(value, text: str) -> None:
    assert size(value) == text
