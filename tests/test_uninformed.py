"""A teacher that token frequencies beat is named by every stage that learns from it or reports it.

The teacher's final norm is turned around, so that it finds likely what it found unlikely.
"""

import json

import pytest
import torch

import training as train
from xinslm.baseline import mix_advice, uninformed
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.merge import run as merge
from xinslm.cache.merge_config import MergeConfig
from xinslm.cache.quality import teacher_nats
from xinslm.doctor.config import DoctorConfig
from xinslm.doctor.run import run as doctor
from xinslm.evaluate.config import EvaluateConfig
from xinslm.evaluate.run import run as evaluate
from xinslm.files import read_json
from xinslm.model.files import load_model, save_model
from xinslm.prune.config import PruneConfig
from xinslm.prune.run import run as prune
from xinslm.report.config import ReportConfig
from xinslm.report.run import run as report
from xinslm.runs import add_row
from xinslm.tokenizer.load import load_tokenizer

KNOWS_NOTHING = "no better than token frequencies alone"


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory):
    """The shared fixture's 30 steps are too few to beat token frequencies."""
    folder = tmp_path_factory.mktemp("good") / "teacher"
    train.run(world.pretrain(folder, max_steps=120, learning_rate=5e-3, save_steps=1000))
    return folder / "checkpoints" / "best"


@pytest.fixture(scope="module")
def bad_teacher(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "teacher"
    model = load_model(teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    save_model(model, folder)
    load_tokenizer(teacher).save(folder)
    return folder


def make_cache(world, teacher, folder, **changes):
    settings = {"max_seq_length": 64, "device": "cpu", **changes}
    return score.run(CacheConfig(str(teacher), world.data, folder, **settings))


@pytest.fixture(scope="module")
def bad_cache(world, bad_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-cache") / "cache"
    return make_cache(world, bad_teacher, folder)


def warnings_of(notes) -> list[str]:
    return [note for note in notes if KNOWS_NOTHING in note]


def test_a_figure_that_is_unknown_or_better_is_no_reason_to_warn():
    assert uninformed("a", 5.0, 5.98, "nats") is None
    assert uninformed("a", None, 5.98, "nats") is None
    assert uninformed("a", 8.0, None, "nats") is None
    assert "frequencies alone: 8.120 nats against 5.980" in str(uninformed("a", 8.12, 5.98, "nats"))


def test_cache(world, teacher, bad_teacher, bad_cache, tmp_path):
    assert len(warnings_of(bad_cache.warnings)) == 1
    assert str(bad_teacher) in bad_cache.describe() and KNOWS_NOTHING in bad_cache.describe()
    good = make_cache(world, teacher, tmp_path / "good")
    assert not good.warnings
    both = merge(
        MergeConfig(
            caches=(bad_cache.folder, tmp_path / "good"),
            weights=(9.0, 1.0),
            output_dir=tmp_path / "merged",
        )
    )
    assert len(warnings_of(both.warnings)) == 1, "a tenth of a teacher loses log 10 to it"


def test_the_sampled_loss_is_that_of_all_entries(world, bad_cache):
    """The records of the train split, read one by one."""
    split = Cache(bad_cache.folder).split("train")
    values = [
        float(entry["log_label"])
        for shard in split.fixed_parts
        for entry in shard
        if entry["flags"] & 1
    ]
    assert teacher_nats(Cache(bad_cache.folder)) == pytest.approx(-sum(values) / len(values))


@pytest.mark.parametrize("live", [False, True])
def test_distill_and_report(world, bad_teacher, bad_cache, tmp_path, live):
    source = {"teacher": str(bad_teacher)} if live else {"cache": bad_cache.folder}
    notes = []
    config = world.distill(tmp_path / "run", max_steps=2, **source)
    result = train.run(config, lambda p: notes.append(p.note))
    assert len(warnings_of(notes)) == len(warnings_of(result.warnings)) == 1
    told = report(ReportConfig(tmp_path / "run"))
    assert len(warnings_of(told.notes)) == 1
    assert KNOWS_NOTHING in told.html.read_text() and KNOWS_NOTHING in told.markdown.read_text()


@pytest.mark.parametrize("live", [False, True])
def test_distill_from_a_teacher_that_knows_something(world, teacher, tmp_path, live):
    source = {"teacher": str(teacher)}
    if not live:
        source = {"cache": make_cache(world, teacher, tmp_path / "cache").folder}
    result = train.run(world.distill(tmp_path / "run", max_steps=2, **source))
    assert not warnings_of(result.warnings)
    assert not warnings_of(report(ReportConfig(tmp_path / "run")).notes)
    facts = read_json(tmp_path / "run" / "run.json")
    assert "torch" in facts["machine"] and facts["date"].startswith("20")
    assert facts["warnings"] == list(result.warnings)


def test_a_student_that_is_better_than_its_teacher_is_told_to_trust_the_text(
    world, teacher, bad_cache, tmp_path
):
    """In the result, in run.json for the report, and by doctor."""
    assert mix_advice(2.1, 2.0, "nats") is None and mix_advice(2.0, None, "nats") is None
    result = train.run(world.distill(tmp_path / "run", max_steps=2, cache=bad_cache.folder))
    ours, theirs = result.validation.ce, teacher_nats(Cache(bad_cache.folder), "validation")
    (said,) = [text for text in result.warnings if "--loss.alpha 0.7" in text]
    assert f"better than its teacher: {ours:.3f} nats per target token against {theirs:.3f}" in said
    assert read_json(tmp_path / "run" / "run.json")["warnings"] == list(result.warnings)
    good = make_cache(world, teacher, tmp_path / "good").folder
    quiet = train.run(world.distill(tmp_path / "quiet", max_steps=2, cache=good))
    assert not any("--loss.alpha" in text for text in quiet.warnings)
    for cache, student, advice in ((bad_cache.folder, teacher, True), (good, teacher, False)):
        checks = doctor(
            DoctorConfig(data_path=world.data, cache=cache, student=student, device="cpu")
        ).checks
        (found,) = [check.detail for check in checks if check.name == "student on this data"]
        assert ("--loss.alpha" in found) == advice
    numbers = [float(word.rstrip(",")) for word in found.split()[1:4:2]]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.002)  # the student is the teacher


def test_prune(world, teacher, bad_teacher, tmp_path):
    for folder, expected in ((bad_teacher, 1), (teacher, 0)):
        notes = []
        result = prune(
            PruneConfig(
                teacher=str(folder),
                data_path=world.data,
                output_dir=tmp_path / f"student-{expected}",
                num_layers=1,
                max_seq_length=64,
                device="cpu",
            ),
            lambda p, notes=notes: notes.append(p.note),
        )
        assert len(warnings_of(notes)) == len(warnings_of(result.notes)) == expected


def test_evaluate_and_report(world, teacher, bad_teacher, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    for folder, expected in ((teacher, 0), (bad_teacher, 1)):
        row = evaluate(
            EvaluateConfig(model=folder, data_path=(str(world.data),), device="cpu", name="teacher")
        )
        assert (KNOWS_NOTHING in row.describe()) == bool(expected)
        add_row(tmp_path, "evaluation.json", row.row())
        assert len(warnings_of(report(ReportConfig(tmp_path)).notes)) == expected


def test_doctor(world, bad_teacher, bad_cache):
    common = {"data_path": world.data, "device": "cpu"}
    for settings in ({"cache": bad_cache.folder}, {"teacher": str(bad_teacher)}):
        result = doctor(DoctorConfig(**common, **settings))
        (check,) = [c for c in result.checks if c.name == "teacher on this data"]
        assert check.status == "FAIL" and KNOWS_NOTHING in check.detail
