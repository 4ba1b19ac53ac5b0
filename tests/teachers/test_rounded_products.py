"""A teacher whose products are rounded to bfloat16 is close to the one in float32."""

import numpy as np
import pytest
import torch

import xinslm.precision
from smollm2 import find_smollm2
from xinslm.model.files import open_model
from xinslm.teachers.own import OwnTeacher

TEXT = (
    "Bread is made of flour, water, salt and yeast. Mix them, let the dough rest for an hour, "
    "shape it and bake it at 230 degrees until the crust is brown. The first loaf of 1912 was sold "
    "to a sailor who had not eaten in three days; he said it was the best he ever had."
)


def log_probs(source, dtype: str) -> torch.Tensor:
    teacher = OwnTeacher(source, dtype)
    ids = np.array(teacher.tokenizer.encode(TEXT)[: teacher.max_length])
    return teacher.logits(teacher.states([ids])).log_softmax(1)


def test_the_real_models_distributions_are_those_of_float32(monkeypatch):
    """The mean KL divergence stays below 1e-4; a model in bfloat16 has several times it."""
    monkeypatch.setattr(xinslm.precision, "has_fast_bfloat16", lambda device: True)
    source = open_model(str(find_smollm2()))
    exact = log_probs(source, "float32")
    kl = {
        dtype: (exact.exp() * (exact - log_probs(source, dtype))).sum(1).mean().item()
        for dtype in ("auto", "bfloat16")
    }
    assert abs(kl["auto"]) < 1e-4
    assert kl["bfloat16"] > 2 * kl["auto"]


@pytest.mark.parametrize("fast", [True, False])
def test_auto_rounds_only_where_it_pays(world, monkeypatch, fast):
    monkeypatch.setattr(xinslm.precision, "has_fast_bfloat16", lambda device: fast)
    source = open_model(str(world.teacher))
    equal = torch.equal(log_probs(source, "auto"), log_probs(source, "float32"))
    assert equal == (not fast or not xinslm.precision.rounds_on_request())
