"""A benchmark that was stopped goes on from the answers that it has."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from small_models import save_random_model
from xinslm.errors import Interrupted, UsageError, XinslmError
from xinslm.evaluate import journal as journals
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.benchmark.run import run
from xinslm.evaluate.journal import Journal

pytest.importorskip("lm_eval")

NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
WORDS = NUMBERS.split()
OWN = [{"prompt": f"Say {word}.", "reference": word} for word in WORDS]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchmarkConfig:
    for seed, name in enumerate(("student", "teacher")):
        (tmp_path / name).mkdir()
        save_random_model(tmp_path / name, seed=seed, max_position_embeddings=64)
    (tmp_path / "data").mkdir()
    rows = [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": " ".join(WORDS[i % 5 : i % 5 + (30 if i == 7 else 4)] * (9 if i == 7 else 1)),
            "ctx_b": "they",
            "endings": [f"{WORDS[(i + j) % 12]} {WORDS[(i * j) % 12]} ." for j in range(4)],
            "label": str(i % 4),
        }
        for i in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "hellaswag_val.jsonl").write_text(text)
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in OWN))
    monkeypatch.setattr(journals, "SECONDS", 0.0)
    return BenchmarkConfig(
        model=tmp_path / "student",
        tasks=("hellaswag", str(own)),
        data=tmp_path / "data",
        device="cpu",
        dtype="float64",
        batch_tokens=32,
        max_new_tokens=4,
        output_path=tmp_path / "scores.json",
    )


def stop_after(share: float, unit: str, error: type[BaseException] = KeyboardInterrupt):
    """A progress listener that stops the run when a part of the `unit` is done."""

    def listen(progress) -> None:
        if progress.unit == unit and progress.total and progress.done > share * progress.total:
            raise error

    return listen


def scores(config: BenchmarkConfig) -> dict:
    assert config.output_path is not None
    return json.loads(config.output_path.read_text())


def items(config: BenchmarkConfig) -> list:
    """Log-likelihoods and answers of all items."""
    found = scores(config)["items"]
    rows = [row for name in sorted(found) for row in found[name]]
    return [(row.get("log_likelihoods"), row.get("answers"), row["metrics"]) for row in rows]


@pytest.mark.parametrize("unit, share", [("tokens", 0.3), ("tokens", 0.8), ("answers", 0.1)])
def test_the_same_values_after_a_stop(config, unit, share, monkeypatch) -> None:
    whole = replace(config, output_path=config.output_path.with_name("whole.json"))
    run(whole)
    with pytest.raises(Interrupted, match=r"scores.json.partial keeps \d+ answers"):
        run(config, stop_after(share, unit))
    assert not config.output_path.exists()
    partial = config.journal_path
    known = len(Journal(partial).known)
    assert 5 < known < 24 * 4 + len(OWN)

    scored = []
    from xinslm.evaluate.likelihood import LikelihoodScorer

    original = LikelihoodScorer.__call__

    def spied(self, pairs, *rest):
        scored.append(len(pairs))
        return original(self, pairs, *rest)

    monkeypatch.setattr(LikelihoodScorer, "__call__", spied)
    run(config)
    asked = 24 * 4 - min(known, 24 * 4)
    assert asked - 8 < sum(scored) <= asked  # equal choices have one answer
    for ours, theirs in zip(items(config), items(whole), strict=True):
        assert ours[1:] == theirs[1:]
        np.testing.assert_allclose(ours[0] or [], theirs[0] or [], rtol=0, atol=1e-9)
    before, after = scores(whole)["notes"], scores(config)["notes"]
    assert any("lost their beginning" in note for note in before)
    assert [note for note in after if "earlier run" not in note] == before
    assert "answers are those of an earlier run" in after[-1]
    assert not partial.exists()


def test_a_kill_loses_only_the_last_seconds_and_half_lines_are_dropped(config) -> None:
    with pytest.raises(RuntimeError):
        run(config, stop_after(0.5, "tokens", RuntimeError))
    partial = config.journal_path
    data = partial.read_bytes()
    known = len(Journal(partial).known)
    partial.write_bytes(data[:-10])
    journal = Journal(partial)
    assert len(journal.known) == known - 1
    journal.add([("key", "answer")])
    journal.flush()
    assert Journal(partial).known == journal.known


def test_answers_of_another_model_or_setting_are_not_used(config) -> None:
    with pytest.raises(Interrupted):
        run(config, stop_after(0.5, "tokens"))
    other = replace(config, model=config.model.with_name("teacher"))
    run(other)
    assert not any("earlier run" in note for note in scores(other)["notes"])
    with pytest.raises(Interrupted):
        run(replace(config, force=True), stop_after(0.5, "tokens"))
    run(replace(config, force=True, dtype="float32"))
    assert not any("earlier run" in note for note in scores(config)["notes"])


def test_both_models_go_on(config) -> None:
    both = replace(config, against=config.model.with_name("teacher"))
    with pytest.raises(Interrupted):
        run(both, stop_after(0.9, "answers"))
    run(both)
    assert "earlier run" in scores(both)["notes"][-1]
    rows = [row["other"]["value"] for row in scores(both)["tasks"]]
    fresh = replace(both, output_path=both.output_path.with_name("fresh.json"))
    run(fresh)
    assert rows == [row["other"]["value"] for row in scores(fresh)["tasks"]]


def test_a_run_folder_keeps_the_answers_if_there_is_no_output_file(config, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    here = replace(config, output_path=None, run=folder)
    with pytest.raises(Interrupted, match=r"benchmark\.partial"):
        run(here, stop_after(0.5, "tokens"))
    run(here)
    assert not (folder / "benchmark.partial").exists()
    assert replace(here, run=None).journal_path is None
    assert replace(config, max_minutes=1).journal_path is None


def test_another_kind_of_file_is_left_alone(config) -> None:
    partial = config.journal_path
    partial.write_text("my notes\n")
    with pytest.raises(UsageError, match="Move it away"):
        run(config)
    assert partial.read_text() == "my notes\n"


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "scores.partial")
    journal.add([("key", [1.0, True, False])])
    with pytest.raises(XinslmError, match="No such file"):
        journal.flush()


def test_keys_tell_borders_of_parts_apart() -> None:
    assert Journal.key(b"ab", b"c") != Journal.key(b"a", b"bc") != Journal.key(b"abc")


def test_rolling_likelihoods_and_sampled_texts_are_kept(config, tmp_path) -> None:
    from types import SimpleNamespace

    from xinslm.evaluate.harness.model import XinslmLM

    lm = XinslmLM(str(config.model), device="cpu", dtype="float64")
    texts = [SimpleNamespace(args=(" ".join(WORDS * 9),)), SimpleNamespace(args=("one two",))]
    sampled = {"max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "until": []}
    prompts = [SimpleNamespace(args=("one two", sampled))] * 2
    expected = lm.loglikelihood_rolling(texts), lm.generate_until(prompts)
    lm.journal = Journal(tmp_path / "kept")
    assert (lm.loglikelihood_rolling(texts), lm.generate_until(prompts)) == expected
    lm.journal.flush()
    lm.journal = Journal(tmp_path / "kept")
    before = lm.scorer.counts.computed_tokens
    assert (lm.loglikelihood_rolling(texts), lm.generate_until(prompts)) == expected
    assert lm.scorer.counts.computed_tokens == before
    assert lm.journal.reused == len(lm.journal.known)
