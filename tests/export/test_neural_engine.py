"""The program of fixed shapes computes what `Transformer` does; no coremltools."""

from itertools import pairwise

import pytest
import torch

from small_models import make_config
from xinslm.export.coreml.neural_engine import TOKENS, FixedTransformer, Norm, fixed_mask
from xinslm.export.coreml.program import KEYS, VALUES
from xinslm.model.transformer import Transformer

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "norms of heads": {"qk_norm": True},
    "biases": {"attention_bias": True, "attention_output_bias": True},
    "one key head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 300.0},
}
LENGTH = 64


@pytest.fixture(params=SHAPES)
def pair(request):
    """A random model, twice."""
    config = make_config(**SHAPES[request.param])
    reference = Transformer(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5, generator=generator)
    model = FixedTransformer(config, LENGTH).eval()
    given = reference.state_dict()
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert shapes.keys() == given.keys()
    model.load_state_dict({n: given[n].view(s) for n, s in shapes.items()}, strict=False)
    return reference, model


def call(model, ids, past):
    """Logits of up to TOKENS ids after `past` others; the call is filled up with token 7."""
    count = ids.shape[1]
    filled = torch.full((1, TOKENS), 7)
    filled[:, :count] = ids
    return model(filled, fixed_mask(count, past, LENGTH), torch.tensor([past]))[:, :count]


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[16, 32], [7, 20, 30], [1, 2, 18, 19, 35]])
def test_logits_equal_those_of_the_transformer(pair, cuts):
    reference, model = pair
    ids = torch.randint(0, 320, (1, 41), generator=torch.Generator().manual_seed(0))
    expected = reference.logits(reference.hidden(ids))
    assert expected.std() > 0.3
    # what an earlier text left behind must not be seen
    for name in (KEYS, VALUES):
        getattr(model, name).uniform_(-9, 9)
    parts = [call(model, ids[:, a:b], a) for a, b in pairwise([0, *cuts, 41])]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)


@torch.no_grad()
def test_the_last_places_are_read_by_beginning_earlier(pair):
    reference, model = pair
    ids = torch.randint(0, 320, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = reference.logits(reference.hidden(ids))
    for start in (0, 16, 32, 45):
        call(model, ids[:, start : start + TOKENS], start)
    found = call(model, ids[:, 48:], 48)  # of these, 13 were read before
    assert torch.allclose(found, expected[:, 48:], atol=1e-4)


def test_the_mask_shows_the_past_only():
    mask = fixed_mask(2, 3, 32)
    assert mask.shape == (1, 1, TOKENS, 32)
    assert (mask[0, 0] == 0).sum(1).tolist() == list(range(4, 4 + TOKENS))
    assert mask.half().float().unique().tolist() == [-10000, 0]
    with pytest.raises(AssertionError, match="within the states"):
        fixed_mask(1, 17, 32)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 300.0, 6e4])
@pytest.mark.parametrize(("dim", "shape"), [(1, (1, 96, 1, 5)), (2, (1, 3, 32, 5))])
def test_the_norm_in_float16_neither_overflows_nor_vanishes(size, dim, shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = (x * size).half()
    norm = Norm(shape[dim], 1e-5, dim)
    torch.nn.init.constant_(norm.weight, 0.5)
    found = norm.half()(x).double()
    wide = x.double()
    expected = wide / (wide.square().mean(dim, keepdim=True) + 1e-5).sqrt() / 2
    assert (found - expected).abs().max() < 4e-3 * expected.abs().max()
