"""Rows that are prepared late against `Dataset.map` of all rows, and how many are prepared."""

import json
import sys

import pytest

pytest.importorskip("lm_eval")

import datasets

from xinslm.evaluate.harness import local_data, prepared
from xinslm.evaluate.harness.local_data import local_datasets
from xinslm.evaluate.harness.prepared import LateDataset, PreparedRows
from xinslm.evaluate.harness.tasks import build_requests, load_tasks, num_docs

COUNT = 2300
CHOSEN = [2150, 3, 1999, 7]


def hellaswag_row(i: int) -> dict:
    return {
        "ind": i,
        "activity_label": "Cooking" if i % 2 else "How to [title]",
        "ctx_a": f"A person takes {i} eggs.",
        "ctx_b": "then" if i % 3 else "",
        "endings": [f"breaks {i + j} of them [step] and  waits" for j in range(4)],
        "label": str(i % 4),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(hellaswag_row(i)) + "\n" for i in range(COUNT))
    (path / "hellaswag_val.jsonl").write_text(text)
    return path


@pytest.fixture
def prepared_texts(folder, monkeypatch):
    """Texts that the harness's own `process_docs` has prepared: five of each row."""
    load_tasks(["hellaswag"], folder)  # the harness keeps the task's module
    utils = sys.modules["lm_eval.tasks.hellaswag.utils"]
    original, calls = utils.preprocess, []

    def recorded(text):
        calls.append(text)
        return original(text)

    monkeypatch.setattr(utils, "preprocess", recorded)
    return calls


def requests_of(task, numbers) -> list[tuple]:
    return [(r.doc_id, r.idx, r.args, r.doc) for r in build_requests(task, numbers)]


def test_a_limited_run_prepares_the_first_batch_and_its_own_rows(folder, prepared_texts):
    task = load_tasks(["hellaswag"], folder).tasks["hellaswag"]
    assert num_docs(task) == COUNT
    # the harness looks at the first item again
    assert 0 <= len(prepared_texts) - 5 * prepared.FIRST_BATCH <= 15
    del prepared_texts[:]
    requests_of(task, CHOSEN)
    assert len(prepared_texts) == 5 * len(CHOSEN)


def test_items_and_prompts_equal_those_of_the_plain_harness(folder, monkeypatch):
    import lm_eval.tasks

    late = load_tasks(["hellaswag"], folder).tasks["hellaswag"]
    assert isinstance(late.task_docs, PreparedRows)
    path = lm_eval.__path__[0] + "/tasks/hellaswag"
    with local_datasets(folder):
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=path)
        plain = manager.load(["hellaswag"])["tasks"]["hellaswag"]
    assert type(plain.task_docs) is datasets.Dataset
    assert late.features == plain.features
    plain.set_config(key="num_fewshot", value=0)
    plain.build_all_requests()
    everything = [(r.doc_id, r.idx, r.args, r.doc) for r in plain.instances]
    part = [entry for number in CHOSEN for entry in everything if entry[0] == number]
    assert requests_of(late, CHOSEN) == part
    assert requests_of(late, range(COUNT)) == everything


def scores(row: dict) -> dict:
    number = row["number"]
    return {"score": number + 0.5, "words": ["a"] * (number % 3)}


def scores_of_two_types(row: dict) -> dict:
    """Fractions in the first batch, whole numbers later; the first batch decides the type."""
    number = row["number"]
    return {"score": number + 0.5 if number < 1000 else number}


def changing(row: dict) -> dict:
    return {"double": 2 * row["number"]}


@pytest.fixture
def both(monkeypatch):
    functions = scores, scores_of_two_types
    monkeypatch.setattr(prepared, "ROW_BY_ROW", [f"{__name__}.{f.__name__}" for f in functions])
    return both_ways(scores)


def both_ways(function) -> tuple[PreparedRows, datasets.Dataset]:
    rows = [{"number": i, "empty": None} for i in range(2500)]
    return LateDataset.from_list(rows).map(function), datasets.Dataset.from_list(rows).map(function)


def test_rows_and_types_equal_those_of_map(both):
    late, plain = both
    assert isinstance(late, PreparedRows)
    assert (list(late.features), len(late)) == (list(plain.features), len(plain))
    numbers = [2400, 5, 1000, 999, 2400]
    found = list(late.select(numbers))
    assert found == [plain[number] for number in numbers]
    assert [late[i] for i in (0, 1700, -1)] == [plain[i] for i in (0, 1700, -1)]
    assert "whole" not in vars(late)
    with pytest.raises(IndexError):
        late[2500]


def test_a_row_of_another_type_gets_that_of_the_first_batch(both):
    late, plain = both_ways(scores_of_two_types)
    assert late[999] == plain[999]
    assert "whole" not in vars(late)
    assert late[1000] == plain[1000]
    assert type(late[1000]["score"]) is float


def test_a_row_may_be_changed(both):
    late, _ = both
    late[5]["words"].append("b")
    assert late[5]["words"] == ["a", "a"]


def test_what_needs_all_rows_is_the_whole_dataset(both):
    late, plain = both
    assert late.features == plain.features
    assert list(late) == list(plain)
    assert late["score"][:] == plain["score"][:]
    assert late.column_names == plain.column_names
    assert list(late.shuffle(seed=1)) == list(plain.shuffle(seed=1))
    assert list(late.select(range(2400))) == list(plain.select(range(2400)))


def test_other_functions_and_options_prepare_all_rows_at_once(monkeypatch):
    rows = LateDataset.from_list([{"number": i} for i in range(5)])
    assert type(rows.map(changing)) is datasets.Dataset
    monkeypatch.setattr(prepared, "ROW_BY_ROW", (f"{__name__}.changing",))
    assert type(rows.map(changing)) is PreparedRows
    assert type(rows.map(changing, batched=False)) is datasets.Dataset
    assert type(rows.map(lambda row: {"double": 0})) is datasets.Dataset


def test_only_our_own_loading_prepares_late(folder):
    plain = local_data.LocalDatasets(folder).load("Rowan/hellaswag")["validation"]
    late = local_data.LocalDatasets(folder, late=True).load("Rowan/hellaswag")["validation"]
    assert (type(plain), type(late)) == (datasets.Dataset, LateDataset)
