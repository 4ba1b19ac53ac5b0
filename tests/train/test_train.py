"""The training loop: exact resume, accumulation, schedules, and every refusal of a run folder."""

import copy
import dataclasses
import errno
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import training as train
from training import PackedTrainer
from xinslm.cache.folder import Cache
from xinslm.cache.kinds import CachedTargets
from xinslm.config import from_yaml
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.distill.config import DistillConfig
from xinslm.distill.target_sources import LiveTargets
from xinslm.errors import UsageError, XinslmError
from xinslm.losses.config import LossConfig
from xinslm.model.config import ModelConfig
from xinslm.model.files import load_config, load_model, open_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train import checkpoint
from xinslm.train.config import PretrainConfig
from xinslm.train.loop import learning_rate
from xinslm.train.row_sampler import indices_of_step

CPU = torch.device("cpu")


def weights(run, which="last"):
    return load_file(run / "checkpoints" / which / "model.safetensors")


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in train.MEASURED} for line in lines]


def assert_same_run(a, b):
    ours, theirs = weights(a), weights(b)
    assert (
        all(torch.equal(ours[name], theirs[name]) for name in theirs)
        and ours.keys() == theirs.keys()
    )
    assert metrics(a) == metrics(b)


def test_every_row_comes_once_an_epoch_whatever_the_batch():
    taken = np.concatenate([indices_of_step(step, 4, 10, seed=3) for step in range(5)])
    assert Counter(taken[:10].tolist()) == Counter(taken[10:].tolist()) == Counter(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert indices_of_step(1, 4, 10, 3).tolist() == taken[4:8].tolist()


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.2) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    assert learning_rate(0, 1, 1.0, 0.05, 0.3) == 1.0


def trainer(world, micro=None, source=None, loss=None, model=None, validation=None, **changes):
    config = world.distill(world.folder / "unused", micro_batch_size=micro, **changes)
    rows = PackedDataset(open_dataset(world.data).split("train"), config.max_seq_length)
    if model is None:
        model = Transformer(
            dataclasses.replace(load_config(world.teacher), hidden_size=36, head_dim=12)
        )
        model.initialise(torch.Generator().manual_seed(0))
    return PackedTrainer(
        model, config, loss or config.loss, rows, 8, source, CPU, validation=validation
    )


def cached(world):
    return CachedTargets(Cache(world.cache).split("train"))


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_gives_the_step_of_the_whole_batch(world, micro):
    """Rows hold different numbers of targets, so a mean of micro-batch means would differ."""
    whole, parts = (
        trainer(world, source=cached(world)),
        trainer(world, micro=micro, source=cached(world)),
    )
    a, b = whole.step(0), parts.step(0)
    assert (a.loss, a.ce, a.kd, a.grad_norm) == pytest.approx(
        (b.loss, b.ce, b.kd, b.grad_norm), rel=1e-5
    )
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_cache_records_follow_their_rows(world):
    """A cache indexed by step would pair shuffled rows with other rows' teachers."""
    source = cached(world)
    rows = PackedDataset(open_dataset(world.data).split("train"), 64)
    one, two = rows.batch([5, 2]), rows.batch([2, 5])
    pick = [np.flatnonzero(batch.labels.ravel() >= 0) for batch in (one, two)]
    a, b = source.targets(one, pick[0], CPU), source.targets(two, pick[1], CPU)
    first = int((one.labels[0] >= 0).sum())
    assert torch.equal(a.top_k_ids, torch.cat((b.top_k_ids[-first:], b.top_k_ids[:-first])))
    assert bool(a.valid_mask.all())


def test_live_teacher_sees_each_document_alone(world):
    from transformers import AutoModelForCausalLM

    teacher = HuggingFaceTeacher(open_model(world.teacher))
    dataset = open_dataset(world.data)
    rows = PackedDataset(dataset.split("train"), 64)
    batch = rows.batch([0, 7])
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    logits = LiveTargets(teacher).targets(batch, chosen, CPU).logits(slice(0, len(chosen)))
    reference = AutoModelForCausalLM.from_pretrained(world.teacher)
    for index in range(0, len(chosen), 17):
        row, column = divmod(int(chosen[index]), 64)
        start = column - batch.positions[row, column]
        ids = torch.from_numpy(batch.input_ids[row, start : column + 1])[None]
        with torch.no_grad():
            expected = reference(ids).logits[0, -1]
        torch.testing.assert_close(logits[index], expected, atol=2e-5, rtol=1e-4)


def test_cached_kd_is_the_kl_over_buckets_of_the_teachers_logits(world):
    """Top k and tail, from transformers' own logits and the student's: half the KD would show."""
    from transformers import AutoModelForCausalLM

    made = trainer(world, source=cached(world), loss=LossConfig(0.0, 1.0, tail_weight=0.0))
    batch = made.rows.batch(indices_of_step(0, 4, len(made.rows), made.config.seed))
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    ids, positions, segments = (
        torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments)
    )
    reference = AutoModelForCausalLM.from_pretrained(world.teacher)
    total = 0.0
    with torch.no_grad():
        student = made.model.logits(made.model.hidden(ids, positions, segments)).flatten(0, 1)
        top = cached(world).targets(batch, chosen, CPU).top_k_ids
        for at, place in enumerate(chosen):
            row, column = divmod(int(place), 64)
            start = column - batch.positions[row, column]
            teacher = reference(ids[row : row + 1, start : column + 1]).logits[0, -1]
            p, q = (
                torch.cat((x[top[at]], 1 - x[top[at]].sum(0, keepdim=True)))
                for x in (teacher.softmax(0), student[place].softmax(0))
            )
            total += (p * (p / q).log()).sum().item()
    assert made.step(0).kd == pytest.approx(total / len(chosen), rel=0.02)


def test_prompts_get_no_gradient_and_no_weight_in_the_mean(world, tmp_path):
    """Against cross-entropy of each chat alone, with transformers' ignore index on the prompt."""
    lines = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.run(
        PrepareConfig(
            data_path=(str(tmp_path / "chat.jsonl"),),
            tokenizer_path=world.tokenizer,
            output_dir=tmp_path / "data",
            validation_fraction=0.0,
        )
    )
    split = open_dataset(tmp_path / "data").split("train")
    tokenizer = load_tokenizer(world.tokenizer)
    rows = PackedDataset(split, 64)
    model = Transformer(
        dataclasses.replace(load_config(world.teacher), hidden_size=36, head_dim=12)
    )
    model.initialise(torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model)
    config = world.pretrain(tmp_path / "r", batch_size=len(rows), max_grad_norm=0)
    made = PackedTrainer(model, config, LossConfig(1.0, 0.0), rows, 2, None, CPU)
    step = made.step(0)
    total, count = torch.zeros(()), 0
    for begin, end in itertools.pairwise(split.documents.tolist()):
        ids = torch.from_numpy(np.asarray(split.tokens[begin:end]).astype(np.int64))
        said = re.search(r"It is \d+\.", tokenizer.decode(ids.tolist())).group(0)
        answer = tokenizer.encode(said)
        first = next(n for n in range(len(ids)) if ids[n : n + len(answer)].tolist() == answer)
        labels = torch.full_like(ids, -100)
        answered = slice(first, first + len(answer) + 1)  # and the end token
        labels[answered] = ids[answered]
        logits = reference.logits(reference.hidden(ids[None, :-1]))[0]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum")
        count += len(answer) + 1
    (total / count).backward()
    assert step.tokens == count and step.loss == pytest.approx((total / count).item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def run_in_subprocess(config, action, at_step):
    """Run the stage in a process of its own that signals itself when the listener hears of
    `at_step`.
    """
    code = f"""
import os, signal, sys
from pathlib import Path, PosixPath
import torch
import torch.nn.functional as F
torch.set_num_threads(1)
from xinslm.distill import run as train
from xinslm.distill.config import DistillConfig
from xinslm.train.config import PretrainConfig
from xinslm.distill.config import *
from xinslm.losses.config import LossConfig
from xinslm.cli.main import _explain
def listen(progress):
    if progress.done == {at_step} and 'loss' in progress.values:
        os.kill(os.getpid(), signal.{action})
try:
    train.run({config!r}, listen)
except BaseException as error:
    sys.exit(_explain(error))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("action", "at_step"), [("SIGKILL", 2), ("SIGKILL", 5), ("SIGKILL", 7), ("SIGINT", 5)]
)
def test_a_stopped_run_continues_bit_for_bit(world, tmp_path, action, at_step):
    whole, broken = world.distill(tmp_path / "whole"), world.distill(tmp_path / "broken")
    train.run(whole)
    done = run_in_subprocess(broken, action, at_step)
    if action == "SIGINT":
        assert done.returncode == 130
        assert (
            done.stderr
            == "error: interrupted after step 5 of 8; the run is saved. The same command "
            "continues it\n"
        )
    else:
        assert done.returncode == -signal.SIGKILL
        with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')
    notes = []
    train.run(broken, lambda p: notes.append(p.note))
    assert any("continuing after step" in note for note in notes) == (at_step > 3)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_distilling_approaches_the_teacher_and_leaves_a_standard_model(world, tmp_path):
    from transformers import AutoModelForCausalLM

    result = train.run(world.distill(tmp_path / "r", max_steps=16, learning_rate=5e-3))
    lines = metrics(tmp_path / "r")
    divergences = [line["validation_kd"] for line in lines if "validation_kd" in line]
    assert divergences[-1] < divergences[0] - 0.1
    assert result.state.best_validation == min(
        line["validation_ce"] for line in lines if "validation_ce" in line
    )
    best = tmp_path / "r" / "checkpoints" / "best"
    theirs, ours = AutoModelForCausalLM.from_pretrained(best), load_model(best)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, ours.logits(ours.hidden(ids)), atol=1e-5, rtol=1e-4
        )
    expected = {name for name in Transformer(load_config(best)).state_dict()}
    assert set(load_file(best / "model.safetensors")) == expected, "nothing but the LLaMA keys"


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(world, tmp_path):
    """A rate that ruins the model after a few steps must leave the early one as best."""
    run = tmp_path / "r"
    train.run(
        world.pretrain(
            run,
            max_steps=12,
            learning_rate=0.6,
            eval_steps=1,
            warmup_ratio=0.9,
            decay_ratio=0,
        )
    )
    validations = {
        line["step"]: line["validation_ce"] for line in metrics(run) if "validation_ce" in line
    }
    best = min(validations, key=validations.get)
    assert best < 12
    rows = PackedDataset(open_dataset(world.data).split("validation"), 64)
    again = trainer(
        world,
        model=load_model(run / "checkpoints" / "best"),
        loss=LossConfig(1.0, 0.0),
        validation=(rows, None),
    )
    assert again.validate().ce == pytest.approx(validations[best], rel=1e-5)


def test_written_config_runs_again(world, tmp_path):
    run = tmp_path / "a"
    train.run(world.distill(run))
    config = from_yaml(DistillConfig, [run / "config.yaml"], None)
    train.run(dataclasses.replace(config, output_dir=tmp_path / "b"))
    assert_same_run(run, tmp_path / "b")


def test_run_folders_are_never_overwritten_by_accident(world, tmp_path):
    run = tmp_path / "r"
    train.run(world.distill(run))
    before = weights(run)
    with pytest.raises(UsageError, match="already holds this run, finished"):
        train.run(world.distill(run))
    with pytest.raises(
        UsageError, match=r"holds an unfinished run with another learning_rate, loss.alpha"
    ):
        train.run(world.distill(run, learning_rate=1e-4, loss=LossConfig(alpha=0.3)))
    assert all(torch.equal(before[k], v) for k, v in weights(run).items())
    train.run(world.distill(run, learning_rate=1e-4, force=True))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    for force, advice in ((False, "Choose another"), (True, "--force leaves it")):
        with pytest.raises(UsageError, match=f"already holds something.*{advice}"):
            train.run(world.distill(tmp_path / "notes", force=force))
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"


def test_force_deletes_nothing_before_the_new_run_can_begin(world, tmp_path):
    run = tmp_path / "r"
    train.run(world.distill(run, max_steps=2))
    before = weights(run)
    for broken in (
        dataclasses.replace(world.distill(run, force=True), data_path=tmp_path / "nowhere.jsonl"),
        world.distill(run, force=True, num_kv_heads=5),
        world.distill(run, force=True, batch_size=5000),
        world.pretrain(run, force=True, init_from=run / "checkpoints" / "best"),
    ):
        with pytest.raises(UsageError):
            train.run(broken)
        assert all(torch.equal(before[k], v) for k, v in weights(run).items())
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_folder_with_somebody_elses_config_is_never_replaced(world, tmp_path):
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "config.yaml").write_text("name: mine\n")
    with pytest.raises(UsageError, match="already holds something"):
        train.run(world.distill(tmp_path / "project", force=True))
    assert (tmp_path / "project" / "src").is_dir()


def test_force_is_not_written_into_the_runs_own_settings(world, tmp_path):
    """Otherwise continuing from config.yaml would wipe the run."""
    run = tmp_path / "r"
    train.run(world.distill(run, force=True))
    assert from_yaml(DistillConfig, [run / "config.yaml"], None).force is False


def test_raw_text_run_that_never_began_can_be_started_again_with_other_settings(world, tmp_path):
    run = tmp_path / "r"
    settings = {**world.settings, "max_steps": 2, "vocab_size": 300}
    with pytest.raises(UsageError, match="num_key_value_heads"):
        train.run(
            PretrainConfig(data_path=world.text, output_dir=run, **{**settings, "num_kv_heads": 5})
        )
    assert (run / "data" / "manifest.json").is_file(), "what was prepared is kept"
    train.run(
        PretrainConfig(data_path=world.text, output_dir=run, **{**settings, "vocab_size": 320})
    )
    assert load_config(run / "checkpoints" / "best").vocab_size == 320


@pytest.mark.parametrize("text", ["ab", "ab " * 30])
def test_too_little_text_leaves_no_folder(world, tmp_path, text):
    (tmp_path / "two.txt").write_text(text)
    config = PretrainConfig(
        data_path=tmp_path / "two.txt", output_dir=tmp_path / "r", **world.settings
    )
    with pytest.raises(UsageError, match=r"two\.txt has only 1 to train on: give more text"):
        train.run(config)
    assert [p.name for p in tmp_path.iterdir()] == ["two.txt"]


def test_a_run_is_not_written_into_the_text_it_reads(world, tmp_path):
    """Its tokenizer.json and metrics.jsonl would be read by the next run."""
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(world.text, texts / "a.jsonl")
    for output, message in ((texts / "run", "lies in"), (texts, "is the input")):
        for force in (False, True):
            with pytest.raises(UsageError, match=message):
                train.run(
                    PretrainConfig(
                        data_path=texts, output_dir=output, force=force, **world.settings
                    )
                )
    assert [p.name for p in texts.iterdir()] == ["a.jsonl"]


def test_a_continued_run_may_log_and_split_its_batches_otherwise(world, tmp_path):
    run, whole = world.distill(tmp_path / "r"), world.distill(tmp_path / "whole")
    train.run(whole)
    run_in_subprocess(run, "SIGKILL", 5)
    train.run(dataclasses.replace(run, micro_batch_size=2, save_steps=1))
    ours, theirs = weights(tmp_path / "r"), weights(tmp_path / "whole")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-3)


def test_best_is_linked_before_the_state_that_knows_of_it(world, tmp_path, monkeypatch):
    """A kill between the two links must not leave a `last` whose best loss belongs to no
    checkpoint.
    """
    linked = []
    real = checkpoint._point
    monkeypatch.setattr(
        checkpoint, "_point", lambda link, target: linked.append(link.name) or real(link, target)
    )
    train.run(world.distill(tmp_path / "r", max_steps=2))
    assert linked == ["best", "last"]


def test_live_teacher_beside_a_student_with_padded_rows(world, tmp_path):
    wide = tmp_path / "wide"
    model = Transformer(dataclasses.replace(load_config(world.teacher), vocab_size=416))
    model.initialise(torch.Generator().manual_seed(0))
    save_model(model, wide)
    from xinslm.tokenizer.load import load_tokenizer

    load_tokenizer(world.teacher).save(wide)
    config = DistillConfig(
        data_path=world.data,
        output_dir=tmp_path / "r",
        teacher=str(world.teacher),
        init_from=wide,
        max_seq_length=64,
        batch_size=4,
        max_steps=2,
        device="cpu",
    )
    assert train.run(config).state.step == 2


def test_a_loss_that_is_not_finite_stops_at_once_and_is_placed(world, tmp_path):
    broken = tmp_path / "broken"
    model = load_model(world.teacher)
    save_model(model, broken)
    from xinslm.tokenizer.load import load_tokenizer

    load_tokenizer(world.teacher).save(broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = PretrainConfig(
        data_path=world.data,
        output_dir=tmp_path / "r",
        init_from=broken,
        max_seq_length=64,
        batch_size=4,
        max_steps=3,
    )
    with pytest.raises(XinslmError, match=r"the loss is nan at step 1, on training documents \d+"):
        train.run(config)
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_full_disk_while_saving_keeps_the_last_checkpoint(world, tmp_path, monkeypatch):
    run, saves = tmp_path / "r", []
    real = checkpoint.save_file

    def full(*args, **kwargs):
        saves.append(1)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train.run(world.distill(run))
    monkeypatch.undo()
    assert (run / "checkpoints" / "last").resolve().name == "step-000003"
    train.run(world.distill(run))
    train.run(world.distill(tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", run)


def test_stages_that_do_not_fit_are_refused_by_name(world, tmp_path):
    other = tmp_path / "other"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=world.tokenizer, output_dir=other, seed=9
        )
    )
    config = dataclasses.replace(world.distill(tmp_path / "r"), data_path=other)
    with pytest.raises(UsageError, match=r"was made from another dataset than .*other"):
        train.run(config)
    with pytest.raises(UsageError, match=r"batch_size is 5000 rows of 64 tokens, but .* has only"):
        train.run(world.distill(tmp_path / "r", batch_size=5000))
    with pytest.raises(UsageError, match=r"mode full, but cache .* stores the normaliser for 2.0"):
        train.run(world.distill(tmp_path / "r", loss=LossConfig(0.1, 0.9, 3.0, "full", 0.0)))
    with pytest.raises(UsageError, match="is not a cache folder: it has no manifest"):
        train.run(world.distill(tmp_path / "r", cache=world.folder))
    with pytest.raises(
        UsageError, match=r"num_key_value_heads .5. must divide num_attention_heads"
    ):
        train.run(world.distill(tmp_path / "r", num_kv_heads=5))
    with pytest.raises(UsageError, match=r"micro_batch_size .3. must divide batch_size .4."):
        train.run(world.distill(tmp_path / "r", micro_batch_size=3))


def test_cache_of_another_teacher_is_refused_by_name(world, tmp_path):
    revised = tmp_path / "revised"
    shutil.copytree(world.teacher, revised)
    tensors = load_file(revised / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, revised / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"made by another teacher, or another revision of it, than .*revised"
    ):
        train.run(world.distill(tmp_path / "a", teacher=str(revised), cache=world.cache))
    train.run(world.distill(tmp_path / "b", teacher=str(world.teacher), cache=world.cache))


def test_pads_change_nothing(world, tmp_path):
    """Wider rows hold other numbers of pads and other neighbours; the loss of each document stays
    what it was.
    """
    lines = [
        json.dumps({"text": f"The {word} is here."}) + "\n"
        for word in ("cat", "dog", "little bird", "tall tree")
    ]
    (tmp_path / "short.jsonl").write_text("".join(lines))
    prepare.run(
        PrepareConfig(
            data_path=(str(tmp_path / "short.jsonl"),),
            tokenizer_path=world.tokenizer,
            output_dir=tmp_path / "data",
            validation_fraction=0.25,
        )
    )
    split = open_dataset(tmp_path / "data").split("train")
    model = load_model(world.teacher)
    narrow, wide = PackedDataset(split, 20), PackedDataset(split, 64)
    assert len(narrow) > len(wide) == 1
    losses = [
        trainer(world, model=model, loss=LossConfig(1.0, 0.0), validation=(rows, None)).validate()
        for rows in (narrow, wide)
    ]
    assert losses[0].ce == pytest.approx(losses[1].ce, rel=1e-6)


def test_live_teacher_with_another_tokenizer_is_refused(world, tmp_path):
    from xinslm.tokenizer.bpe import BPETokenizer

    folder = tmp_path / "foreign"
    tokenizer = BPETokenizer(vocab_size=300)
    tokenizer.train(["some other text about other things"])
    model = Transformer(ModelConfig(300, 32, 64, 1, 2, 2, 16))
    save_model(model, folder)
    tokenizer.save(folder)
    with pytest.raises(UsageError, match="must share the dataset's tokenizer"):
        train.run(world.distill(tmp_path / "r", teacher=str(folder)))


def test_raw_text_trains_a_tokenizer_and_a_model_with_the_documented_flags(world, tmp_path):
    from xinslm.cli.main import main

    words = (
        f"pretrain --data_path {world.text} --output_dir {tmp_path / 'r'} --vocab_size 350 "
        "--hidden_size 32 "
        "--num_layers 2 --num_heads 2 --intermediate_size 64 --max_seq_length 64 --batch_size 4 "
        "--num_epochs 0.2 "
        f"--learning_rate 1e-3 --seed 7 --device cpu"
    ).split()
    assert main(words) == 0
    config = load_config(tmp_path / "r" / "checkpoints" / "best")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.head_dim) == (
        350,
        32,
        2,
        16,
    )
    assert (config.bos_token_id, config.pad_token_id) == (346, 349)
    assert main(words) == 2, "a finished run is not trained again"


@pytest.mark.parametrize(("steps", "validations"), [(6, 6), (25, 13), (40, 10)])
def test_a_short_run_has_at_least_ten_validations(world, tmp_path, steps, validations):
    """Or one a step, if there are fewer."""
    changes = {"eval_steps": None, "logging_steps": None, "max_eval_samples": 4}
    train.run(world.distill(tmp_path / "run", max_steps=steps, save_steps=100, **changes))
    lines = metrics(tmp_path / "run")
    assert sum("validation_ce" in line for line in lines) == validations
    assert sum("loss" in line for line in lines) == steps, "a short run logs each step"
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("other_load" in json.loads(line) for line in logged) == steps


def test_a_run_may_continue_on_another_machine(world, tmp_path):
    config = world.distill(tmp_path / "run")
    train.run(world.distill(tmp_path / "whole"))
    run_in_subprocess(config, "SIGKILL", 5)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    facts |= {"machine": "another", "date": "2001-01-01", "warnings": ["of then"]}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    train.run(config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (kept["machine"], kept["warnings"]) == ("another", ["of then"]), "where it began"
