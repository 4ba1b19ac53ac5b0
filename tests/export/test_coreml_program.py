"""The module that becomes a Core ML program computes what `Transformer` does; no coremltools."""

from itertools import pairwise

import pytest
import torch

from small_models import make_config
from xinslm.export.coreml.program import KEYS, VALUES, StatefulTransformer, causal_mask
from xinslm.model.transformer import Transformer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "a head each": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-6},
    "rescaled": {
        "rope_theta": 300.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16},
    },
}


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
    model = StatefulTransformer(config, length=48).eval()
    model.load_state_dict(reference.state_dict(), strict=False)
    return reference, model


@torch.no_grad()
def test_logits_equal_those_of_the_transformer(pair):
    reference, model = pair
    ids = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = reference.logits(reference.hidden(ids))
    assert expected.std() > 0.3
    assert torch.allclose(model(ids, causal_mask(40)), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[7], [1, 2, 19], list(range(1, 40))])
def test_a_text_in_parts_gives_the_same_with_the_states(pair, cuts):
    reference, model = pair
    ids = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = reference.logits(reference.hidden(ids))
    # what an earlier text left behind must not be seen
    for name in (KEYS, VALUES):
        getattr(model, name).uniform_(-9, 9)
    edges = [0, *cuts, 40]
    parts = [
        model(ids[:, start:stop], causal_mask(stop - start, past=start))
        for start, stop in pairwise(edges)
    ]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-4)


def test_the_mask_hides_the_future_only():
    mask = causal_mask(3, past=2)[0, 0]
    assert mask.shape == (3, 5)
    assert (mask == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert mask.min() == torch.finfo(torch.float16).min
