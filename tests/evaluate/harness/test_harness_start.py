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
from xinslm.evaluate.harness.tasks import load_tasks
loaded = load_tasks(["truthfulqa_mc2"], Path(sys.argv[1]))
score = loaded.tasks["truthfulqa_mc2"].process_results
print(score({"mc2_targets": {"labels": [1, 0]}}, [(-1.0, False), (-2.0, False)])["acc"])
print(sorted({"nltk", "scipy", "sklearn"} & set(sys.modules)))
from rouge_score import rouge_scorer
print(rouge_scorer.RougeScorer(["rouge1"]).score("a b", "a c")["rouge1"].fmeasure)
"""


def test_truthfulqa_is_scored_without_the_libraries_of_rouge(tmp_path):
    pytest.importorskip("lm_eval")
    targets = {"the sky is blue": 1, "it is green": 0}
    question = {"question": "What?", "mc1_targets": targets, "mc2_targets": targets}
    (tmp_path / "truthfulqa_mc_817.json").write_text(json.dumps([question]))
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    accuracy, modules, rouge = found.stdout.split("\n")[:3]
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
    with late_modules():
        one = importlib.import_module("late_one")
        assert log.runs == 0
        importlib.import_module("late_two")
        assert log.runs == 10
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("late_nothing")
    assert sys.meta_path == finders
    assert (one.value, log.runs) == (7, 11)
    assert importlib.import_module("late_one") is one


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
