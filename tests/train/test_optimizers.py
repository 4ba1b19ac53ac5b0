"""Optimisers: AdamW as PyTorch's, Muon against the polar factor, 8-bit states and bfloat16 weights
near float32.
"""

import dataclasses
import shutil

import pytest
import torch

import training as train
from training import PackedTrainer
from xinslm.data.dataset import open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.errors import UsageError, XinslmError
from xinslm.losses.config import LossConfig
from xinslm.model.files import load_config, read_tensors
from xinslm.model.param_dtype import cast_matrices_to_bfloat16
from xinslm.model.transformer import Transformer
from xinslm.train import loop
from xinslm.train.config import PretrainConfig
from xinslm.train.optimizers import Optimizer, make_optimizer, orthogonalize

CPU = torch.device("cpu")
OPTIMIZERS = ["adamw", "adamw8bit", "muon"]
WEIGHTS = ["float32", "bfloat16"]


def student(world, **changes) -> Transformer:
    config = dataclasses.replace(
        load_config(world.teacher), hidden_size=96, head_dim=32, intermediate_size=128
    )
    model = Transformer(dataclasses.replace(config, **changes))
    model.initialise(torch.Generator().manual_seed(0))
    return model


def trainer(world, model: Transformer | None = None, steps: int = 40, **changes) -> PackedTrainer:
    config = world.pretrain(world.folder / "unused", max_steps=steps, **changes)
    model = model if model is not None else student(world)
    if config.param_dtype == "bfloat16":
        cast_matrices_to_bfloat16(model)
        model.compute_dtype = torch.float32
    rows = PackedDataset(open_dataset(world.data).split("train"), config.max_seq_length)
    return PackedTrainer(model, config, LossConfig(1.0, 0.0), rows, steps, None, CPU)


def one_weight(weight: torch.Tensor, rule: str, **settings) -> tuple[torch.nn.Parameter, Optimizer]:
    config = PretrainConfig(data_path="d", output_dir="o", **settings)
    parameter = torch.nn.Parameter(weight)
    return parameter, Optimizer([("weight", parameter)], {"weight": rule}, config)


def test_adamw_is_pytorchs_bit_for_bit(world) -> None:
    ours = trainer(world)
    model = student(world)
    matrices, vectors = (
        [p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), fused=True)
    for number in range(3):
        ours.step(number)
        for mine, its in zip(ours.model.parameters(), model.parameters(), strict=True):
            its.grad = mine.grad
        for group in theirs.param_groups:
            group["lr"] = ours.optimizer.param_groups[0]["lr"]
        theirs.step()
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours.model.parameters(), model.parameters(), strict=True)
        )


def test_adamw_in_pieces_is_pytorchs() -> None:
    """What bfloat16 weights run through, on float32 weights of more than one piece."""
    torch.manual_seed(0)
    start = torch.randn(300, 450)
    ours, mine = one_weight(start.clone(), "adamw", learning_rate=1e-2)
    theirs = torch.nn.Parameter(start.clone())
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        gradient = torch.randn(300, 450)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        state = mine.state_of(ours)
        state["step"] += 1
        mine._adamw(ours, state, mine.param_groups[0], 1.0)
        other.step()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for shape in ((40, 90), (90, 40), (64, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        ours = orthogonalize(matrix)
        assert ours.shape == shape
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.4 and values.max() < 1.3
        inside = left.T @ ours @ right.T  # the polar factor's axes: nothing beside the diagonal
        assert (inside - torch.diag(inside.diag())).abs().max() < 1e-4


def test_muon_is_pytorchs_within_its_bfloat16() -> None:
    torch.manual_seed(0)
    start = torch.randn(48, 96)
    ours, mine = one_weight(start.clone(), "muon", learning_rate=1e-2)
    theirs = torch.nn.Parameter(start.clone())
    other = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(48, 96)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_muon_takes_hidden_matrices_only(world) -> None:
    model = student(world, tie_word_embeddings=False)
    optimizer = make_optimizer(model, world.pretrain(world.folder / "unused", optimizer="muon"))
    rules = {optimizer.names[p]: optimizer.group_of[p]["rule"] for p in model.parameters()}
    assert {name for name, rule in rules.items() if rule == "muon"} == {
        name for name in rules if name.endswith("_proj.weight")
    }
    decayed = {
        optimizer.names[p] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    assert decayed == {name for name in rules if "norm" not in name}


def losses(world, steps: int = 60, **changes) -> list[float]:
    run = trainer(world, steps=steps, **changes)
    return [run.step(number).loss for number in range(steps)]


def test_8_bit_states_and_bfloat16_weights_follow_the_float32_curve(world) -> None:
    plain = torch.tensor(losses(world))
    assert plain[-1] < plain[0] - 1
    for changes in ({"optimizer": "adamw8bit"}, {"param_dtype": "bfloat16"}):
        other = torch.tensor(losses(world, **changes))
        assert (other - plain).abs().mean() < 0.03, changes
        assert abs(other[-10:].mean() - plain[-10:].mean()) < 0.03, changes


def test_small_steps_move_bfloat16_weights_only_because_they_are_rounded_by_chance() -> None:
    """Steps of 1e-4 on weights of 1: a hundredth of bfloat16's last place. To nearest, nothing
    would ever move.
    """
    ours, mine = one_weight(
        torch.ones(64, 64).bfloat16(), "adamw", learning_rate=1e-4, weight_decay=0.0
    )
    nearest, exact = torch.ones(64, 64).bfloat16(), torch.ones(64, 64)
    for _ in range(200):
        ours.grad = torch.ones(64, 64).bfloat16()
        mine.step()
        nearest = (nearest.float() - 1e-4).bfloat16()
        exact -= 1e-4
    assert bool((nearest == 1).all())
    assert abs(ours.float().mean() - exact.mean()) < 3e-4


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stepping_in_the_backward_pass_is_the_ordinary_step(
    world, optimizer: str, weights: str
) -> None:
    ordinary = trainer(world, optimizer=optimizer, param_dtype=weights, max_grad_norm=0)
    inside = trainer(
        world,
        optimizer=optimizer,
        param_dtype=weights,
        max_grad_norm=1e9,
        optimizer_in_backward=True,
    )
    for number in range(3):
        a, b = ordinary.step(number), inside.step(number)
        assert (a.loss, a.learning_rate) == (b.loss, b.learning_rate)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
        assert all(p.grad is None for p in inside.model.parameters())
    for (name, p), q in zip(
        ordinary.model.named_parameters(), inside.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_tied_embedding_is_stepped_once_with_both_gradients(
    world, gradient_checkpointing: bool
) -> None:
    model, reference = student(world), student(world)
    model.gradient_checkpointing = gradient_checkpointing
    inside = trainer(world, model, optimizer_in_backward=True, max_grad_norm=0)
    seen: dict[str, list[torch.Tensor]] = {}
    step = inside.optimizer.step_parameter

    def note(parameter, scale=1.0):
        seen.setdefault(inside.optimizer.names[parameter], []).append(parameter.grad.clone())
        step(parameter, scale)

    inside.optimizer.step_parameter = note
    ordinary = trainer(world, reference)
    ordinary.config = dataclasses.replace(ordinary.config, max_grad_norm=0)
    inside.step(0), ordinary.step(0)
    assert {name: len(grads) for name, grads in seen.items()} == {
        name: 1 for name, _ in model.named_parameters()
    }
    for name, parameter in reference.named_parameters():
        assert torch.equal(seen[name][0], parameter.grad), name


def test_clipping_in_the_backward_pass_uses_the_norm_of_the_step_before(world) -> None:
    """AdamW hardly feels a constant factor, so the first moment shows it."""
    clipped, free = (
        trainer(world, optimizer_in_backward=True, max_grad_norm=limit) for limit in (1e-3, 0)
    )
    assert clipped.backward is not None
    clipped.backward.previous = 50.0
    clipped.step(0), free.step(0)
    for p, q in zip(clipped.model.parameters(), free.model.parameters(), strict=True):
        ours, theirs = clipped.optimizer.state[p]["exp_avg"], free.optimizer.state[q]["exp_avg"]
        torch.testing.assert_close(ours, theirs * (1e-3 / 50), rtol=1e-4, atol=1e-12)
    # no step before: the norm so far is the limit
    spike = trainer(world, optimizer_in_backward=True, max_grad_norm=1e-3)
    norm = spike.step(0).grad_norm
    total = (
        sum(
            spike.optimizer.state[p]["exp_avg"].square().sum() for p in spike.model.parameters()
        ).sqrt()
        / 0.1
    )
    assert total < norm / 20 and spike.backward.previous == norm


def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    world, tmp_path, monkeypatch
) -> None:
    config = world.pretrain(tmp_path / "r", optimizer_in_backward=True, save_steps=2, max_steps=6)
    original = loop.Trainer.step

    def poisoned(self, number):
        if number == 3:
            weight = self.objective.model.model.layers[0].mlp.up_proj.weight
            weight.register_hook(lambda grad: grad * torch.inf)
        return original(self, number)

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    with pytest.raises(
        XinslmError, match=r"the gradient is (nan|inf) at step 4, on training documents"
    ):
        train.run(config)
    monkeypatch.undo()
    result = train.run(config)
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    assert result.state.step == 6 and result.validation == train.run(whole).validation


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_continued_run_is_the_uninterrupted_one(
    world, tmp_path, optimizer: str, weights: str, inside: bool
) -> None:
    """Clipping acts on every step; the state that decides it is in the checkpoint."""
    settings = {
        "optimizer": optimizer,
        "param_dtype": weights,
        "optimizer_in_backward": inside,
        "max_grad_norm": 0.05,
    }
    settings |= {"hidden_size": 64, "max_steps": 5, "save_steps": 3}
    whole, broken = (world.distill(tmp_path / name, **settings) for name in ("whole", "broken"))
    train.run(whole)

    class Stop(Exception):
        pass

    def stop(progress) -> None:
        if progress.done == 4 and "loss" in progress.values:
            raise Stop

    with pytest.raises(Stop):
        train.run(broken, stop)
    train.run(broken)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            (config.output_dir / "checkpoints" / "last" / name).read_bytes()
            for config in (whole, broken)
        )
        assert ours == theirs, name


def test_a_checkpoint_of_another_optimiser_is_refused(world, tmp_path) -> None:
    from xinslm.train import checkpoint

    run = trainer(world, student(world))
    config = world.pretrain(tmp_path / "r", max_steps=1, hidden_size=64)
    train.run(config)
    last = tmp_path / "r" / "checkpoints" / "last"
    model = Transformer(load_config(last))
    other = make_optimizer(model, dataclasses.replace(config, optimizer="muon"))
    with pytest.raises(XinslmError, match=r"does not fit this run \(at 'exp_avg"):
        checkpoint.load_checkpoint(last, read_tensors(last), model, other)
    with pytest.raises(XinslmError, match="does not fit this run"):
        checkpoint.load_checkpoint(last, read_tensors(last), run.model, run.optimizer)


def test_a_bfloat16_student_is_a_model_that_transformers_reads(world, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from xinslm.model.files import load_model

    train.run(world.distill(tmp_path / "r", param_dtype="bfloat16", max_steps=2))
    best = tmp_path / "r" / "checkpoints" / "best"
    theirs, ours = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32), load_model(best)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, ours.logits(ours.hidden(ids)), atol=1e-5, rtol=1e-4
        )


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler",
)
def test_a_compiled_step_is_the_plain_one(world) -> None:
    plain, compiled = (
        trainer(world, student(world, num_hidden_layers=1), compile=flag) for flag in (False, True)
    )
    for number in range(2):
        a, b = plain.step(number), compiled.step(number)
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)


def test_what_cannot_be_combined_is_refused() -> None:
    config = PretrainConfig(
        data_path="d", output_dir="o", optimizer_in_backward=True, batch_size=4, micro_batch_size=2
    )
    with pytest.raises(UsageError, match="optimizer_in_backward frees each gradient at once"):
        config.check()
    dataclasses.replace(config, micro_batch_size=4).check()
