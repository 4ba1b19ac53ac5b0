"""Several sets of rows in one run: shares, order, divisor, and the sequence-level contrast against
its formula.
"""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import PackedTrainer
from xinslm.data.dataset import Split, open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.losses.config import LossConfig
from xinslm.losses.targets import SparseTargets
from xinslm.model.config import ModelConfig
from xinslm.model.transformer import Transformer
from xinslm.train.row_sampler import RowSampler, Source

CPU = torch.device("cpu")
CE = LossConfig(alpha=1.0, beta=0.0)
VOCAB = 64


def make_rows(
    documents: int, seed: int, low: int = 5, high: int = 30, prompt: int = 0
) -> PackedDataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high, documents)
    offsets = np.concatenate([[0], lengths.cumsum()])
    mask = np.ones(offsets[-1], np.uint8)
    for start in offsets[:-1]:
        mask[start : start + max(1, prompt)] = 0
    tokens = rng.integers(0, VOCAB, offsets[-1]).astype(np.uint16)
    return PackedDataset(Split(tokens, mask, offsets, 4 * lengths, VOCAB), 40)


def make_model(seed: int = 0) -> Transformer:
    model = Transformer(ModelConfig(VOCAB, 32, 64, 2, 2, 1, 16, max_position_embeddings=64))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5, generator=generator)
    return model


def make_trainer(
    world, tmp_path, plan: RowSampler, rows: PackedDataset, micro: int | None = None
) -> PackedTrainer:
    config = world.pretrain(
        tmp_path,
        batch_size=plan.batch_size,
        micro_batch_size=micro,
        max_seq_length=40,
        max_grad_norm=0,
    )
    return PackedTrainer(make_model(), config, CE, rows, 6, None, CPU, plan=plan)


def taken(plan: RowSampler, step: int) -> list[tuple[int, int]]:
    parts = plan.of_step(step)
    return [(plan.sources.index(part.source), int(i)) for part in parts for i in part.indices]


def test_shares_are_kept_in_every_stretch_and_each_row_comes_once_an_epoch():
    sources = [
        Source(make_rows(20, seed), None, CE, share)
        for seed, share in ((1, 2.0), (2, 5.0), (3, 1.0))
    ]
    plan = RowSampler(sources, 8, 60, seed=5)
    drawn = [taken(plan, step) for step in range(60)]
    assert all(len(step) == 8 for step in drawn)
    for stretch in (1, 3, 60):
        for first in range(0, 60 - stretch + 1, stretch):
            counts = Counter(
                source for step in drawn[first : first + stretch] for source, _ in step
            )
            for source, share in enumerate((2 / 8, 5 / 8, 1 / 8)):
                assert abs(counts[source] - share * 8 * stretch) < 3
    for source in range(3):
        rows = [row for step in drawn for number, row in step if number == source]
        size = len(sources[source].rows)
        epochs = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
        assert len(epochs) >= 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_rows_follow_from_seed_and_step_alone():
    sources = [Source(make_rows(20, seed), None, CE, share) for seed, share in ((1, 2.0), (2, 1.0))]
    long, short = RowSampler(sources, 4, 50, seed=1), RowSampler(sources, 4, 9, seed=1)
    assert [taken(short, step) for step in range(9)] == [taken(long, step) for step in range(9)]
    later = RowSampler(sources, 4, 9, seed=1, first_step=100)
    assert taken(later, 104) == taken(short, 4)
    assert [taken(RowSampler(sources, 4, 9, seed=2), step) for step in range(9)] != [
        taken(short, s) for s in range(9)
    ]


def hidden_of(model: Transformer, batch) -> torch.Tensor:
    tensors = (torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments))
    return model.hidden(*tensors)


@pytest.mark.parametrize("micro", [None, 2])
def test_the_divisor_is_the_whole_steps_targets(world, tmp_path, micro):
    """Against plain autograd: rows of two sources with other losses, other masks, unequal numbers
    of targets.
    """
    one, two = make_rows(30, 1), make_rows(40, 2, prompt=3)
    sources = [
        Source(one, None, CE, 1.0),
        Source(two, None, LossConfig(alpha=0.3, beta=0.0), 1.0, lambda step: 2.0),
    ]
    plan = RowSampler(sources, 8, 6, seed=0)
    trainer = make_trainer(world, tmp_path, plan, one, micro)
    model, total, count = make_model(), torch.zeros(()), 0
    for part in plan.of_step(2):
        batch = part.source.rows.batch(part.indices)
        labels = torch.from_numpy(batch.labels)
        logits = model.logits(hidden_of(model, batch))
        weight = 1.0 if part.source is sources[0] else 2.0 * 0.3
        total = total + weight * F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        count += int((labels >= 0).sum())
    (total / count).backward()
    step = trainer.step(2)
    assert step.tokens == count
    assert step.loss == pytest.approx((total / count).item(), rel=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


class Exact:
    """A teacher known without error: all tokens but the last in the head, the last one alone in the
    tail.
    """

    def __init__(self, teacher: Transformer) -> None:
        self.teacher = teacher

    def log_probs(self, batch) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(
                self.teacher.logits(hidden_of(self.teacher, batch)), dim=-1
            ).flatten(0, 1)

    def targets(self, batch, chosen, device) -> SparseTargets:
        log_p = self.log_probs(batch)[torch.from_numpy(chosen)]
        count = len(chosen)
        return SparseTargets(
            top_k_ids=torch.arange(VOCAB - 1).expand(count, -1).contiguous(),
            top_k_log_probs=log_p[:, :-1].contiguous(),
            log_tail=log_p[:, -1].contiguous(),
            tail_ids=torch.zeros(count, 0, dtype=torch.int64),
            num_samples=torch.zeros(count, dtype=torch.int64),
            log_z=torch.zeros(count),
            valid_mask=torch.ones(count, dtype=torch.bool),
        )


@pytest.mark.parametrize("b", [1.0, 1.5])
def test_contrast_is_distillm_2s_formula(world, tmp_path, b):
    """1/2 [SKL(x, y_teacher) + b SRKL(x, y_student)], alpha 0.1, each a mean over its answers'
    tokens (2503.07067).
    """
    skl = LossConfig(alpha=0.0, beta=1.0, divergence="skew_kl", skew=0.1)
    srkl = dataclasses.replace(skl, divergence="skew_reverse_kl")
    teacher = Exact(make_model(7))
    own, given = make_rows(30, 1, prompt=4), make_rows(40, 2, low=20, prompt=2)
    sources = [Source(own, teacher, srkl, 0.5, lambda step: b), Source(given, teacher, skl, 0.5)]
    plan = RowSampler(sources, 8, 6, seed=0, balanced=True)
    trainer = make_trainer(world, tmp_path, plan, own)
    model = make_model()
    means = []
    for part in plan.of_step(1):
        batch = part.source.rows.batch(part.indices)
        answers = torch.from_numpy(batch.labels.ravel() >= 0)
        p = teacher.log_probs(batch).exp()[answers].double()
        q = torch.softmax(
            model.logits(hidden_of(model, batch)).flatten(0, 1)[answers], dim=-1
        ).double()
        first, second = (q, p) if part.source is sources[0] else (p, q)
        mixed = 0.1 * first + 0.9 * second
        means.append((first * (first / mixed).log()).sum(dim=1).mean())
    expected = 0.5 * (b * means[0] + means[1])
    expected.backward()
    step = trainer.step(1)
    assert step.loss == pytest.approx(expected.item(), rel=1e-5) and step.loss > 0.05
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-3)


def test_a_number_that_is_not_finite_names_documents_of_its_source(world, tmp_path):
    from xinslm.errors import XinslmError

    one, two = make_rows(30, 1), make_rows(40, 2)

    class Broken(Exact):
        def targets(self, batch, chosen, device):
            right = super().targets(batch, chosen, device)
            return dataclasses.replace(right, log_tail=torch.full_like(right.log_tail, torch.nan))

    sources = [
        Source(one, None, CE),
        Source(two, Broken(make_model(7)), LossConfig(alpha=0.0, beta=1.0)),
    ]
    plan = RowSampler(sources, 4, 6, seed=0)
    batch = two.batch(plan.of_step(0)[1].indices)
    documents = (
        np.searchsorted(two.split.documents, batch.stream[batch.stream >= 0], side="right") - 1
    )
    with pytest.raises(XinslmError, match=f"on training documents {np.unique(documents)[0]}"):
        make_trainer(world, tmp_path, plan, one).step(0)


def test_real_rows_and_a_cache_go_together(world, tmp_path):
    """Records follow their rows through the plan: the same rows give the same divergence in
    whatever order.
    """
    from xinslm.cache.folder import Cache
    from xinslm.cache.kinds import CachedTargets
    from xinslm.model.files import load_config

    rows = PackedDataset(open_dataset(world.data).split("validation"), 64)
    source = CachedTargets(Cache(world.cache).split("validation"))
    loss = LossConfig(alpha=0.0, beta=1.0, tail_weight=0.0)
    seen, orders = [], []
    for seed in (0, 1):
        plan = RowSampler([Source(rows, source, loss)], len(rows), 1, seed)
        model = Transformer(load_config(world.teacher))
        model.initialise(torch.Generator().manual_seed(0))
        config = world.pretrain(tmp_path, batch_size=len(rows), micro_batch_size=1)
        seen.append(PackedTrainer(model, config, loss, rows, 1, None, CPU, plan=plan).step(0))
        orders.append(plan.of_step(0)[0].indices.tolist())
    assert seen[0].kd == pytest.approx(seen[1].kd, rel=1e-5) and seen[0].tokens == seen[1].tokens
    assert orders[0] != orders[1] and seen[0].kd > 0.01
