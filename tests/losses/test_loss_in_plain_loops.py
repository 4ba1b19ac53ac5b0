"""The fused loss in a loop that knows nothing of this package's trainer, on models of
`transformers`.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from loss_oracle import DIVERGENCES, dense_oracle, sparsify
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import fused_loss, next_tokens

VOCAB, IGNORE = 50, -100


def make_model(tied: bool, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).train()


def batch(rows: int = 8, length: int = 12, seed: int = 1):
    """Token ids, attention mask and labels with prompts and pads ignored; the rows have unequal
    lengths.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    lengths = torch.randint(5, length + 1, (rows, 1), generator=g)
    prompts = torch.randint(1, 4, (rows, 1), generator=g)
    places = torch.arange(length)
    mask = (places < lengths).long()
    labels = torch.where((mask == 1) & (places >= prompts), ids, IGNORE)
    return ids, mask, labels


def teacher_logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return make_model(False, seed=9).eval()(ids, attention_mask=mask).logits.flatten(0, 1)


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def fused_step(model, ids, mask, labels, teacher, config, count=None):
    """One forward and backward pass as a user would write it; returns the loss."""
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    rows, after, places = next_tokens(hidden, labels)
    loss, _ = fused_loss(
        rows, model.lm_head.weight, after, sparsify(teacher[places]), config, count
    )
    loss.backward()
    return loss.item()


def assert_equal_gradients(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=tolerance, rtol=1e-4, msg=name)


CONFIGS = [
    LossConfig(0.1, 0.9, tail_weight=0.0),
    LossConfig(0.1, 0.9, 2.0, tail_weight=0.0),
    *(LossConfig(0.1, 0.9, 2.0, "full", divergence=name) for name in DIVERGENCES),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.divergence}-{c.temperature_mode}-{c.temperature}"
)
def test_a_plain_loop_gets_the_gradients_of_the_dense_formula(tied, config):
    ids, mask, labels = batch()
    teacher = teacher_logits(ids, mask)
    model = make_model(tied)
    value = fused_step(model, ids, mask, labels, teacher, config)
    ours = gradients(model)
    model.zero_grad()
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    keep = labels[:, 1:] != IGNORE
    wanted = teacher.view(*ids.shape, VOCAB)[:, :-1][keep]
    dense = dense_oracle(
        hidden[:, :-1][keep],
        model.lm_head.weight,
        labels[:, 1:][keep],
        wanted,
        sparsify(wanted),
        config,
    )
    dense.backward()
    assert value == pytest.approx(dense.item(), rel=1e-5)
    assert_equal_gradients(ours, gradients(model))


def test_cross_entropy_of_transformers_itself():
    ids, mask, labels = batch()
    model = make_model(True)
    rows, after, _ = next_tokens(model.model(ids, attention_mask=mask).last_hidden_state, labels)
    loss, _ = fused_loss(rows, model.lm_head.weight, after, None, LossConfig())
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    theirs = model(ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_equal_gradients(ours, gradients(model))


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_accumulation_over_rows_of_unequal_length(splits):
    """Each micro-batch's mean would weigh tokens of short rows more (seen in several peers)."""
    ids, mask, labels = batch()
    teacher, config = teacher_logits(ids, mask).view(*ids.shape, VOCAB), LossConfig(tail_weight=0.0)
    count = int((labels[:, 1:] != IGNORE).sum())
    model = make_model(True)
    whole = fused_step(model, ids, mask, labels, teacher.flatten(0, 1), config)
    expected = gradients(model)
    model.zero_grad()
    total = 0.0
    for part in torch.arange(len(ids)).chunk(splits):
        total += fused_step(
            model, ids[part], mask[part], labels[part], teacher[part].flatten(0, 1), config, count
        )
    assert total == pytest.approx(whole, rel=1e-5)
    assert_equal_gradients(gradients(model), expected)


def test_pads_at_the_end_change_nothing():
    ids, mask, labels = batch()
    config, model = LossConfig(tail_weight=0.0), make_model(False)
    value = fused_step(model, ids, mask, labels, teacher_logits(ids, mask), config)
    expected = gradients(model)
    model.zero_grad()
    wide_ids, wide_mask, wide_labels = (
        F.pad(ids, (0, 7)),
        F.pad(mask, (0, 7)),
        F.pad(labels, (0, 7), value=IGNORE),
    )
    wide = teacher_logits(ids, mask).view(*ids.shape, VOCAB)
    teacher = F.pad(wide, (0, 0, 0, 7), value=torch.nan).flatten(0, 1)
    assert fused_step(model, wide_ids, wide_mask, wide_labels, teacher, config) == pytest.approx(
        value, rel=1e-6
    )
    assert_equal_gradients(gradients(model), expected)


def test_what_is_left_out_may_hold_nan():
    _, _, labels = batch()
    hidden = torch.randn(*labels.shape, 16)
    weight, teacher = torch.randn(VOCAB, 16), torch.randn(labels.numel(), VOCAB)
    left_out = torch.cat((labels[:, 1:] == IGNORE, torch.ones(len(labels), 1, dtype=torch.bool)), 1)
    results = []
    for filling in (0.0, torch.nan):
        leaf = hidden.masked_fill(left_out[:, :, None], filling).requires_grad_()
        rows, after, places = next_tokens(leaf, labels)
        loss, _ = fused_loss(rows, weight, after, sparsify(teacher[places]), LossConfig())
        loss.backward()
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[left_out].any()
        results.append((loss.item(), leaf.grad))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


def test_the_shift():
    """With labels [-100, -100, a, b], positions 1 and 2 predict targets, and no others."""
    hidden = torch.randn(1, 4, 16, requires_grad=True)
    labels = torch.tensor([[IGNORE, IGNORE, 7, 9]])
    rows, after, places = next_tokens(hidden, labels)
    assert (after.tolist(), places.tolist()) == ([7, 9], [1, 2])
    fused_loss(rows, torch.randn(VOCAB, 16), after, None, LossConfig())[0].backward()
    assert (hidden.grad[0].abs().sum(1) > 0).tolist() == [False, True, True, False]
