"""The student against transformers' Llama, Mistral, Qwen2 and Qwen3, on random shapes and weights,
in float32.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xinslm.errors import UsageError
from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.transformer import KVCache, Transformer

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=128,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "heads 8/8": {"num_key_value_heads": 8},
    "heads 8/4": {"num_key_value_heads": 4},
    "heads 8/2": {"num_key_value_heads": 2},
    "heads 8/1": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "untied": {"tie_word_embeddings": False},
    "window 5": {"sliding_window": 5},
    "window 1": {"sliding_window": 1},
    "window of the text": {"sliding_window": 40},
    "rope theta": {"rope_theta": 500000.0},
    "rope llama3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "norm epsilon": {"rms_norm_eps": 1e-3},
    "qwen2": {"attention_bias": True},
    "qwen2 with wide heads": {"attention_bias": True, "head_dim": 24},
    "qwen2 with a window": {"attention_bias": True, "sliding_window": 5},
    "qwen3": {"qk_norm": True, "head_dim": 24, "rms_norm_eps": 1e-3},
    "qwen3, width of no multiple": {"qk_norm": True, "hidden_size": 60, "head_dim": 32},
    "qwen3 with a window": {"qk_norm": True, "sliding_window": 5, "tie_word_embeddings": False},
    "llama with biases": {"attention_bias": True, "attention_output_bias": True},
}


def shape(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def random_pair(config: ModelConfig, seed: int = 0):
    """Our model and the reference with equal weights, drawn so wide that attention is far from
    uniform.
    """
    torch.manual_seed(seed)
    their_config = AutoConfig.for_model(**config.to_hf(), attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(their_config).eval()
    assert type(reference).__name__ == config.to_hf()["architectures"][0]
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(
                torch.randn_like(weight) * (0.3 if weight.dim() == 2 else 0.2) + (weight.dim() == 1)
            )
    model = Transformer(config).eval()
    state = dict(reference.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=True)
    return model, reference


def random_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(
        0, TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def logits_of(model: Transformer, ids: torch.Tensor, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(ids, **arguments))


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the logits' own size."""
    assert expected.abs().max() > 0.01, "the comparison must not be of near-zero numbers"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference < tolerance, difference


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str) -> None:
    model, reference = random_pair(shape(**SHAPES[name]))
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = reference(ids).logits
    assert_near(logits_of(model, ids), expected)


CACHED = ["heads 8/2", "wide heads", "window 5", "rope llama3", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("chunks", [[1] * 40, [17, 1, 1, 21], [40], [3, 37]])
def test_cached_equals_uncached(name: str, chunks: list[int]) -> None:
    config = shape(**SHAPES[name])
    model, reference = random_pair(config)
    ids = random_ids(2, 40)
    cache = KVCache(config, batch=2, max_length=64)
    found = torch.cat(
        [logits_of(model, part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1
    )
    assert cache.length == 40
    with torch.no_grad():
        assert_near(found, reference(ids).logits)


def test_a_full_cache_refuses() -> None:
    model, _ = random_pair(TINY)
    cache = KVCache(TINY, batch=1, max_length=4)
    logits_of(model, random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="has 4 positions, but 5 are needed"):
        logits_of(model, random_ids(1, 1), cache=cache)


@pytest.mark.parametrize("name", ["heads 8/4", "window 5", "qwen2", "qwen3"])
def test_each_segment_of_a_packed_row_equals_the_segment_alone(name: str) -> None:
    model, reference = random_pair(shape(**SHAPES[name]))
    lengths = [11, 1, 20, 8]  # the last one stands for padding: it must not disturb the others
    ids = random_ids(2, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor(lengths)).expand(
        2, -1
    )
    packed = logits_of(model, ids, positions=positions, segments=segments)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        with torch.no_grad():
            assert_near(packed[:, part], reference(ids[:, part]).logits)
        start += length


def test_checkpointing_changes_no_gradient() -> None:
    model, _ = random_pair(TINY)
    ids = random_ids(2, 24)
    segments = (torch.arange(24) >= 10).long().expand(2, -1)
    gradients = []
    for gradient_checkpointing in (False, True):
        model.gradient_checkpointing = gradient_checkpointing
        model.train().zero_grad()
        model.logits(model.hidden(ids, segments=segments)).square().mean().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("name", ["heads 8/2", "qwen2", "qwen3", "llama with biases"])
def test_gradients_equal_transformers(name: str) -> None:
    model, reference = random_pair(shape(**SHAPES[name]))
    ids = random_ids(2, 24)
    model.train().logits(model.hidden(ids)).square().sum().backward()
    reference.train()(ids).logits.square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        assert_near(weight.grad, expected[name].grad, 1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_config_json_keeps_the_family(name: str) -> None:
    config = shape(**SHAPES[name])
    values = config.to_hf()
    assert ModelConfig.from_hf(values) == config
    assert ModelConfig.from_hf(AutoConfig.for_model(**values).to_dict()) == config
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Transformer(config).parameters())
    assert config.num_parameters == count


@pytest.mark.parametrize("name", PRESETS)
def test_num_parameters_counts_the_weights(name: str) -> None:
    for tied in (True, False):
        config = ModelConfig(
            vocab_size=512, tie_word_embeddings=tied, **dataclasses.asdict(PRESETS[name])
        )
        with torch.device("meta"):
            assert config.num_parameters == sum(
                weight.numel() for weight in Transformer(config).parameters()
            )


def test_initialisation_is_small_where_the_residual_stream_is_written() -> None:
    model = Transformer(shape(hidden_size=128, head_dim=16))
    model.initialise(torch.Generator().manual_seed(0))
    block = model.model.layers[0]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert torch.equal(block.input_layernorm.weight, torch.ones(128))
    model = Transformer(shape(attention_bias=True))
    model.initialise(torch.Generator().manual_seed(0))
    assert not model.model.layers[1].self_attn.k_proj.bias.any()


def test_impossible_shapes_are_all_named() -> None:
    with pytest.raises(UsageError) as error:
        Transformer(shape(num_key_value_heads=3, head_dim=7, sliding_window=0))
    for field in ("num_key_value_heads", "head_dim", "sliding_window"):
        assert field in str(error.value)
    for changes in (
        {"qk_norm": True, "attention_bias": True},
        {"attention_output_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "sliding_window": 8},
    ):
        with pytest.raises(UsageError, match="no family has these parts together"):
            Transformer(shape(**changes))
    with pytest.raises(UsageError, match=r"hidden_size \(60\) must be a multiple"):
        Transformer(shape(hidden_size=60))


def test_a_model_without_memory_needs_no_compiler_of_torch():
    """Its import takes longer than loading a small model."""
    program = (
        "import sys, torch\n"
        "from xinslm.model.config import ModelConfig\n"
        "from xinslm.model.transformer import Transformer\n"
        "with torch.device('meta'):\n"
        "    model = Transformer(ModelConfig(64, 32, 48, 2, 2, 1, 16))\n"
        "assert model.model.embed_tokens.weight.is_meta\n"
        "assert model.frequencies.device.type == 'cpu'\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
