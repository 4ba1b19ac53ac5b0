"""Modules that wait until they are used, and Python's search for cycles, which waits too."""

import gc
import importlib
import json
import subprocess
import sys

import pytest

from xinslm.evaluate.harness import start
from xinslm.evaluate.harness.start import late_modules, no_collection

LOAD = """
import sys
from pathlib import Path
from xinslm.evaluate.harness.tasks import build_requests, load_tasks
loaded = load_tasks(["truthfulqa_mc2", "hellaswag"], Path(sys.argv[1]))
print([r.args[1] for r in build_requests(loaded.tasks["hellaswag"], [1])])
late = {"datasets.load", "pyarrow", "pandas", "chardet", "lxml", "transformers"}
print(sorted(late & set(sys.modules)))
import datasets
is_late = type(datasets).__name__
rows = datasets.Dataset.from_list([{"a": 1}])
print(is_late, type(datasets).__name__, type(rows) is datasets.Dataset, rows[0])
print(datasets.load_dataset.__module__)
score = loaded.tasks["truthfulqa_mc2"].process_results
print(score({"mc2_targets": {"labels": [1, 0]}}, [(-1.0, False), (-2.0, False)])["acc"])
print(sorted({"nltk", "scipy", "sklearn"} & set(sys.modules)))
from rouge_score import rouge_scorer
print(rouge_scorer.RougeScorer(["rouge1"]).score("a b", "a c")["rouge1"].fmeasure)
"""


def test_local_data_are_scored_without_libraries_that_they_do_not_need(tmp_path):
    pytest.importorskip("lm_eval")
    targets = {"the sky is blue": 1, "it is green": 0}
    question = {"question": "What?", "mc1_targets": targets, "mc2_targets": targets}
    (tmp_path / "truthfulqa_mc_817.json").write_text(json.dumps([question]))
    row = {"activity_label": "A", "ctx_a": "b.", "ctx_b": "c", "label": "1"}
    rows = [row | {"endings": [f"{i}", "x"]} for i in range(3)]
    (tmp_path / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    requests, unused, library, loader, accuracy, modules, rouge = found.stdout.split("\n")[:7]
    assert requests == "[' 1', ' x']"
    assert unused == "[]"
    assert library == "LateModule module True {'a': 1}"
    assert loader == "datasets.load"
    assert float(accuracy) == pytest.approx(0.7310585786)  # e / (1 + e)
    assert modules == "[]"
    assert float(rouge) == 0.5


def test_a_late_module_runs_when_it_is_used(tmp_path, monkeypatch):
    (tmp_path / "late_one.py").write_text("import late_log\nlate_log.runs += 1\nvalue = 7\n")
    (tmp_path / "late_two.py").write_text("import late_log\nlate_log.runs += 10\n")
    (tmp_path / "late_log.py").write_text("runs = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "LATE_MODULES", ("late_one", "late_nothing"))
    log = importlib.import_module("late_log")
    finders = list(sys.meta_path)
    (tmp_path / "late_user.py").write_text("import late_one\n")
    with late_modules():
        one = importlib.import_module("late_one")
        importlib.import_module("late_user")
        assert log.runs == 0
        importlib.import_module("late_two")
        assert log.runs == 10
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("late_nothing")
    assert sys.meta_path == finders
    assert (one.value, log.runs) == (7, 11)
    assert importlib.import_module("late_one") is one


def test_a_module_of_a_late_package_runs_once(tmp_path, monkeypatch):
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package/__init__.py").write_text("from late_package.part import Thing\n")
    (tmp_path / "late_package/part.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(start, "LATE_MODULES", ("late_package",))
    finders = list(sys.meta_path)
    with late_modules():
        package = importlib.import_module("late_package")
    assert "Thing" not in vars(package)
    part = importlib.import_module("late_package.part")
    assert package.Thing is part.Thing
    assert part.__spec__.origin == str(tmp_path / "late_package/part.py")
    assert sys.meta_path == finders


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_for_cycles_is_left_as_it_was(enabled):
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ValueError, match="inside"), no_collection():
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()
