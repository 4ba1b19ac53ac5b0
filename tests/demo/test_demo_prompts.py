"""The built-in prompts, questions and paragraphs, and where the teacher is looked for."""

import re
from importlib import metadata

import pytest

from xinslm.demo.package import find_gguf
from xinslm.demo.run import LEAST_PROMPTS, MOST_PROMPTS, prompts_for
from xinslm.demo.stages import SHARE, shape_for
from xinslm.demo.texts import (
    expand,
    prompts,
    read_answers,
    read_lines,
    write_chats,
    write_paragraphs,
)
from xinslm.model.config import ModelConfig
from xinslm.rollouts.prompts import read_prompts


def test_lists_run_in_parallel_and_shorter_ones_start_again():
    assert expand("{A|B|C} {x|y}?") == ["A x?", "B y?", "C x?"]
    assert expand("plain") == ["plain"]


def test_prompts_are_many_different_and_readable():
    train, held_out = prompts()
    assert len(train) > 400 and len(held_out) > 24
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert prompts() == (train, held_out)
    for prompt in [*train, *held_out, *read_lines("questions.txt")]:
        assert not re.search(r"[{}|]|  |\s$|^\s|\ba [aeio]", prompt), prompt
        assert prompt[0].isupper() and prompt[-1] in '.?!"', prompt
    starts = {" ".join(prompt.split()[:2]) for prompt in train}
    assert len(starts) > 60


def test_questions_are_not_among_the_prompts():
    train, held_out = prompts()
    asked = {frozenset(re.findall(r"\w{4,}", text.lower())) for text in [*train, *held_out]}
    for question in read_lines("questions.txt"):
        words = frozenset(re.findall(r"\w{4,}", question.lower()))
        assert max(len(words & other) / len(words | other) for other in asked) < 0.6, question
    assert len(read_lines("questions.txt")) >= 10


def test_fewer_prompts_are_the_first_ones():
    train, held_out = prompts(40)
    assert len(train) + len(held_out) == 40 and len(held_out) == 8
    more = prompts(80)
    assert {*train, *held_out} < {*more[0], *more[1]} and len(more[1]) == 8
    assert not {*train} & {*held_out}
    assert len(prompts()[1]) == -(-456 // 16)


def test_files_are_read_by_the_commands(tmp_path):
    write_chats(tmp_path / "chats.jsonl", ["Hi?", "Why?"])
    assert [prompt[-1]["content"] for prompt in read_prompts(tmp_path / "chats.jsonl")] == [
        "Hi?",
        "Why?",
    ]
    write_paragraphs(tmp_path / "paragraphs.jsonl")
    paragraphs = read_prompts(tmp_path / "paragraphs.jsonl")
    assert len(paragraphs) >= 24 and min(map(len, paragraphs)) > 200


def test_answers_are_read_as_pairs(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'
        "\n"
        '{"text": "One day it rained", "prompt_characters": 7}\n'
    )
    assert read_answers(path) == [("Hi", "Yo"), ("One day", " it rained")]


def test_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "odd_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "m.gguf").write_bytes(b"GGUF")
    info = tmp_path / "odd_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("odd_model/__init__.py,,\nodd_model/m.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_gguf("odd-model") == folder / "m.gguf"
    (folder / "m.gguf").unlink()
    assert find_gguf("odd-model") is None and find_gguf("no-such-package-here") is None
    assert metadata.version("odd-model") == "1.0"


def test_the_student_has_its_share_of_the_parameters():
    teacher = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    layers, neurons = shape_for(teacher, 32768)
    assert (layers, neurons) == (28, 1536)

    def parameters(**changed):
        return ModelConfig(**(teacher | changed)).num_parameters

    small = shape_for(teacher, 49152)
    assert small[0] == 28 and small[1] < 1536
    sizes = {"num_hidden_layers": 28, "intermediate_size": small[1]}
    assert parameters(**sizes) <= SHARE * parameters()
    assert parameters(**(sizes | {"intermediate_size": small[1] + 64})) > SHARE * parameters()
    assert shape_for(teacher, 32768, 3) == (3, 1536)


@pytest.mark.parametrize(
    ("rate", "float32_rate", "expected"),
    [
        (117, 117, LEAST_PROMPTS),  # AVX2
        (255, 255, 97),  # AVX512
        (186, 186, 71),  # AVX2, the fastest measured
        (420, 195, 160),  # AVX512-BF16
        (2022, 230, MOST_PROMPTS),  # AMX
        (821, 187, MOST_PROMPTS),  # the same, measured in a bad moment
        (2337, 315, 189),
        (980, 460, 276),  # AVX512-BF16 with fast float32
    ],
)
def test_the_number_of_prompts_follows_the_machine(rate, float32_rate, expected):
    assert prompts_for(rate, float32_rate) == expected
