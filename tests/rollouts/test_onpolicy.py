"""On-policy rounds: what is written, scored and learnt, stopped anywhere, and never both models in
memory.
"""

import dataclasses
import gc
import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import training as train
from xinslm.cache.entries import LARGEST_NEGATIVE_LOG
from xinslm.cache.folder import Cache
from xinslm.cache.support import read_support
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.files import read_json
from xinslm.losses.config import LossConfig
from xinslm.model.files import load_model, open_model
from xinslm.model.transformer import Transformer
from xinslm.rollouts import onpolicy
from xinslm.rollouts.onpolicy_config import OnPolicyConfig
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.own import OwnTeacher

SMALL = {
    "rounds": 2,
    "support_top_k": 8,
    "completions": 24,
    "prompt_tokens": 6,
    "max_new_tokens": 20,
    "generation_batch_size": 7,
    "max_seq_length": 64,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "device": "cpu",
    "max_eval_samples": 8,
}


@pytest.fixture(scope="module")
def student(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "run"
    train.run(world.pretrain(folder, max_steps=12, learning_rate=5e-3))
    return folder


@pytest.fixture(scope="module")
def make(world, student):
    def configure(output_dir, **changes) -> OnPolicyConfig:
        settings = {
            **SMALL,
            "compute_dtype": "float32",
            "engine": "pytorch",  # test_native_writer.py has the native one
            "student": student,
            "teacher": str(world.teacher),
            "prompts": world.data,
            **changes,
        }
        return OnPolicyConfig(output_dir=output_dir, **settings)

    return configure


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, onpolicy.run(make(folder))


def weights(run):
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in train.MEASURED} for line in lines]


def rounds(run):
    return [run / f"round-{number:03d}" for number in (1, 2)]


def test_texts_are_prompts_and_what_the_student_wrote(world, finished):
    """Prompts are context, every written token is a target and nothing else is: the divisor is
    their number.
    """
    from transformers import AutoModelForCausalLM

    run, result = finished
    source = open_dataset(world.data).split("train")
    begins = {tuple(source.tokens[a : a + 6].tolist()) for a in source.documents[:-1]}
    total = 0
    for folder in rounds(run):
        dataset = open_dataset(folder / "data")
        split = dataset.split("train")
        assert len(split.documents) == 25
        for a, b in zip(split.documents[:-1], split.documents[1:], strict=True):
            written = np.flatnonzero(split.mask[a:b])
            prompt = b - a - len(written)
            assert written.tolist() == list(range(prompt, b - a)), "context first, then targets"
            assert tuple(split.tokens[a : a + prompt].tolist()) in begins and len(written) <= 20
        targets = dataset.manifest["splits"]["train"]["targets"]
        rows = PackedDataset(split, 64)
        assert (
            int((rows.batch(np.arange(len(rows))).labels >= 0).sum())
            == targets
            == int(split.mask.sum())
        )
        assert dataset.manifest["token_forwards"] <= 24 * (6 + 20)
        total += targets
    assert result.written_tokens == total and result.texts == 48
    assert len({tuple(s) for f in rounds(run) for s in np.split(*_texts(f))}) > 40, (
        "other texts each time"
    )
    tokens, offsets = _texts(rounds(run)[0])
    first = AutoModelForCausalLM.from_pretrained(open_model(make_student(run)).path)
    support = np.load(rounds(run)[0] / "data" / "train" / "support.npy")
    with torch.no_grad():
        logits = first(
            torch.from_numpy(np.split(tokens, offsets)[0].astype(np.int64))[None]
        ).logits[0]
    count = len(np.split(tokens, offsets)[0])
    mask = open_dataset(rounds(run)[0] / "data").split("train").mask[:count]
    places = np.flatnonzero(mask) - 1
    assert support[: len(places)].tolist() == logits[places].topk(8, dim=1).indices.tolist()


def make_student(run):
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["student"]


def _texts(folder):
    split = open_dataset(folder / "data").split("train")
    return np.asarray(split.tokens), split.documents[1:-1]


def test_records_hold_the_teacher_where_the_student_has_its_mass(world, finished):
    """Against the teacher itself: exact up to the codes, tokens below e^-20 at e^-20, the rest in
    the tail.
    """
    run, _ = finished
    folder = rounds(run)[1]
    split = open_dataset(folder / "data").split("train")
    cache = Cache(folder / "cache")
    assert (cache.format.top_k, cache.format.tail_sample_mass) == (8 + 1 + 4, 0)
    support = read_support(open_dataset(folder / "data"))
    teacher = HuggingFaceTeacher(open_model(world.teacher))
    at = 0
    for a, b in zip(split.documents[:12], split.documents[1:13], strict=True):
        tokens = np.asarray(split.tokens[a:b]).astype(np.int64)
        probs = torch.softmax(teacher.logits(teacher.states([tokens])), dim=1)
        places = np.flatnonzero(split.mask[a:b])
        found = cache.split("train").targets(a + places - 1)
        p = probs[places - 1]
        assert bool(found.valid_mask.all())
        for row, place in enumerate(places):
            ids = found.top_k_ids[row].tolist()
            assert len(set(ids)) == 13
            assert {
                *support.ids[at + row].tolist(),
                int(tokens[place]),
                *p[row].topk(4).indices.tolist(),
            } <= set(ids)
        at += len(places)
        exact = p.gather(1, found.top_k_ids)
        # a code's width in nats, at least
        step = 2 * (20 * -exact.log().clamp(-20, -1e-9)).sqrt() / 255 + 0.01
        assert bool(
            (
                (found.top_k_log_probs - exact.log().clamp_min(-LARGEST_NEGATIVE_LOG)).abs() <= step
            ).all()
        )
        tail = (1 - exact.sum(dim=1)).clamp_min(1e-6)
        torch.testing.assert_close(found.log_tail.exp(), tail, atol=2e-3, rtol=0.05)


def test_a_teacher_in_a_gguf_file_scores_as_its_folder_does(world, make, finished, tmp_path):
    file = tmp_path / "teacher.gguf"
    export_gguf(GgufConfig(world.teacher, file, outtype="f32"))
    onpolicy.run(make(tmp_path / "run", teacher=str(file), rounds=1))
    folder = rounds(finished[0])[0]
    count = len(open_dataset(folder / "data").split("train").tokens) - 1
    a, b = (
        Cache(run / "cache").split("train").targets(np.arange(count))
        for run in (folder, rounds(tmp_path / "run")[0])
    )
    assert torch.equal(a.top_k_ids, b.top_k_ids)
    torch.testing.assert_close(a.top_k_log_probs, b.top_k_log_probs, atol=0.05, rtol=0.02)


def test_reverse_kl_of_the_records_is_that_of_the_distributions(world, finished, student):
    """Buckets lose a little of the divergence, never add; codes and the floor of e^-20 are what
    else differs.
    """
    from xinslm.losses.fused import fused_loss

    run, _ = finished
    folder = rounds(run)[0]
    split = open_dataset(folder / "data").split("train")
    rows = PackedDataset(split, 64)
    batch = rows.batch(np.arange(len(rows)))
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    model = load_model(student)
    with torch.no_grad():
        hidden = model.hidden(
            *(torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments))
        )
        hidden = hidden.flatten(0, 1)[torch.from_numpy(chosen)]
        q = torch.log_softmax(model.logits(hidden), dim=1)
        teacher = load_model(world.teacher)
        states = teacher.hidden(
            *(torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments))
        )
        p = torch.log_softmax(teacher.logits(states.flatten(0, 1)[torch.from_numpy(chosen)]), dim=1)
        targets = Cache(folder / "cache").split("train").targets(batch.stream.ravel()[chosen])
        labels = torch.from_numpy(batch.labels.ravel()[chosen])
        loss, _ = fused_loss(
            hidden,
            model.head_weight,
            labels,
            targets,
            LossConfig(0.0, 1.0, divergence="reverse_kl"),
        )
    dense = float((q.exp() * (q - p)).sum(dim=1).mean())
    assert 0 < loss.item() < dense, "the student's tail, one bucket, hides the rest"
    ids, tail = targets.top_k_ids, torch.log1p(-q.gather(1, targets.top_k_ids).exp().sum(dim=1))
    own = q.gather(1, ids)
    buckets = (own.exp() * (own - p.gather(1, ids))).sum(dim=1)
    buckets += tail.exp() * (tail - torch.log1p(-p.gather(1, ids).exp().sum(dim=1)))
    assert loss.item() == pytest.approx(float(buckets.mean()), rel=0.01)


def test_student_comes_nearer_to_its_teacher(make, tmp_path):
    """Measured on texts it has not been trained on: the first step of each round."""
    run = tmp_path / "run"
    onpolicy.run(
        make(run, rounds=3, completions=48, max_new_tokens=30, learning_rate=4e-3, decay_ratio=0.1)
    )
    lines = [line for line in metrics(run) if "kd" in line]
    starts = [
        read_json(run / f"round-{number:03d}" / "round.json")["first_step"] + 1
        for number in (1, 2, 3)
    ]
    fresh = [next(line["kd"] for line in lines if line["step"] == step) for step in starts]
    assert fresh[2] < 0.8 * fresh[0]
    from transformers import AutoModelForCausalLM

    best = open_model(run).path
    assert (
        best == run
        and (run / "checkpoints" / "best").resolve() == (run / "checkpoints" / "last").resolve()
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = load_model(best)
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(best)(ids).logits,
            ours.logits(ours.hidden(ids)),
            atol=1e-4,
            rtol=1e-4,
        )
    validations = [line["step"] for line in metrics(run) if "validation_ce" in line]
    assert validations == [0, starts[1] - 1, starts[2] - 1, lines[-1]["step"]]


def test_learning_rate_spans_all_rounds(finished):
    run, result = finished
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    assert len(rates) == result.state.step and max(rates) == pytest.approx(2e-3)
    second = read_json(run / "round-002" / "round.json")["first_step"]
    assert rates[second] > rates[-1] > 0 and rates[second] > 0.5 * 2e-3, "it does not warm up again"


def test_teacher_and_student_are_never_in_memory_together(make, tmp_path, monkeypatch):
    def alive(kind):
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is kind]

    loads = []
    before = {id(x) for x in alive(Transformer)}  # other tests' fixtures
    real_teacher, real_model = OwnTeacher.__init__, Transformer.__init__

    def teacher(self, *args, **settings):
        real_teacher(self, *args, **settings)
        loads[-1] = "teacher"

    def model(self, *args, **settings):
        assert not [x for x in alive(Transformer) if id(x) not in before and x is not self]
        loads.append("student")
        real_model(self, *args, **settings)

    monkeypatch.setattr(OwnTeacher, "__init__", teacher)
    monkeypatch.setattr(Transformer, "__init__", model)
    onpolicy.run(make(tmp_path / "run", completions=8, max_new_tokens=6))
    assert loads == ["student", "teacher", "student"] * 2


def killed(config, stage, at):
    """Run in a process of its own that kills itself when the listener hears of `stage` for the
    `at`-th time.
    """
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.rollouts import onpolicy
from xinslm.rollouts.onpolicy_config import *
heard = 0
def listen(progress):
    global heard
    heard += progress.stage == {stage!r}
    if heard == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
onpolicy.run({config!r}, listen)
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    ).returncode


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_the_same(make, finished, tmp_path):
    run = tmp_path / "run"
    config = make(run, save_steps=2)
    for stage, at in (("round 1: write", 2), ("cache", 1), ("round 2: learn", 4)):
        assert killed(config, stage, at) == -signal.SIGKILL, stage
    kept = {path: path.stat().st_mtime_ns for path in run.glob("round-*/*/manifest.json")}
    assert len(kept) == 4
    onpolicy.run(config)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), (
        "nothing is made twice"
    )
    ours, theirs = weights(run), weights(finished[0])
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in theirs
    )
    assert metrics(run) == metrics(finished[0])


def test_a_run_folder_is_never_overwritten_by_accident(make, finished, tmp_path):
    run, _ = finished
    before = weights(run)
    with pytest.raises(UsageError, match="already holds this run, finished"):
        onpolicy.run(make(run))
    with pytest.raises(
        UsageError, match=r"unfinished run with another completions, loss.divergence"
    ):
        onpolicy.run(make(run, completions=30, loss=LossConfig(0.0, 1.0, divergence="jsd")))
    with pytest.raises(UsageError, match="force would delete"):
        onpolicy.run(make(run, student=run / "checkpoints" / "best", force=True))
    assert all(torch.equal(before[k], v) for k, v in weights(run).items())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(UsageError, match="already holds something"):
            onpolicy.run(make(tmp_path / "notes", force=force))
    quick = make(tmp_path / "r", rounds=1, completions=4, max_new_tokens=4)
    onpolicy.run(quick)
    onpolicy.run(dataclasses.replace(quick, seed=5, force=True))
    assert "seed: 5\n" in (tmp_path / "r" / "config.yaml").read_text()
    assert "force: false\n" in (tmp_path / "r" / "config.yaml").read_text()


def test_given_texts_are_mixed_in_and_come_first_in_a_cold_start(
    world, make, tmp_path, monkeypatch
):
    run, plans = tmp_path / "run", []
    real = onpolicy.RowSampler

    def note(sources, *args, **settings):
        plans.append([(s.share, s.loss.divergence, len(s.rows)) for s in sources])
        return real(sources, *args, **settings)

    monkeypatch.setattr(onpolicy, "RowSampler", note)
    config = make(
        run,
        rounds=3,
        off_policy_share=0.34,
        mix_data=world.data,
        mix_cache=world.cache,
        mix_share=0.25,
        completions=16,
    )
    onpolicy.run(config)
    given = len(PackedDataset(open_dataset(world.data).split("train"), 64))
    assert plans[0] == [(1.0, "forward_kl", given)]
    assert all(
        plan[1] == (0.25, "forward_kl", given) and plan[0][:2] == (0.75, "reverse_kl")
        for plan in plans[1:]
    )
    assert not (run / "round-001" / "data").exists() and (run / "round-002" / "data").is_dir()
    own = plans[1][0][2]
    assert read_json(run / "round-002" / "round.json")["steps"] == -(-own // 3), (
        "once through the texts, 3 rows a step"
    )


@pytest.mark.parametrize("start", [1.0])
def test_contrast_weighs_the_students_answers_more_and_more(
    world, make, tmp_path, monkeypatch, start
):
    sources = []
    real = onpolicy.RowSampler

    def note(given, *args, **settings):
        sources.append(given)
        assert settings["balanced"]
        return real(given, *args, **settings)

    monkeypatch.setattr(onpolicy, "RowSampler", note)
    run = tmp_path / "run"
    result = onpolicy.run(
        make(
            run,
            contrast=True,
            mix_data=world.data,
            mix_cache=world.cache,
            completions=16,
            contrast_start=start,
        )
    )
    divergences = [(s.loss.divergence, s.loss.skew, s.share) for s in sources[0]]
    assert divergences == [("skew_reverse_kl", 0.1, 0.5), ("skew_kl", 0.1, 0.5)]
    first = read_json(run / "round-002" / "round.json")["first_step"]
    weights_of = [sources[0][0].weight(step) for step in range(first)]
    weights_of += [sources[1][0].weight(step) for step in range(first, result.state.step)]
    assert weights_of[0] == start and weights_of[-1] == pytest.approx(1.5)
    assert all(a < b for a, b in itertools.pairwise(weights_of[:first]))
    assert sources[0][1].weight(3) == 1.0
    assert all(np.isfinite(line["kd"]) and line["kd"] > 0 for line in metrics(run) if "kd" in line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": "http://localhost:1/v1"},
            "is an endpoint, which cannot score the tokens that the student wrote",
        ),
        ({"max_new_tokens": 64}, "leaves no room for a prompt"),
        ({"mix_data": "d"}, "mix_data and mix_cache belong together"),
        ({"contrast": True}, "contrast needs the teacher's answers"),
        ({"off_policy_share": 0.5}, "off_policy_share needs something to train on"),
        ({"off_policy_share": 1.0, "mix_data": "d", "mix_cache": "c"}, "leaves none of 2 rounds"),
        ({"num_epochs": 3.0}, "num_epochs is 3.0, but must be at most 2"),
        ({"mix_share": 1.0}, "mix_share is 1.0, but must be below 1"),
        ({"batch_size": 4, "micro_batch_size": 3}, "must divide batch_size"),
        ({"warmup_ratio": 0.9}, "must not add up to more than 1"),
        ({"loss": LossConfig(0.0, 0.0)}, r"^loss.alpha and loss.beta are both 0"),
        ({"mix_loss": LossConfig(0.0, 0.0)}, r"^mix_loss.alpha and mix_loss.beta are both 0"),
    ],
)
def test_what_cannot_work_is_said_at_once(make, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        onpolicy.run(make(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(
    world, make, tmp_path, shared_data
):
    stranger = shared_data / "models" / "stories260K"
    for changes, message in (
        ({"student": stranger}, "the tokenizer of student"),
        ({"teacher": str(stranger)}, "have different tokenizers"),
        ({"max_seq_length": 90}, "a context of 64 tokens"),
        ({"prompts": world.text}, "not a dataset folder"),
        ({"teacher": "nowhere"}, "there is no model at nowhere"),
    ):
        with pytest.raises(UsageError, match=message):
            onpolicy.run(make(tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


def test_a_report_can_be_made_of_the_folder(finished, tmp_path):
    from xinslm.report import run as report
    from xinslm.report.config import ReportConfig

    run, _ = finished
    report.run(ReportConfig(run=run, output_dir=tmp_path))
    assert "xinslm onpolicy --config" in (tmp_path / "report.html").read_text()
