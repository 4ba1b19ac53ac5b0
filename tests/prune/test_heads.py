"""Heads: merging is exact where key-value heads agree up to what the rotary embedding and the
output leave free.
"""

from dataclasses import replace

import pytest
import torch
from workshop import make_workshop

from small_models import FAMILIES
from xinslm.errors import UsageError
from xinslm.prune import heads
from xinslm.prune.config import PruneConfig
from xinslm.prune.cuts import assemble
from xinslm.prune.measure import loss, measure
from xinslm.prune.shape import student_shape

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))
WIDTH = 32


def logits(model) -> torch.Tensor:
    return model.logits(model.hidden(IDS))


def own(weights, layer: int) -> dict:
    return {
        name.split(".", 3)[3]: t
        for name, t in weights.items()
        if name.startswith(f"model.layers.{layer}.")
    }


def cut(model, found, num_heads: int, num_kv: int):
    student = replace(model.config, num_attention_heads=num_heads, num_key_value_heads=num_kv)
    weights, groups = dict(model.state_dict()), []
    for layer in range(model.config.num_hidden_layers):
        part = own(weights, layer)
        groups.append(heads.choose_heads(model.config, student, part, found.layers[layer]))
        kept = heads.keep_heads(part, groups[-1], found.layers[layer].inputs, WIDTH)
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in kept.items()}
    return assemble(student, weights), groups


def with_key_values(model, change) -> object:
    """The model with each layer's (K, D, d) key and value heads changed by `change(keys, values,
    outputs)`.
    """
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(model.config.num_hidden_layers):
        k, v, o = (f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "kvo")
        parts = [weights[k].view(-1, WIDTH, 64), weights[v].view(-1, WIDTH, 64), weights[o]]
        parts = change(*parts)
        weights[k], weights[v], weights[o] = (
            parts[0].reshape(-1, 64),
            parts[1].reshape(-1, 64),
            parts[2],
        )
    return assemble(model.config, weights)


def test_identical_key_value_heads_merge_exactly(untied) -> None:
    """Heads 0 and 2, 1 and 3 are pairs: who belongs together must be found, too."""
    teacher = with_key_values(untied.model, lambda k, v, o: (k[[0, 1, 0, 1]], v[[0, 1, 0, 1]], o))
    found = measure(teacher, untied.passages[:2], lambda layer: None)
    student, groups = cut(teacher, found, 4, 2)
    assert [[g.key_values for g in layer] for layer in groups] == [[(0, 2), (1, 3)]] * 2
    assert [[g.queries for g in layer] for layer in groups] == [[(0, 2), (1, 3)]] * 2
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-3)


def test_heads_that_differ_by_what_is_free_merge_exactly(untied) -> None:
    """Keys turned and scaled pair by pair, values in another basis: the same attention, so nothing
    may be lost.
    """
    generator = torch.Generator().manual_seed(8)
    half = WIDTH // 2

    def change(k, v, o):
        angle, size = (
            torch.rand(half, generator=generator) * 6.28,
            torch.rand(half, generator=generator) + 0.5,
        )
        real, imaginary = size * angle.cos(), size * angle.sin()
        low, high = k[0, :half], k[0, half:]
        turned = torch.cat(
            (
                real[:, None] * low - imaginary[:, None] * high,
                imaginary[:, None] * low + real[:, None] * high,
            )
        )
        mix = torch.randn(WIDTH, WIDTH, generator=generator)
        return (
            torch.stack((k[0], turned, k[2], k[2])),
            torch.stack((v[0], mix @ v[0], v[2], v[2])),
            o,
        )

    teacher = with_key_values(untied.model, change)
    found = measure(teacher, untied.passages[:2], lambda layer: None)
    student, groups = cut(teacher, found, 4, 2)
    assert [g.key_values for g in groups[0]] == [(0, 1), (2, 3)]
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-3, atol=2e-3)


def test_heads_without_output_go_first(workshop) -> None:
    def change(k, v, o):
        o = o.clone()
        o[:, 1 * WIDTH : 3 * WIDTH] = 0  # query heads 1 and 2: one of each pair
        return k, v, o

    teacher = with_key_values(workshop.model, change)
    found = measure(teacher, workshop.passages[:2], lambda layer: None)
    student, groups = cut(teacher, found, 2, 2)
    assert [[g.queries for g in layer] for layer in groups] == [[(0,), (3,)]] * 3
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def test_whole_groups_go_where_queries_are_few_enough(workshop) -> None:
    def change(k, v, o):
        o = o.clone()
        o[:, 2 * WIDTH :] = 0
        return k, v, o

    teacher = with_key_values(workshop.model, change)
    found = measure(teacher, workshop.passages[:2], lambda layer: None)
    student, groups = cut(teacher, found, 2, 1)
    assert [[(g.key_values, g.queries) for g in layer] for layer in groups] == [
        [((0,), (0, 1))]
    ] * 3
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)


def test_merging_loses_less_than_mean_pooling(untied) -> None:
    teacher = untied.model
    groups = [heads.Group((0, 1), (0, 1)), heads.Group((2, 3), (2, 3))]
    student = replace(teacher.config, num_key_value_heads=2)
    merged, pooled = dict(teacher.state_dict()), dict(teacher.state_dict())
    for layer in range(2):
        part = own(merged, layer)
        kept = heads.keep_heads(part, groups, untied.found.layers[layer].inputs, WIDTH)
        merged |= {f"model.layers.{layer}.{name}": tensor for name, tensor in kept.items()}
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            pooled[f"model.layers.{layer}.{name}"] = (
                part[name].view(2, 2, WIDTH, 64).mean(1).reshape(-1, 64)
            )
    wanted = torch.cat(
        [teacher.hidden(p.ids, p.positions, p.segments)[p.real] for p in untied.passages]
    )

    def error(weights) -> float:
        model = assemble(student, weights)
        states = torch.cat(
            [model.hidden(p.ids, p.positions, p.segments)[p.real] for p in untied.passages]
        )
        return float((states - wanted).pow(2).mean())

    assert error(merged) < 0.8 * error(pooled)


@pytest.mark.parametrize(("num_heads", "num_kv"), [(4, 2), (4, 1), (2, 2), (2, 1), (1, 1)])
def test_all_counts_that_can_be_cut_run(untied, num_heads: int, num_kv: int) -> None:
    student, groups = cut(untied.model, untied.found, num_heads, num_kv)
    assert torch.isfinite(torch.tensor(loss(student, untied.passages[:1])))
    for layer in groups:
        assert len(layer) == num_kv
        queries = [q for group in layer for q in group.queries]
        assert len(set(queries)) == len(queries) == num_heads
        for group in layer:
            # each query head had one of its own
            assert all(q in group.key_values for q in group.queries)


def test_counts_that_cannot_be_cut_are_refused(untied, tmp_path) -> None:
    shape = replace(
        untied.model.config, num_attention_heads=8, hidden_size=72, num_key_value_heads=4
    )
    config = PruneConfig(
        teacher="t", data_path=tmp_path, output_dir=tmp_path, num_heads=6, num_kv_heads=3
    )
    assert student_shape(config, shape, 320).num_attention_heads == 6  # two each of three groups
    shape = replace(shape, num_attention_heads=4, num_key_value_heads=4)
    config = replace(config, num_heads=4, num_kv_heads=3)
    with pytest.raises(UsageError, match="num_key_value_heads"):
        student_shape(config, shape, 320)
    shape = replace(shape, num_attention_heads=12, hidden_size=72, num_key_value_heads=4)
    config = replace(config, num_heads=12, num_kv_heads=3)
    with pytest.raises(
        UsageError, match="2 of the teacher's key-value heads would be merged into one"
    ):
        student_shape(config, shape, 320)


def with_biases(model, change) -> object:
    """The model with each layer's (K, D, d + 1) keys and values changed by `change(keys, values)`,
    biases the last column.
    """
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(model.config.num_hidden_layers):
        stems = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "kv"]
        parts = [
            torch.cat((weights[f"{s}.weight"], weights[f"{s}.bias"][:, None]), 1) for s in stems
        ]
        for stem, part in zip(stems, change(*(p.view(-1, WIDTH, 65) for p in parts)), strict=True):
            weights[f"{stem}.weight"] = part[..., :-1].reshape(-1, 64)
            weights[f"{stem}.bias"] = part[..., -1].flatten()
    return assemble(model.config, weights)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    parts = {"attention_bias": True, "attention_output_bias": True}
    return make_workshop(tmp_path_factory.mktemp("biased"), num_key_value_heads=4, **parts)


def test_biases_are_merged_with_their_heads(biased) -> None:
    """Heads 0 and 2, 1 and 3 differ by what is free, in the biases as in the weights."""
    generator = torch.Generator().manual_seed(8)
    half = WIDTH // 2

    def change(k, v):
        angle = torch.rand(half, generator=generator)[:, None] * 6.28
        turned = [
            torch.cat(
                (
                    x[:half] * angle.cos() - x[half:] * angle.sin(),
                    x[:half] * angle.sin() + x[half:] * angle.cos(),
                )
            )
            for x in k[:2]
        ]
        mix = torch.randn(WIDTH, WIDTH, generator=generator)
        return torch.stack((*k[:2], *turned)), torch.stack((v[0], v[1], mix @ v[0], mix @ v[1]))

    teacher = with_biases(biased.model, change)
    found = measure(teacher, biased.passages[:2], lambda layer: None)
    assert found.layers[0].inputs.shape == (65, 65)
    student, groups = cut(teacher, found, 4, 2)
    assert [g.key_values for g in groups[0]] == [(0, 2), (1, 3)]
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_belongs_to_a_head_goes_with_it(tmp_path, family) -> None:
    made = make_workshop(tmp_path, **FAMILIES[family] | {"head_dim": WIDTH})

    def change(k, v, o):
        o = o.clone()
        o[:, : 2 * WIDTH] = 0  # the first group
        return k, v, o

    teacher = with_key_values(made.model, change)
    found = measure(teacher, made.passages[:2], lambda layer: None)
    student, groups = cut(teacher, found, 2, 1)
    assert groups[0][0].queries == (2, 3) and groups[0][0].key_values == (1,)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-4)
