"""`xinslm benchmark` from the command line to the report, on small models and tasks made here."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from small_models import save_random_model
from xinslm.errors import UsageError
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.benchmark.overlap import words_in_common
from xinslm.evaluate.benchmark.run import run
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.report import run as report
from xinslm.report.config import ReportConfig

pytest.importorskip("lm_eval")

NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
WORDS = NUMBERS.split()


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    for seed, name in enumerate(("student", "teacher")):
        (folder / name).mkdir()
        save_random_model(folder / name, seed=seed, max_position_embeddings=512)
    data = folder / "data"
    data.mkdir()
    rows = [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": " ".join(WORDS[i % 5 : i % 5 + 4]),
            "ctx_b": "they",
            "endings": [f"{WORDS[(i + j) % 12]} {WORDS[(i * j) % 12]} ." for j in range(4)],
            "label": str(i % 4),
        }
        for i in range(40)
    ]
    write(data / "hellaswag_val.jsonl", rows)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
    write(data / "HumanEval.jsonl", [problem])
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(data / "ifeval.jsonl", [{"key": 1, "prompt": "Say something.", **rule}])
    write(folder / "own.jsonl", [{"prompt": "Say yes.", "reference": "yes"}])
    runs = folder / "run"
    runs.mkdir()
    (runs / "config.yaml").write_text("{}")
    return folder


def test_everything_in_one_report(world):
    config = BenchmarkConfig(
        model=world / "student",
        against=world / "teacher",
        tasks=("hellaswag", "humaneval", "ifeval", str(world / "own.jsonl")),
        data=world / "data",
        allow_code_execution=True,
        max_new_tokens=6,
        device="cpu",
        run=world / "run",
        output_path=world / "all.json",
    )
    result = run(config)
    rows = {(row["task"], row["metric"]): row for row in result.tasks}
    row = rows["hellaswag", "acc"]
    assert row["items"] == row["total"] == 40
    assert row["chance"] == 0.25
    other = row["other"]
    flips = other["only_own_right"] - other["only_other_right"]
    assert other["difference"] == pytest.approx(row["value"] - other["value"])
    assert other["difference"] == pytest.approx(flips / 40)
    assert rows["humaneval", "pass@1"]["value"] == 0
    assert ("ifeval", "inst_level_loose_acc") in rows
    assert rows["own.jsonl", "score"]["items"] == 1
    table = result.describe()
    assert re.search(r"hellaswag +acc_norm +0\.\d{4}", table)
    assert "humaneval: In force:" in table

    stored = json.loads((world / "all.json").read_text())
    assert len(stored["items"]["hellaswag"]) == 40
    item = stored["items"]["hellaswag"][3]
    assert len(item["log_likelihoods"]) == len(item["choices"]) == 4
    assert set(stored["settings"]["files"]) == {"hellaswag_val.jsonl", str(world / "own.jsonl")}
    page = report.run(ReportConfig(run=world / "run")).html.read_text()
    for text in ("Benchmarks", "hellaswag", "Choice (✓ right", "<rect", "own.jsonl"):
        assert text in page
    with pytest.raises(UsageError, match="exists; pass --force"):
        run(config)


def test_bits_per_byte_of_the_right_choice(world):
    config = BenchmarkConfig(
        model=world / "student",
        tasks=("hellaswag",),
        data=world / "data",
        device="cpu",
        dtype="float64",
        output_path=world / "bits.json",
    )
    row = run(config).tasks[0]
    items = json.loads((world / "bits.json").read_text())["items"]["hellaswag"]
    nats = -sum(item["log_likelihoods"][item["right"]] for item in items)
    size = sum(len(item["choices"][item["right"]].encode()) for item in items)
    assert row["bits_per_byte"]["value"] == pytest.approx(nats / size / 0.6931471805599453)


def limited(world) -> BenchmarkConfig:
    """Both models on the first items only."""
    return BenchmarkConfig(
        model=world / "student",
        against=world / "teacher",
        tasks=("hellaswag",),
        data=world / "data",
        device="cpu",
        max_minutes=1e-5,
    )


def test_a_time_limit_is_told(world):
    result = run(limited(world))
    row = result.tasks[0]
    assert 0 < row["items"] < row["total"] == 40
    low, high = row["full_set"]["interval"]
    assert low <= row["full_set"]["value"] <= high
    assert any("drawn at random" in note for note in result.notes)


def test_with_a_time_limit_the_model_scores_the_items_of_the_other_one(world, monkeypatch):
    from xinslm.evaluate.benchmark import models

    calls, score = [], models.score_model

    def recorded(path, *rest, **options):
        calls.append((path.name, *rest[3:5]))
        return score(path, *rest, **options)

    monkeypatch.setattr(models, "score_model", recorded)
    result = run(limited(world))
    (first, seconds), (second, limit, chosen) = calls
    assert (first, second, limit) == ("teacher", "student", None)
    assert seconds == pytest.approx(30e-5) and len(chosen["hellaswag"]) == 8
    assert "hellaswag: 8 of 40 items" in result.notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "humaneval"], "--allow-code-execution"),
        (["--tasks", "hellaswag", "--max-minutes", "0"], "max_minutes is 0"),
        (["--tasks", "nothing_like_it"], "no task 'nothing_like_it'"),
        (["--tasks", "absent.jsonl"], "absent.jsonl"),
        (["--tasks", "piqa", "--data", "{data}"], "has no data of"),
    ],
)
def test_mistakes_are_named_without_a_traceback(world, words, message):
    words = [word.replace("{data}", str(world / "data")) for word in words]
    found = subprocess.run(
        [sys.executable, "-m", "xinslm", "benchmark", str(world / "student"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_overlap_counts_thirteen_words_in_a_row(world, tmp_path):
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    words = [f"word{i}" for i in range(40)]
    text = tmp_path / "text.jsonl"
    filler = [{"text": f"filler {i} " * 9} for i in range(20)]
    write(text, [{"text": " ".join(words[:30])}, *filler])
    folder = tmp_path / "data"
    prepare.run(
        PrepareConfig(
            data_path=(str(text),),
            tokenizer_path=str(world / "student"),
            output_dir=folder,
            validation_fraction=0.05,
            seed=3,
        )
    )
    texts = {
        "a": [
            " ".join(words[10:23]).upper() + ".",
            " ".join(words[10:22]) + " other",
            " ".join(words[30:40]),
        ],
        "b": [" ".join(words[5:14])],
    }
    assert words_in_common(texts, [folder]) == {"a": 1, "b": 1}
    # words before each item, such as a system prompt, are not the items
    before = " ".join(words[10:25])
    assert words_in_common({"c": [f"{before} one", f"{before} two"]}, [folder]) == {"c": 0}


def test_int8_activations_against_float_ones_of_the_same_model(world, tmp_path):
    quantize(QuantizeConfig(world / "student", tmp_path / "q4", method="rtn"))
    config = BenchmarkConfig(
        model=tmp_path / "q4",
        against=tmp_path / "q4",
        activations="int8",
        tasks=("hellaswag", str(world / "own.jsonl")),
        data=world / "data",
        device="cpu",
        max_new_tokens=4,
    )
    result = run(config)
    assert result.model["name"] == result.name == "q4, int8 activations"
    assert result.model["activations"] in (
        "int8 in 15 of 15 linear layers",
        "int8 in 15 of 15 linear layers, native engine",
    )
    assert result.against["name"] == "q4" and result.against["activations"] == "float"
    (first, *_) = result.samples["hellaswag"]
    assert first["log_likelihoods"] != first["other"]["log_likelihoods"]
    with pytest.raises(UsageError, match="speed is measured with float activations"):
        run(replace(config, speed=True))
