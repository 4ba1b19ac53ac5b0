"""The narrow stream: exact for a full rotation, and where it lies in a subspace; the fit is ridge
regression.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from workshop import make_workshop

from small_models import FAMILIES
from xinslm.prune import transplant
from xinslm.prune.cuts import assemble, keep_layers
from xinslm.prune.measure import loss, measure

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model) -> torch.Tensor:
    return model.logits(model.hidden(IDS))


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    )[0]


def test_a_rotated_model_of_full_width_gives_the_same_logits(untied) -> None:
    turned = transplant.narrow(untied.model, untied.model.config, rotation(64), untied.found)
    assert not torch.allclose(
        turned.model.layers[0].mlp.up_proj.weight, untied.model.model.layers[0].mlp.up_proj.weight
    )
    torch.testing.assert_close(logits(turned), logits(untied.model), rtol=1e-4, atol=1e-4)


def test_a_rotated_tied_model_whose_last_gain_is_even_gives_the_same_logits(workshop) -> None:
    weights = dict(workshop.model.state_dict())
    weights["model.norm.weight"] = torch.full((64,), 0.7)
    teacher = assemble(workshop.model.config, weights)
    turned = transplant.narrow(teacher, teacher.config, rotation(64), workshop.found)
    torch.testing.assert_close(logits(turned), logits(teacher), rtol=1e-4, atol=1e-4)
    assert turned.head_weight is turned.model.embed_tokens.weight


def test_a_tied_teacher_can_have_an_untied_student_which_is_exact_with_any_gain(workshop) -> None:
    config = replace(workshop.model.config, tie_word_embeddings=False)
    turned = transplant.narrow(workshop.model, config, rotation(64), workshop.found)
    torch.testing.assert_close(logits(turned), logits(workshop.model), rtol=1e-4, atol=1e-4)


def test_a_tied_embedding_gives_way_towards_the_teachers_logits(workshop) -> None:
    """With uneven gains one matrix cannot be both; the compromise must beat the turned embedding at
    writing.
    """
    basis = transplant.principal_directions(workshop.found.stream, 48)
    config = replace(workshop.model.config, hidden_size=48)
    cut = transplant.narrow(workshop.model, config, basis, workshop.found)
    turned = workshop.model.model.embed_tokens.weight.double() @ basis
    final = workshop.found.final / workshop.found.ids.sum()
    gain = workshop.model.model.norm.weight.double()
    scale = cut.model.norm.weight.double() / transplant.norm_factor(workshop.found.final, basis)

    def error(embedding: torch.Tensor) -> float:
        off = (
            embedding * scale
        ) @ basis.T - workshop.model.model.embed_tokens.weight.double() * gain
        return float(torch.einsum("vi,ij,vj->", off, final, off))

    made = cut.model.embed_tokens.weight.double()
    assert error(made) < 0.6 * error(turned)
    assert float((made - turned).norm() / turned.norm()) < 0.3


def in_subspace(model, basis: torch.Tensor):
    """The model with a residual stream confined to the columns of `basis`: everything written there
    is projected.
    """
    project = (basis @ basis.T).float()
    weights = dict(model.state_dict())
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = project @ tensor
        elif name == "model.embed_tokens.weight":
            weights[name] = tensor @ project
    return assemble(model.config, weights)


def test_a_stream_in_a_subspace_is_cut_without_loss(untied) -> None:
    """The norm's divisor counts fewer channels; a wrong factor would show at once."""
    teacher = in_subspace(untied.model, rotation(64)[:, :40])
    found = measure(teacher, untied.passages[:2], lambda layer: None)
    basis = transplant.principal_directions(found.stream, 40)
    cut = transplant.narrow(teacher, replace(teacher.config, hidden_size=40), basis, found)
    assert cut.model.embed_tokens.weight.shape == (320, 40)
    # eps weighs less
    torch.testing.assert_close(logits(cut), logits(teacher), rtol=1e-3, atol=3e-3)
    assert transplant.norm_factor(found.stream, basis) == pytest.approx((64 / 40) ** 0.5, rel=1e-6)


def test_blocks_before_the_first_cut_are_not_fitted(workshop, monkeypatch) -> None:
    """They stay the teacher's bit for bit, and the others are as if they had been fitted too."""
    teacher, kept = workshop.model, [0, 1]
    thin = keep_layers(teacher.config, teacher.state_dict(), kept)
    cut = transplant.CutModel(thin, thin, kept, None)
    assert transplant.unchanged_blocks(teacher, cut) == 1
    seen: list[int] = []
    short = transplant.compensate(teacher, cut, workshop.passages[:1], 0.01, seen.append)
    assert seen == [1, 2]
    for name, weight in teacher.model.layers[0].state_dict().items():
        assert torch.equal(short.model.layers[0].state_dict()[name], weight)
    assert not torch.equal(
        short.model.layers[1].mlp.down_proj.weight, teacher.model.layers[1].mlp.down_proj.weight
    )
    monkeypatch.setattr(transplant, "unchanged_blocks", lambda teacher, cut: 0)
    whole = transplant.compensate(teacher, cut, workshop.passages[:1], 0.01, lambda layer: None)
    torch.testing.assert_close(logits(short), logits(whole), rtol=1e-3, atol=1e-3)


def test_fewer_neurons_are_a_change(workshop) -> None:
    teacher = workshop.model
    uncut = transplant.CutModel(teacher, teacher, [0, 1, 2], None)
    assert transplant.unchanged_blocks(teacher, uncut) == 3
    thin = keep_layers(teacher.config, teacher.state_dict(), [0, 1, 2])
    down = thin.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight + 1)
    assert transplant.unchanged_blocks(teacher, replace(uncut, thin=thin)) == 1
    assert transplant.unchanged_blocks(teacher, replace(uncut, basis=torch.eye(4))) == 0


def test_the_fit_leaves_alone_what_needs_no_fit(untied, monkeypatch) -> None:
    """A student that is its teacher stays it, whatever the gains; so does one cut from a
    subspace.
    """
    monkeypatch.setattr(transplant, "unchanged_blocks", lambda teacher, cut: 0)
    uncut = transplant.CutModel(untied.model, untied.model, [0, 1], None)
    same = transplant.compensate(untied.model, uncut, untied.passages, 0.01, lambda layer: None)
    torch.testing.assert_close(logits(same), logits(untied.model), rtol=1e-3, atol=1e-3)
    teacher = in_subspace(untied.model, rotation(64)[:, :40])
    found = measure(teacher, untied.passages, lambda layer: None)
    basis = transplant.principal_directions(found.stream, 40)
    plain = transplant.narrow(teacher, replace(teacher.config, hidden_size=40), basis, found)
    cut = transplant.CutModel(teacher, plain, [0, 1], basis)
    fitted = transplant.compensate(teacher, cut, untied.passages, 0.01, lambda layer: None)
    torch.testing.assert_close(logits(fitted), logits(teacher), rtol=1e-2, atol=1e-2)


def test_ridge_regression_pulls_to_its_prior() -> None:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    prior = torch.randn(4, 6, generator=generator)
    fit = transplant.Fit()
    fit.add(x[:20], t[:20])
    fit.add(x[20:], t[20:])
    pull = (0.3 * (x.pow(2).sum(0).mean())).sqrt()
    # the same as an ordinary problem
    stacked = torch.cat((x, pull * torch.eye(6))), torch.cat((t, pull * prior.T))
    expected = np.linalg.lstsq(
        stacked[0].double().numpy(), stacked[1].double().numpy(), rcond=None
    )[0].T
    np.testing.assert_allclose(fit.solve(prior, 0.3).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(fit.solve(prior, 1e9), prior, atol=1e-5)


def test_the_fit_brings_states_nearer_to_the_teachers(workshop) -> None:
    """A layer dropped and the width cut: the fitted student's stream is nearer to the teacher's, on
    text not fitted.
    """
    teacher, kept = workshop.model, [0, 2]
    thin = keep_layers(teacher.config, teacher.state_dict(), kept)
    basis = transplant.principal_directions(workshop.found.stream, 48)
    plain = transplant.narrow(thin, replace(thin.config, hidden_size=48), basis, workshop.found)
    half = len(workshop.passages) // 2 or 1
    rows = [
        type(p)(p.ids[:40], p.labels[:40], p.positions[:40], p.segments[:40])
        for p in workshop.passages[:half]
    ]
    rest = [
        type(p)(p.ids[40:], p.labels[40:], p.positions[40:], p.segments[40:])
        for p in workshop.passages[:half]
    ]
    cut = transplant.CutModel(thin, plain, kept, basis)
    fitted = transplant.compensate(teacher, cut, rows, 0.01, lambda layer: None)

    def error(student) -> float:
        total = 0.0
        for p in rest:
            _, (wide,) = teacher.hidden(p.ids, p.positions, p.segments, layers=(3,))
            _, (narrow,) = student.hidden(p.ids, p.positions, p.segments, layers=(2,))
            total += float((wide @ basis.float() - narrow)[p.real].pow(2).mean())
        return total

    assert error(fitted) < 0.75 * error(plain)
    assert np.isfinite(loss(fitted, rest))


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_other_families_are_turned_and_fitted(tmp_path, monkeypatch, family) -> None:
    """A full rotation loses nothing, and a fit to the model's own states changes nothing."""
    made = make_workshop(tmp_path, **FAMILIES[family] | {"tie_word_embeddings": False})
    model = made.model
    turned = transplant.narrow(model, model.config, rotation(64), made.found)
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=2e-4)
    monkeypatch.setattr(transplant, "unchanged_blocks", lambda teacher, cut: 0)
    cut = transplant.CutModel(model, model, range(model.config.num_hidden_layers), None)
    fitted = transplant.compensate(model, cut, made.passages, 1e-6, lambda layer: None)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(fitted.state_dict()[name], weight, rtol=1e-2, atol=5e-3)
