"""The whole pipeline through the command line, as the demo runs it, on a little text and for a few
steps.
"""

import re
from html.parser import HTMLParser

import pytest

from xinslm.cli.main import main
from xinslm.files import read_json


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "-o", str(folder), "--megabytes", "0.12", "--vocab-size", "400"]
    sizes = ["--teacher-steps", "12", "--student-steps", "6"]
    return folder, main([*words, *sizes]), [*words, *sizes]


def test_every_command_runs_and_the_figures_are_there(demo):
    folder, code, _ = demo
    assert code == 0
    rows = {row["name"]: row for row in read_json(folder / "student" / "evaluation.json")["rows"]}
    assert list(rows) == ["teacher", "student", "student without teacher", "student, 4-bit"]
    assert rows["student"]["parameters"] * 3 < rows["teacher"]["parameters"]
    assert rows["student, 4-bit"]["file_bytes"] * 5 < rows["student"]["file_bytes"]
    assert all(0 < row["bits_per_byte"] < 8 for row in rows.values())
    assert (
        abs(rows["student, 4-bit"]["bits_per_byte"] / rows["student"]["bits_per_byte"] - 1) < 0.02
    )
    assert len(read_json(folder / "student" / "samples.json")["rows"]) == 4


def test_report_needs_nothing_else(demo):
    page = (demo[0] / "student" / "report.html").read_text()
    assert "<svg" in page and "student without teacher" in page
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
    assert main(["demo", "-o", str(tmp_path), "--force"]) == 1
    assert "no demo made" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "mine" and (folder / "student.gguf").is_file()
