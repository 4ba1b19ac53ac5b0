"""Model folders: exchanged with transformers in both directions, and every damaged kind refused by
name.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export_gguf
from xinslm.model.config import ModelConfig, UnsupportedModelError
from xinslm.model.files import load_config, load_model, open_model, save_model
from xinslm.model.transformer import Transformer
from xinslm.quantize.pipeline import Quantization
from xinslm.teachers.open import TeacherOptions, open_teacher
from xinslm.tokenizer.load import load_tokenizer

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WRONG_KIND = (
    '{"model_type": "llama", "vocab_size": 9, "hidden_size": "x", "num_attention_heads": 2}'
)
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def shape(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Our model with random weights and norms."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.dim() == 1))
    return model


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(IDS))


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


CONFIGS = {
    "llama": (TINY, LlamaForCausalLM),
    "llama untied": (shape(tie_word_embeddings=False), LlamaForCausalLM),
    "llama3 rope": (shape(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0), LlamaForCausalLM),
    "mistral": (shape(sliding_window=6), MistralForCausalLM),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder."""
    save_model(random_model(TINY), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(name: str, tmp_path: Path) -> None:
    config, kind = CONFIGS[name]
    model = random_model(config)
    save_model(model, tmp_path)
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(other) is kind
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert_near(logits_of(model), other(IDS).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_transformers_saves(name: str, tmp_path: Path) -> None:
    config, kind = CONFIGS[name]
    values = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    reference = kind(
        {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}[kind](**values)
    ).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (weight.dim() == 1))
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not model.training
    with torch.no_grad():
        assert_near(logits_of(model), reference(IDS).logits)


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = shape(sliding_window=6, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    save_model(random_model(config), tmp_path)
    assert load_config(tmp_path) == config


def test_several_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder)
    other.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(tmp_path / "shards")), logits_of(load_model(folder)))
    first = min((tmp_path / "shards").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(XinslmError, match=f"{first.name} is missing"):
        load_model(tmp_path / "shards")


def test_half_precision_on_disk(tmp_path: Path) -> None:
    model = random_model(TINY)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    loaded = load_model(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "1,000,000,000,000 layers, but .* only 20 weights"),
        ("vocab_size", 10**15, "parameters, but .* only"),
        ("intermediate_size", 10**30, "parameters, but .* only"),
    ],
)
def test_a_shape_that_its_weights_cannot_fill_is_refused_before_it_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key, value, message
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    monkeypatch.setattr("xinslm.model.source.Transformer", lambda *_: pytest.fail("it was built"))
    for build in (
        lambda: load_model(folder),
        lambda: Quantization(open_model(folder), 4, [], lambda _: None),
        lambda: export_gguf(GgufConfig(folder, folder / "m.gguf")),
    ):
        with pytest.raises(XinslmError, match=rf"config\.json has .*{message}"):
            build()


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(XinslmError, match=r"pytorch_model\.bin, a pickle"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_half_written_weight_file_is_refused(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(XinslmError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(folder)


def change(folder: Path, edit) -> None:
    """Rewrite the weights after `edit` has changed them."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_wrong_weights_are_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(5, 64)}))
    with pytest.raises(
        XinslmError, match=rf"'{name}' has shape \(5, 64\), but .*config.json requires \(96, 64\)"
    ):
        load_model(folder)
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(XinslmError, match=f"1 weights are missing, the first is '{name}'"):
        load_model(folder)
    change(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(2)}))
    with pytest.raises(XinslmError, match=r"'model\.layers\.0\.extra' is not part of"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config is"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ("num_key_value_heads", 3, "must divide num_attention_heads"),
    ],
)
def test_what_the_model_cannot_express_is_refused(
    folder: Path, key: str, value, message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(XinslmError, match=message):
        load_config(folder)


QWEN = {"model_type": "qwen2", "num_hidden_layers": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 8}, None),
        ({"use_sliding_window": True, "sliding_window": 8}, None),  # from the 28th layer on
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "2 of 4"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, "3 of 4"),
        ({"layer_types": ["full_attention"] * 4, "use_sliding_window": True}, None),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "2 of 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "0 of 4"),
        ({"layer_types": ["chunked_attention"] * 4, "use_sliding_window": True}, "0 of 4"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_window_of_qwen(family: str, changes, window) -> None:
    """As transformers lays it out; what is not the same in all layers is refused."""
    values = {**TINY.to_hf(), **QWEN, "model_type": family, **changes}
    for key in {"use_sliding_window", "sliding_window"} - changes.keys():
        values.pop(key, None)
    if isinstance(window, str):
        with pytest.raises(UnsupportedModelError, match=rf"{window} layers see all tokens"):
            ModelConfig.from_hf(values)
        return
    config = ModelConfig.from_hf(values)
    assert config.sliding_window == window
    theirs = AutoConfig.for_model(**values)
    assert set(theirs.layer_types) == {"full_attention" if window is None else "sliding_attention"}
    assert theirs.sliding_window == window or window is None


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("qwen3", "attention_bias", True, r"attention_bias is True.*own qwen3 model"),
        ("mistral", "attention_bias", True, r"attention_bias is True.*own mistral model"),
        ("qwen2", "layer_types", ["full_attention"], "layer_types must list 2 types"),
        ("qwen2", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ("qwen2", "use_sliding_window", 1, "use_sliding_window is 1, but must be true or false"),
        ("qwen3", "head_dim", 33, "head_dim is 33"),
        ("qwen3_moe", "head_dim", 32, "own model is 'llama', 'mistral', 'qwen2' or 'qwen3'"),
    ],
)
def test_what_a_family_cannot_have_is_named(family: str, key: str, value, message: str) -> None:
    values = {**TINY.to_hf(), "model_type": family, key: value}
    values.pop("rope_parameters")
    with pytest.raises(XinslmError, match=message):
        ModelConfig.from_hf(values)


def test_missing_keys_mean_what_transformers_takes() -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        values = {key: TINY.to_hf()[key] for key in sizes} | {"num_attention_heads": 32}
        values |= {"model_type": family, "hidden_size": 256}
        ours, theirs = ModelConfig.from_hf(values), AutoConfig.for_model(**values)
        for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key), (family, key)
        assert ours.head_dim == getattr(theirs, "head_dim", 256 // 32)
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("content", ["{", "", "[1]", "null", '{"model_type": "llama"}', WRONG_KIND])
def test_a_broken_config_is_an_error_that_names_it(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(XinslmError, match=r"config\.json"):
        load_config(folder)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_keys_left_out_mean_what_transformers_takes_them_for(folder: Path, family: str) -> None:
    path = folder / "config.json"
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    values = {k: v for k, v in json.loads(path.read_text()).items() if k in kept}
    path.write_text(json.dumps({**values, "model_type": family, "num_attention_heads": 16}))
    ours, theirs = load_config(folder), AutoConfig.from_pretrained(folder)
    for key in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_run_folder_means_its_best_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    last = tmp_path / "run" / "checkpoints" / "last"
    folder.rename(last)
    assert open_model(tmp_path / "run").path == last
    best = tmp_path / "run" / "checkpoints" / "best"
    save_model(random_model(TINY, seed=5), best)
    assert open_model(tmp_path / "run").path == best
    assert open_model(best).path == best


def test_what_is_no_model_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a model folder"):
        open_model(tmp_path)
    with pytest.raises(UsageError, match="there is no model at"):
        open_model(tmp_path / "absent" / "deep")


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_name_without_owner_is_explained(revision: str | None) -> None:
    for name in ("gpt2", "bert-base.v2"):
        for read in (
            lambda name: open_teacher(name, TeacherOptions(revision=revision)),
            load_tokenizer,
        ):
            with pytest.raises(UsageError, match=rf"{name}.*OWNER/NAME, .* openai-community/gpt2"):
                read(name)


def test_the_fingerprint_follows_the_weights_not_the_folder(folder: Path, tmp_path: Path) -> None:
    model = random_model(TINY)
    save_model(model, tmp_path / "again")
    assert open_model(tmp_path / "again").fingerprint == open_model(folder).fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    save_model(model, tmp_path / "again")
    assert open_model(tmp_path / "again").fingerprint != open_model(folder).fingerprint
    save_model(random_model(shape(rope_theta=5e5)), tmp_path / "theta")
    assert open_model(tmp_path / "theta").fingerprint != open_model(folder).fingerprint


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("hidden_size", "64", '"64"'),
        ("hidden_size", None, "null"),
        ("vocab_size", True, "true"),
        ("num_hidden_layers", 2.0, "2.0"),
        ("num_attention_heads", [4], "[4]"),
        ("num_key_value_heads", "2", '"2"'),
        ("num_key_value_heads", False, "false"),
        ("head_dim", 16.0, "16.0"),
        ("intermediate_size", {}, "{}"),
        ("max_position_embeddings", None, "null"),
        ("rms_norm_eps", "1e-5", '"1e-5"'),
        ("rms_norm_eps", float("nan"), "NaN"),
        ("tie_word_embeddings", "false", '"false"'),
        ("tie_word_embeddings", None, "null"),
        ("bos_token_id", "1", '"1"'),
        ("eos_token_id", [True], "[true]"),
        ("rope_parameters", [1], "[1]"),
        ("rope_parameters", "linear", '"linear"'),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(
    folder: Path, key: str, value, shown: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for read in (load_config, load_model):
        with pytest.raises(XinslmError) as caught:
            read(folder)
        assert str(caught.value).startswith(f"{path}: {key} is {shown}, but must be ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta is "),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1.0, but must be above 0"),
        ({"rope_parameters": None, "rope_theta": True}, "rope_theta is true"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'rope_parameters.factor' is missing"),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": "8"}}, "rope_parameters.factor is "),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
            "other than high_freq_factor",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads .0. must divide"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0"),
    ],
)
def test_numbers_that_no_model_has_are_named_with_the_file(
    folder: Path, changes: dict, message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(XinslmError, match=message) as caught:
        load_config(folder)
    assert str(caught.value).startswith(f"{path}: ") and not isinstance(caught.value, UsageError)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_shard_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(XinslmError, match=r"index\.json: must contain a 'weight_map'"):
        load_model(folder)
