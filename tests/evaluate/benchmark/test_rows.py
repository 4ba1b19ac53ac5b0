"""Rows of two models that do not have a score for the same items."""

import json
from dataclasses import replace

import pytest

from xinslm.errors import XinslmError
from xinslm.evaluate.benchmark.rows import task_rows
from xinslm.evaluate.harness.run import Item, TaskScore
from xinslm.report.read import read_run


def score(values: dict[int, float]) -> TaskScore:
    items = [Item("own", index, {"score": value}) for index, value in values.items()]
    mean = sum(values.values()) / len(values)
    return TaskScore("own", "", 0, 4, {"score": mean}, items, 1.0, 0, {"own": 4})


def test_only_common_items_are_compared():
    own, other = score({0: 1.0, 1: 0.5, 2: 0.0}), score({1: 0.25, 2: 0.75, 3: 1.0})
    (row,) = task_rows(own, other, seed=0)
    assert row["items"] == 2
    assert row["value"] == pytest.approx(0.25)
    assert row["other"]["value"] == pytest.approx(0.5)
    assert row["other"]["difference"] == pytest.approx(-0.25)


def test_models_without_a_common_item_are_refused():
    with pytest.raises(XinslmError, match="no item has a score for both models"):
        task_rows(score({0: 1.0}), score({1: 1.0}), seed=0)


def test_alone_all_items_count():
    (row,) = task_rows(replace(score({0: 1.0, 3: 0.0}), total=2), None, seed=0)
    assert row["value"] == 0.5 and "other" not in row and "full_set" not in row


def test_a_row_of_another_version_is_named(tmp_path):
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": [{"name": "a", "tasks": []}]}))
    with pytest.raises(XinslmError, match=r"row 'a' has no 'model'; run `xinslm benchmark` again"):
        read_run(tmp_path)
