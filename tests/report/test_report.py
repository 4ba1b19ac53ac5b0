"""Reports of run folders in every state: whole, partly there, half-written, broken, hostile."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from xinslm.errors import UsageError, XinslmError
from xinslm.report.compare import smaller
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
    for name, bits, scale in (("teacher", 1.0, 5), ("student", 1.25, 1)):
        row = evaluation_row(name, bits, file_bytes=4_900_000 * scale)
        add_row(folder, "evaluation.json", row)
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
        assert "5.0x smaller, +0.25 bits per byte" in content
        assert " of the gap" not in content, "no student without a teacher was measured"
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
    assert "| student | 1.2500 | +0.25 | 5.0x smaller |" in markdown


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
        ('{"loss": 1.0}', "integer 'step'"),
        ('{"step": 1.5}', "integer 'step'"),
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
        "| student (a) | 1.2500 | +0.25 | 5.0x smaller |" in markdown
        and "| student (b) | 1.6000 | +0.60 | 5.0x smaller |" in markdown
    )
    assert "b training" in text and "optimizer step" in text
    assert page.tags.count("polyline") == 7  # ce: 2 + 1 validation; kd: 1 + 1; speed: 2
    tables = summary(read_run(folder), [read_run(other)])
    assert len(tables) == 2 and "Bits vs. teacher" not in tables[1].head, (
        "other text has no teacher to compare with"
    )


def test_perplexity_is_not_compared_across_tokenizers(folder: Path) -> None:
    """The same text in another number of tokens: another tokenizer."""
    (table,) = summary(read_run(folder), [])
    assert "Perplexity" in table.head and "within one tokenizer only." in table.note
    row = evaluation_row("student", 1.25, tokens=4100, perplexity=1.234)
    add_row(folder, "evaluation.json", row)
    text, markdown, _ = make(folder)
    for content in (text, markdown):
        assert "1.234" not in content and "7.389" not in content
        assert "within one tokenizer only; these have several" in content
        assert "+0.25" in content, "bits per byte are compared"


def test_the_teacher_is_also_found_by_its_folder(folder: Path) -> None:
    (folder / "evaluation.json").unlink()
    add_row(folder, "evaluation.json", evaluation_row("big one", 1.0, model="runs/big"))
    add_row(folder, "evaluation.json", evaluation_row("small", 2.0))
    assert "| small | 2.0000 | +1.00 | same size |" in make(folder)[1]


def undistilled_run(folder: Path, bits: float, **changes) -> Path:
    """A run without a teacher whose model was measured on the same text."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(training_line(1)) + "\n")
    row = evaluation_row("plain", bits, **{"trained_by": "pretrain", **changes})
    add_row(folder, "evaluation.json", row)
    return folder


def test_the_gap_to_the_teacher_that_was_closed(folder: Path, tmp_path: Path) -> None:
    """Teacher 1.0, student 1.25, undistilled 1.5: half of the way."""
    other = undistilled_run(tmp_path / "other", 1.5)
    text, markdown, _ = make(folder, compare=(other,))
    for content in (text, markdown):
        assert "50 % of the gap between plain and teacher closed" in content
    rows = {row[0]: row for row in summary(read_run(folder), [read_run(other)])[0].rows}
    assert rows["student (a)"][4] == "50 %"
    assert rows["teacher"][4] == rows["plain (other)"][4] == "–"


@pytest.mark.parametrize(
    ("bits", "changes", "phrase"),
    [
        (1.2, {}, "worse than plain"),
        (0.9, {}, None),  # better than the teacher: no gap
        (1.5, {"data": "other data"}, None),
        (1.5, {"trained_by": "distill"}, None),
    ],
)
def test_no_share_of_a_gap_that_is_none(
    folder: Path, tmp_path: Path, bits: float, changes: dict, phrase: str | None
) -> None:
    other = undistilled_run(tmp_path / "other", bits, **changes)
    text, markdown, _ = make(folder, compare=(other,))
    for content in (text, markdown):
        assert "of the gap" not in content
        assert phrase in content if phrase else "Gap closed" not in content


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (10, 52, "5.2x smaller"),
        (10, 1234, "123x smaller"),
        (30, 10, "3.0x larger"),
        (100, 102, "same size"),
        (None, 10, ""),
    ],
)
def test_sizes_against_the_teacher(ours, theirs, said: str) -> None:
    assert smaller({"file_bytes": ours}, {"file_bytes": theirs}) == said


def test_a_teacher_that_token_frequencies_beat_is_named_first(folder: Path) -> None:
    """8.12 nats where frequencies alone give 5.98, in bits per byte."""
    row = evaluation_row("teacher", 3.0, unigram_bits_per_byte=2.2)
    add_row(folder, "evaluation.json", row)
    text, markdown, _ = make(folder)
    for content in (text, markdown):
        place = content.index("no better than token frequencies alone: 3.000 bits per byte")
        assert place < content.index("Summary")
    assert "| token frequencies alone | 2.2000 |" in markdown


def test_warnings_of_the_training_are_repeated(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"warnings": ["the teacher saw other contexts"]}))
    text, markdown, _ = make(folder)
    assert "the teacher saw other contexts" in text and "the teacher saw other" in markdown


@pytest.mark.parametrize("content", ["[", "[]", '{"warnings": 3}'])
def test_a_broken_run_file_is_named(folder: Path, content: str) -> None:
    (folder / "run.json").write_text(content)
    with pytest.raises(XinslmError, match=r"run\.json"):
        run(ReportConfig(folder))


def test_date_and_machine_are_said(folder: Path) -> None:
    about = {"date": "2025-01-02T03:04:05+00:00", "machine": "Some CPU, 2 cores, torch 2.9"}
    (folder / "run.json").write_text(json.dumps(about))
    row = evaluation_row("student", 1.25, **{**about, "date": "2025-01-04T00:00:00+00:00"})
    add_row(folder, "evaluation.json", row)
    text, markdown, _ = make(folder)
    for content in (text, markdown):
        assert "Trained on 2025-01-02: Some CPU, 2 cores, torch 2.9." in content
        assert "Measured on 2025-01-04: Some CPU, 2 cores, torch 2.9." in content


def test_a_speed_from_a_shared_machine_is_left_out(folder: Path) -> None:
    row = evaluation_row("student", 1.25, tokens_per_second=7654.0, other_load=0.3)
    add_row(folder, "evaluation.json", row)
    lines = [training_line(step, other_load=0.5, tokens_per_second=4321) for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, markdown, page = make(folder)
    for content in (text, markdown):
        assert "7,654" not in content and "4,321" not in content and "shared" in content
        assert "9,000" in content, "the teacher was measured alone"
        assert "other processes used more than a tenth" in content
    assert page.tags.count("figure") == 2, "no curve of the speed"


def test_the_median_speed_is_of_the_steps_that_had_the_machine(folder: Path) -> None:
    loads = [0.5] * 4 + [0.02] * 3 + [None] * 2
    lines = [
        training_line(step, other_load=load, tokens_per_second=100 if load == 0.5 else 4321)
        for step, load in enumerate(loads, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "4,321" in make(folder)[1]
    lines += [training_line(step, other_load=0.5) for step in range(10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "4,321" not in make(folder)[1], "most of the run shared the machine"


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
