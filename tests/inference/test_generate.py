"""Generation on an engine that plays a script: streaming, stops, figures; and the stage on real
folders.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from small_models import save_random_model, save_tokenizer
from xinslm.errors import UsageError, XinslmError
from xinslm.inference.config import GenerateConfig
from xinslm.inference.generate import generate, run
from xinslm.sampling import Sampling
from xinslm.tokenizer.chat import end_ids
from xinslm.tokenizer.load import load_tokenizer

GREEDY = Sampling(temperature=0)


class ScriptedEngine:
    """An engine that is sure of the next token: the script's."""

    name = "script"

    def __init__(self, tokenizer, script: Sequence[int], context_length: int = 1000) -> None:
        self.tokenizer, self.script, self.context_length = tokenizer, list(script), context_length
        self.position = self.reused = self.written = 0

    def start(self, ids: Sequence[int]) -> np.ndarray:
        self.position = len(ids)
        return self._logits()

    def step(self, token: int) -> np.ndarray:
        assert token == self.script[self.written]
        self.written += 1
        self.position += 1
        return self._logits()

    def reset(self) -> None:
        self.position = 0

    def _logits(self) -> np.ndarray:
        logits = np.zeros(self.tokenizer.vocab_size, np.float32)
        logits[self.script[self.written]] = 5.0
        return logits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


def write(
    tokenizer, text: str, end: Sequence[int] = (), **arguments
) -> tuple[list[str], str | None]:
    """Texts of the pieces, and why the writing ended."""
    script = [*tokenizer.encode(text), *end]
    pieces = list(generate(ScriptedEngine(tokenizer, script), [0], GREEDY, **arguments))
    assert all(piece.stop is None for piece in pieces[:-1])
    assert [piece.token for piece in pieces] == script[: len(pieces)]
    return [piece.text for piece in pieces], pieces[-1].stop


def test_the_end_token_ends_the_text_and_has_none_itself(tokenizer) -> None:
    texts, stop = write(tokenizer, "a dog jumps", [tokenizer.eos_id])
    assert "".join(texts) == "a dog jumps" and texts[-1] == "" and stop == "end token"
    texts, stop = write(tokenizer, "a dog", [tokenizer.bos_id])
    assert "".join(texts) == "a dog" and stop == "end token"


def test_characters_come_whole(tokenizer) -> None:
    text = "naïve 中文 😀 ⇌"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "some characters must take several tokens"
    texts, _ = write(tokenizer, text, [tokenizer.eos_id])
    assert "".join(texts) == text and not any("�" in piece for piece in texts)


def test_half_a_character_at_the_end_is_marked(tokenizer) -> None:
    ids = tokenizer.encode("ok 😀")
    script = [*ids[:-1], tokenizer.eos_id]
    pieces = list(generate(ScriptedEngine(tokenizer, script), [0], GREEDY))
    assert "".join(piece.text for piece in pieces) == "ok �"
    cut = list(generate(ScriptedEngine(tokenizer, ids), [0], GREEDY, max_tokens=len(ids) - 1))
    assert "".join(piece.text for piece in cut) == "ok �" and cut[-1].stop == "length"


def test_lengths(tokenizer) -> None:
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog")
    pieces = list(generate(ScriptedEngine(tokenizer, ids), [0], GREEDY, max_tokens=3))
    assert len(pieces) == 3 and pieces[-1].stop == "length"
    pieces = list(generate(ScriptedEngine(tokenizer, ids, context_length=10), [0] * 7, GREEDY))
    # the fourth is predicted from 10, and cannot be read
    assert len(pieces) == 4 and pieces[-1].stop == "context"
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        list(generate(ScriptedEngine(tokenizer, ids), [0], GREEDY, max_tokens=0))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["lazy"], "over the "),
        (["y d", "zy"], "over the la"),
        (["the lazy dog"], "over "),
        (["o"], ""),
        (["lazy cat"], "over the lazy dog"),
        (["doge", "dog!"], "over the lazy dog"),
        ([""], "over the lazy dog"),
    ],
)
def test_stop_texts_are_found_across_tokens_and_left_out(
    tokenizer, stops: list[str], expected: str
) -> None:
    texts, stop = write(tokenizer, "over the lazy dog", [tokenizer.eos_id], stop_strings=stops)
    assert "".join(texts) == expected
    assert stop == ("stop text" if expected != "over the lazy dog" else "end token")


def test_nothing_of_a_stop_text_is_ever_shown(tokenizer) -> None:
    text = "ab abc abcd"
    for length in range(1, len(text) + 1):
        for start in range(len(text) - length + 1):
            stop = text[start : start + length]
            texts, _ = write(tokenizer, text, [tokenizer.eos_id], stop_strings=[stop])
            assert "".join(texts) == text[: text.index(stop)]


def test_log_probabilities_are_the_models(tokenizer) -> None:
    (piece, *_) = generate(ScriptedEngine(tokenizer, [9, 9]), [0], GREEDY, max_tokens=1)
    expected = 5 - np.log(np.exp(5) + tokenizer.vocab_size - 1)
    assert piece.log_probability == pytest.approx(expected)


def test_a_chat_models_turn_ends_with_its_own_token(tmp_path: Path) -> None:
    save_tokenizer(
        tmp_path,
        template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|pad|>{% endfor %}",
    )
    tokenizer = load_tokenizer(tmp_path)
    assert end_ids(tokenizer) == {
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.special_tokens["<|pad|>"],
    }
    others = set(tokenizer.special_tokens.values()) - end_ids(tokenizer)
    script = [9, *others, tokenizer.special_tokens["<|pad|>"], 9]
    pieces = list(generate(ScriptedEngine(tokenizer, script), [9], GREEDY))
    assert others and [piece.token for piece in pieces] == script[:-1]
    assert pieces[-1].stop == "end token"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    return folder


def test_a_seed_fixes_the_text_and_streaming_gives_all_of_it(model: Path) -> None:
    def write(seed: int) -> str:
        shown: list[str] = []
        config = GenerateConfig(
            model=model, prompt="The fox", seed=seed, max_new_tokens=25, device="cpu"
        )
        result = run(config, shown.append)
        assert "".join(shown) == result.text and result.prompt_tokens > 1
        return result.text

    assert write(1) == write(1) != write(2)


def test_the_context_ends_the_text_and_is_told(model: Path) -> None:
    config = GenerateConfig(
        model=model,
        prompt="The",
        max_new_tokens=500,
        max_seq_length=12,
        device="cpu",
        temperature=0,
    )
    result = run(config)
    assert result.stop in ("context", "end token")
    assert result.prompt_tokens + result.new_tokens <= 13
    if result.stop == "context":
        assert "context is full" in result.describe()


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(model: Path) -> None:
    with pytest.raises(UsageError, match=r"has \d+ tokens, the context of .* holds 8"):
        run(
            GenerateConfig(
                model=model, prompt="The quick brown fox " * 9, max_seq_length=8, device="cpu"
            )
        )


def test_a_prompt_file_is_taken_as_it_is(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"one\r\ntwo\n")
    config = GenerateConfig(model=model, prompt_file=path, max_new_tokens=1, device="cpu")
    assert run(config).prompt == "one\r\ntwo\n"
    with pytest.raises(UsageError, match="not both"):
        run(GenerateConfig(model=model, prompt="x", prompt_file=path))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(XinslmError, match="byte 3 is not UTF-8"):
        run(config)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        run(config)


def test_the_sample_goes_into_the_run_folder_once_a_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    for seed, name in ((1, "student"), (2, "student"), (3, "teacher")):
        config = GenerateConfig(
            model=model,
            prompt="A dog",
            seed=seed,
            max_new_tokens=4,
            device="cpu",
            run=tmp_path,
            name=name,
        )
        result = run(config)
    rows = json.loads((tmp_path / "samples.json").read_text())["rows"]
    assert [(row["name"], row["settings"]["seed"]) for row in rows] == [
        ("student", 2),
        ("teacher", 3),
    ]
    assert rows[1]["text"] == result.text and rows[1]["prompt"] == "A dog"
    with pytest.raises(UsageError, match="is not a run folder"):
        run(GenerateConfig(model=model, run=tmp_path / "absent", device="cpu"))


def test_chat_needs_a_template(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    save_tokenizer(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"has no chat template.*Leave out --chat"):
        run(GenerateConfig(model=tmp_path, prompt="hello", chat=True, device="cpu"))
