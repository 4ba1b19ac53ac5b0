"""Losses on hidden states in the training loop: their gradients, schedules, exact resume, and what
is exported.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import training as train
from training import PackedTrainer
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.kinds import CachedTargets
from xinslm.cache.projected_states import CachedHiddenStates
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.distill.auxiliary import HiddenStateLoss, auxiliary_maker
from xinslm.distill.auxiliary_config import ContrastConfig, HiddenConfig
from xinslm.distill.config import DistillConfig
from xinslm.distill.target_sources import LiveTargets
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_config, load_model, open_model
from xinslm.model.transformer import Transformer
from xinslm.report import run as report
from xinslm.report.config import ReportConfig
from xinslm.teachers.huggingface import HuggingFaceTeacher

CPU = torch.device("cpu")
BOTH = {"hidden": HiddenConfig(1.0), "contrast": ContrastConfig(0.05, positions=40)}


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_hidden_states") / "cache"
    score.run(
        CacheConfig(
            str(world.teacher),
            world.data,
            folder,
            max_seq_length=64,
            hidden_state_depths=(0.5, 1.0),
            device="cpu",
        )
    )
    return folder


def trainer(world, cache, micro=None, live=False, **changes):
    config = world.distill(world.folder / "unused", cache=cache, micro_batch_size=micro, **changes)
    rows = PackedDataset(open_dataset(world.data).split("train"), config.max_seq_length)
    model = Transformer(
        dataclasses.replace(
            load_config(world.teacher), hidden_size=36, head_dim=12, num_hidden_layers=3
        )
    )
    model.initialise(torch.Generator().manual_seed(0))
    targets = hidden = None
    if live:
        targets = hidden = LiveTargets(
            HuggingFaceTeacher(open_model(world.teacher)), config.hidden_depths()
        )
    else:
        targets, hidden = (
            CachedTargets(Cache(cache, check_hashes=False).split("train")),
            CachedHiddenStates(Cache(cache, check_hashes=False), "train"),
        )
    auxiliary = (auxiliary_maker(config, hidden) or (lambda *_: None))(model.config, 8, CPU)
    return PackedTrainer(model, config, config.loss, rows, 8, targets, CPU, auxiliary)


def gradients(made):
    """Of the model by name, and of the maps by number; 0 where there is none."""
    named = [
        *made.model.named_parameters(),
        *((f"matrix {n}", p) for n, p in enumerate(made.auxiliary.parameters())),
    ]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_intermediate_layers_are_the_hidden_states_of_transformers(world, gradient_checkpointing):
    from transformers import AutoModelForCausalLM

    model = load_model(world.teacher, gradient_checkpointing=gradient_checkpointing).train()
    ids = torch.arange(40)[None] % 300
    hidden, (first, last) = model.hidden(ids, layers=(1, 2))
    assert torch.equal(hidden, model.hidden(ids)) and torch.equal(hidden, model.model.norm(last))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(world.teacher)(
            ids, output_hidden_states=True
        ).hidden_states
    torch.testing.assert_close(first, expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, expected[2], atol=1e-4, rtol=1e-4)


def oracle(made, batch, chosen, kind):
    """The weighted terms at step 2 of 8 from their formulas, through a plain forward pass."""
    with torch.enable_grad():
        ids, positions, segments = (
            torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments)
        )
        _, layer_outputs = made.model.hidden(ids, positions, segments, layers=(2, 3))
        x = [output.reshape(-1, 36)[torch.from_numpy(chosen)] for output in layer_outputs]
        x = [t / t.pow(2).mean(1, keepdim=True).sqrt() for t in x]
        s, valid = made.auxiliary.source.projected_states(batch, chosen, CPU)
        assert bool(valid.all())
        p = made.auxiliary.parameters()
        if kind == "projector":
            terms = [
                ((t @ p[n].t() - s[n]).norm(dim=1) / s[n].norm(dim=1)).pow(2).mean()
                for n, t in enumerate(x)
            ]
        else:
            terms = []
            for t, theirs in zip(x, s, strict=True):
                a, b = t - t.mean(0), theirs - theirs.mean(0)
                k, m = a @ a.t(), b @ b.t()
                terms.append(1 - (k * m).sum() / (k.pow(2).sum() * m.pow(2).sum()).sqrt())
        labels = torch.from_numpy(batch.labels.ravel()[chosen])
        mapped, theirs = x[1] @ p[-1].t(), s[1]
        cosines = (
            torch.nn.functional.cosine_similarity(
                (mapped - mapped.mean(0))[:, None], (theirs - theirs.mean(0))[None], dim=2
            )
            / 0.07
        )
        allowed = (labels[:, None] != labels[None]) | torch.eye(len(labels), dtype=torch.bool)
        nce = -cosines.diag() + torch.where(allowed, cosines, -torch.inf).logsumexp(1)
        return (
            0.5 * sum(terms) / 2 + 0.5 * 0.05 * nce.mean(),
            sum(terms).item() / 2,
            nce.mean().item(),
        )


@pytest.mark.parametrize("kind", ["projector", "cka"])
def test_gradients_in_the_loop_are_those_of_the_formulas(world, cache, kind):
    changes = {
        "hidden": HiddenConfig(1.0, kind),
        "contrast": ContrastConfig(0.05, positions=10_000),
        "max_grad_norm": 0,
    }
    made, plain = (
        trainer(world, cache, **changes),
        trainer(world, cache, hidden=HiddenConfig(), max_grad_norm=0),
    )
    assert plain.auxiliary is not None and plain.auxiliary.depths(0) == ()
    before = [p.detach().clone() for p in made.auxiliary.parameters()]
    batch = made.rows.batch(rows_at(2, made))
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    expected, hidden, contrast = oracle(made, batch, chosen, kind)
    expected.backward()
    extra = gradients(made)
    base, step = plain.step(2), made.step(2)
    assert step.loss - base.loss == pytest.approx(expected.item(), rel=1e-4)
    assert step.terms == pytest.approx({"hidden": hidden, "contrast": contrast}, rel=1e-4)
    assert (step.ce, step.kd) == (base.ce, base.kd)
    found = gradients(made)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(found[name] - grad, extra[name], atol=1e-6, rtol=1e-3, msg=name)
    for n, old in enumerate(before):
        torch.testing.assert_close(found[f"matrix {n}"], extra[f"matrix {n}"], atol=1e-6, rtol=1e-3)
        assert not torch.equal(made.auxiliary.parameters()[n], old), "the maps are trained"
    assert len(before) == (3 if kind == "projector" else 1)


def rows_at(step, made):
    from xinslm.train.row_sampler import indices_of_step

    return indices_of_step(step, made.config.batch_size, len(made.rows), made.config.seed)


def test_projector_term_does_not_depend_on_how_a_step_is_split(world, cache):
    settings = {"hidden": HiddenConfig(1.0), "max_grad_norm": 0}
    whole, parts = trainer(world, cache, **settings), trainer(world, cache, micro=1, **settings)
    a, b = whole.step(0), parts.step(0)
    assert (a.loss, a.terms["hidden"]) == pytest.approx((b.loss, b.terms["hidden"]), rel=1e-5)
    ours, theirs = gradients(whole), gradients(parts)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("term", ["cka", "contrast"])
def test_statistics_of_a_micro_batch_count_by_their_share_of_the_targets(world, cache, term):
    settings = (
        {"hidden": HiddenConfig(1.0, "cka")} if term == "cka" else {"contrast": ContrastConfig(1.0)}
    )
    made = trainer(world, cache, micro=1, **settings)
    name = "hidden" if term == "cka" else "contrast"
    base = trainer(world, cache, micro=1).step(0)
    expected, count = 0.0, 0
    for index in rows_at(0, made):
        batch = made.rows.batch([index])
        chosen = np.flatnonzero(batch.labels.ravel() >= 0)
        _, layer_outputs = made.model.hidden(
            *(torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments)),
            layers=made.auxiliary.depths(0),
        )
        loss, metrics = made.auxiliary.loss(layer_outputs, batch, chosen, 0, len(chosen))
        assert loss.item() == pytest.approx(metrics[name][0] / metrics[name][1], rel=1e-5)
        expected, count = expected + loss.item() * len(chosen), count + len(chosen)
    assert made.step(0).loss - base.loss == pytest.approx(expected / count, rel=1e-4)


def test_weights_fall_linearly_to_nothing_and_then_cost_nothing(world, cache):
    made = trainer(
        world, cache, hidden=HiddenConfig(2.0, until=0.5), contrast=ContrastConfig(0.4, until=1.0)
    )
    weights = [made.auxiliary.weights(step) for step in range(8)]
    assert [w[0] for w in weights] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0, 0, 0, 0])
    assert [w[1] for w in weights] == pytest.approx([0.4 * (1 - n / 8) for n in range(8)])
    assert made.auxiliary.depths(3) == (2, 3) and made.auxiliary.depths(4) == (3,)
    late = trainer(world, cache, **BOTH)
    moved = [p.detach().clone() for p in late.auxiliary.parameters()]
    step = late.step(6)
    assert step.terms == {} and step.loss == trainer(world, cache).step(6).loss
    assert all(torch.equal(a, b) for a, b in zip(moved, late.auxiliary.parameters(), strict=True))


def test_live_teacher_and_cache_give_the_same_terms(world, cache):
    a, b = trainer(world, cache, **BOTH).step(0), trainer(world, cache, live=True, **BOTH).step(0)
    assert a.terms.keys() == b.terms.keys() == {"hidden", "contrast"}
    assert a.terms["hidden"] == pytest.approx(b.terms["hidden"], rel=2e-3)
    # This teacher's states are almost the same everywhere: what they differ in is coarse in 8 bits.
    assert a.terms["contrast"] == pytest.approx(b.terms["contrast"], rel=0.05)


def test_positions_without_a_teachers_token_have_no_part(world, cache, tmp_path):
    """Their projected hidden states can be anything: neither value nor gradient may see them."""
    folder = shutil.copytree(cache, tmp_path / "c")
    source = CachedHiddenStates(Cache(folder, check_hashes=False), "train")
    batch = PackedDataset(open_dataset(world.data).split("train"), 64).batch([0, 1, 2, 3])
    chosen = np.flatnonzero(batch.labels.ravel() >= 0)
    uncovered = batch.stream.ravel()[chosen[::3]]
    for path, start in zip(
        sorted(folder.glob("train/*.hidden_states.bin")), source.starts, strict=True
    ):
        array = np.memmap(path, dtype=source.layout.dtype, mode="r+")
        here = uncovered[(uncovered >= start) & (uncovered < start + len(array))] - start
        array["scales"][here] = 0
        array.flush()
    made = trainer(world, folder, **BOTH)
    inputs = [torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.segments)]
    _, layer_outputs = made.model.hidden(*inputs, layers=(2, 3))
    poisoned = [output.detach().clone() for output in layer_outputs]
    for output in poisoned:
        output.view(-1, 36)[chosen[::3]] = float("nan")
        output.requires_grad_()
    loss, metrics = made.auxiliary.loss(poisoned, batch, chosen, 0, len(chosen))
    assert metrics["hidden"][1] == len(chosen) - len(chosen[::3])
    loss.backward()
    assert np.isfinite(loss.item())
    assert all(bool((output.grad.view(-1, 36)[chosen[::3]] == 0).all()) for output in poisoned)


def test_a_run_learns_to_match_and_exports_a_llama_alone(world, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    losses = {"hidden": HiddenConfig(1.0, until=1.0), "contrast": ContrastConfig(1.0, positions=64)}
    train.run(world.distill(run, cache=cache, max_steps=24, learning_rate=1e-2, **losses))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    errors = [line["hidden"] for line in lines if "hidden" in line]
    contrasts = [line["contrast"] for line in lines if "contrast" in line]
    assert len(errors) == 24 and errors[-1] < 0.6 * errors[0]
    assert len(contrasts) == 12 and np.mean(contrasts[-3:]) < np.mean(contrasts[:3]) - 0.1
    last, best = run / "checkpoints" / "last", run / "checkpoints" / "best"
    llama = set(Transformer(load_config(last)).state_dict())
    for folder in (last, best):
        assert load_file(folder / "model.safetensors").keys() == llama
        AutoModelForCausalLM.from_pretrained(folder)
    assert {name.partition(".")[0] for name in load_file(last / "auxiliary.safetensors")} == {
        "matrix",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert last.resolve() == best.resolve() or not (best / "auxiliary.safetensors").exists()
    page = report.run(ReportConfig(run)).html.read_text()
    assert (
        "Hidden states compared with the teacher&#x27;s" in page
        and "Contrastive loss on hidden states" in page
    )


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in train.MEASURED} for line in lines]


@pytest.mark.parametrize(("at_step", "live"), [(5, False), (4, True)])
def test_a_killed_run_continues_bit_for_bit(world, cache, tmp_path, at_step, live):
    settings = {
        "hidden": HiddenConfig(1.0, until=0.8),
        "contrast": ContrastConfig(0.05, positions=32, until=1.0),
    }
    settings |= {"teacher": str(world.teacher), "micro_batch_size": 2} if live else {"cache": cache}
    whole, broken = (
        world.distill(tmp_path / "whole", **settings),
        world.distill(tmp_path / "broken", **settings),
    )
    train.run(whole)
    code = f"""
import os, signal
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.distill import run as train
from xinslm.distill.config import DistillConfig
from xinslm.train.config import PretrainConfig
from xinslm.distill.config import *
from xinslm.losses.config import LossConfig
def listen(progress):
    if progress.done == {at_step} and 'loss' in progress.values:
        os.kill(os.getpid(), signal.SIGKILL)
train.run({broken!r}, listen)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    train.run(broken)
    for name in ("model.safetensors", "auxiliary.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / "last" / name) for run in ("whole", "broken")
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")


def test_a_checkpoint_without_its_maps_is_refused(world, cache, tmp_path):
    config = world.distill(tmp_path / "run", cache=cache, **BOTH)

    def stop(progress):
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(config, stop)
    maps = tmp_path / "run" / "checkpoints" / "last" / "auxiliary.safetensors"
    whole = maps.read_bytes()
    maps.unlink()
    with pytest.raises(XinslmError, match=r"auxiliary.safetensors is missing or damaged.*--force"):
        train.run(config)
    maps.write_bytes(whole)
    with pytest.raises(UsageError, match=r"holds an unfinished run with another hidden\.weight"):
        train.run(dataclasses.replace(config, hidden=HiddenConfig(0.7)))
    train.run(config)


def test_weights_without_hidden_states_are_refused_and_say_what_to_do(world, cache, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"has no projected hidden states, which hidden.weight and contrast.weight",
    ):
        train.run(world.distill(tmp_path / "a", hidden=HiddenConfig(1.0)))
    with pytest.raises(
        UsageError,
        match=r"no projected hidden states of relative depth 0.2 \(block 1 of 5\)|block 1 of 2",
    ):
        train.run(
            world.distill(
                tmp_path / "b",
                cache=shallow(world, tmp_path),
                hidden=HiddenConfig(1.0, depths=(0.2, 1.0)),
            )
        )
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert auxiliary_maker(world.distill(tmp_path / "p"), None) is None
    assert isinstance(trainer(world, cache, **BOTH).auxiliary, HiddenStateLoss)


def shallow(world, tmp_path):
    folder = tmp_path / "shallow"
    score.run(
        CacheConfig(
            str(world.teacher),
            world.data,
            folder,
            max_seq_length=64,
            hidden_state_depths=(1.0,),
            device="cpu",
        )
    )
    return folder


def test_projected_states_can_come_from_another_cache_of_the_same_data(world, cache, tmp_path):
    run = tmp_path / "run"
    train.run(world.distill(run, hidden_states=cache, max_steps=3, hidden=HiddenConfig(1.0)))
    train.run(world.distill(tmp_path / "one", cache=cache, max_steps=3, hidden=HiddenConfig(1.0)))
    assert metrics(run) == metrics(tmp_path / "one")
    assert "hidden_states" in json.loads((run / "run.json").read_text())["inputs"]
    with pytest.raises(UsageError, match="hidden_states has no effect"):
        DistillConfig(
            data_path=world.data, output_dir=run, cache=cache, hidden_states=cache
        ).check()
