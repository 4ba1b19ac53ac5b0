"""Files of one model are the same, whatever their kind; each planted difference is named."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import FAMILIES, TEMPLATE, save_random_model, save_tokenizer
from xinslm.cli.main import main
from xinslm.commands import run
from xinslm.doctor.config import CompareConfig
from xinslm.doctor.text import TEXTS
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig, HfConfig, ImportConfig, MlxConfig
from xinslm.quantize.config import QuantizeConfig

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
KINDS = {
    "folder": lambda model, out: ImportConfig(model, out),
    "gguf": lambda model, out: GgufConfig(model, out),
    "compressed-tensors": lambda model, out: HfConfig(model, out),
    "gptq": lambda model, out: HfConfig(model, out, format="gptq"),
    "mlx": lambda model, out: MlxConfig(model, out),
}


def compare(a, b, **changes):
    return run(CompareConfig(a, b, **changes))


def details(result):
    return {check.name: check.detail for check in result.checks}


def status(result):
    return {check.name: check.status for check in result.checks}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    save_random_model(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    run(QuantizeConfig(full, folder / "q", method="rtn"))
    return folder / "q"


@pytest.fixture
def copy(full, tmp_path):
    return shutil.copytree(full, tmp_path / "copy")


def change_weights(folder, change, file="model.safetensors"):
    """Apply `change` to a folder's tensors; a manifest, which would name the damage, goes."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, {"format": "pt"})


def change_json(folder, file, **changes):
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_the_same_model_in_both_orders(quantized, tmp_path, kind):
    path = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    run(KINDS[kind](quantized, path))
    for pair in ((quantized, path), (path, quantized)):
        result = compare(*pair)
        assert result.verdict == "the same model" and not result.failed, result.describe()
        found = status(result)
        skipped = {name for name in found if found[name] == "skipped"}
        expected = {"gguf": {"generation settings"}, "folder": {"codes"}}.get(kind, set())
        assert skipped == expected, result.describe()
    if kind not in ("folder", "gguf"):
        codes = {"compressed-tensors": 14, "gptq": 14, "mlx": 15}[kind]
        assert f"codes and scales of {codes} weights equal" in details(result)["codes"]


def test_rounding_is_told_apart_and_names_what_is_rounded(quantized, tmp_path, capsys):
    run(HfConfig(quantized, tmp_path / "hf", dtype="bfloat16"))
    assert main(["doctor", "compare", str(quantized), str(tmp_path / "hf")]) == 0
    shown = capsys.readouterr().out
    assert "14 of 20 weights equal" in shown
    assert "verdict  the same model, rounded: the embedding and 5 norms to bfloat16 in B" in shown
    other = compare(tmp_path / "hf", quantized)
    assert other.rounded == "the embedding and 5 norms to bfloat16 in A"


def test_two_roundings_of_the_same_weights_are_the_same(full, tmp_path):
    """Values that float16 rounds to the middle of two bfloat16 numbers; values below float16's
    normal range, where bfloat16 has more digits.
    """
    folders = {}
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        folders[name] = shutil.copytree(full, tmp_path / name)

        def change(tensors, dtype=dtype):
            weight = tensors[K_PROJ]
            middle = torch.tensor(1 + 2**-8)  # between bfloat16's 1 and 1 + 2^-7
            weight[0, :2] = torch.stack((middle + 2**-13, middle - 2**-13))
            weight[1] = torch.linspace(1e-7, 3e-6, weight.shape[1])
            for key in tensors:
                tensors[key] = tensors[key].to(dtype)

        change_weights(folders[name], change)
    result = compare(folders["half"], folders["brain"])
    assert not result.failed and " to bfloat16 in B" in result.verdict, result.describe()

    def nudge(tensors):
        bits = tensors[K_PROJ].view(torch.int16)
        bits[3, 3] += 1

    change_weights(folders["brain"], nudge)
    assert compare(folders["half"], folders["brain"]).failed == ["weights"]


def test_other_values_are_counted_and_measured(full, copy, capsys):
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    noise[10:] = 0

    def change(tensors):
        tensors[K_PROJ] += noise
        tensors["model.norm.weight"] *= 2

    before = load_file(full / "model.safetensors")[K_PROJ].numpy().astype(np.float64)
    change_weights(copy, change)
    after = load_file(copy / "model.safetensors")[K_PROJ].numpy().astype(np.float64)
    relative = np.linalg.norm(after - before) / np.linalg.norm(before)
    count, largest = int((after != before).sum()), np.abs(after - before).max()
    assert main(["doctor", "compare", str(full), str(copy)]) == 1
    shown = capsys.readouterr()
    assert f"{K_PROJ}: {count:,} of 4,096 values, by at most {largest:.3g}" in shown.out
    assert f"relative error {relative:.2g}" in shown.out
    assert "18 of 20 weights equal, 2 different" in shown.out
    assert "verdict  different models: weights" in shown.out
    assert "error: 1 of 6 checks failed: weights" in shown.err


def test_unrelated_weights_are_called_so(full, tmp_path):
    save_random_model(tmp_path / "other", seed=1)
    result = compare(full, tmp_path / "other")
    assert result.failed == ["weights"]
    assert "nothing in common" in details(result)["weights"] and "and 15 more" in str(result)


def test_a_quantized_model_and_its_origin(full, quantized):
    result = compare(full, quantized)
    assert result.failed == ["weights"] and "B is quantized" in details(result)["weights"]
    assert details(result)["codes"].startswith("only one model has codes")


def requantized(quantized, tmp_path, change):
    folder = shutil.copytree(quantized, tmp_path / "changed")
    change_weights(folder, change, "quantized.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop("quantized.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_codes_and_scales_that_differ_are_counted(quantized, tmp_path):
    stem = K_PROJ.removesuffix(".weight")

    def change(tensors):
        tensors[f"{stem}.codes"][5, 3] ^= 0x11  # two codes a byte
        tensors["model.layers.0.mlp.up_proj.scales"][0, 1] *= 2

    result = compare(quantized, requantized(quantized, tmp_path, change))
    assert result.failed == ["weights", "codes"]
    assert f"{K_PROJ}: 2 of 4,096 codes and 0 of 128 scales differ" in details(result)["codes"]
    assert "up_proj.weight: 0 of 6,144 codes and 1 of 192 scales" in details(result)["codes"]


def test_other_codes_of_the_same_values_are_no_difference(quantized, tmp_path):
    """Codes and scale of a block with the other sign."""
    stem = K_PROJ.removesuffix(".weight")

    def change(tensors):
        scales, packed = tensors[f"{stem}.scales"], tensors[f"{stem}.codes"].view(-1, 16)
        low, high = packed & 15, packed >> 4
        row = int((torch.minimum(low, high).amin(1) > 0).nonzero()[0])  # no code of -8
        packed[row] = (16 - low[row]) | ((16 - high[row]) << 4)
        scales.view(-1)[row] *= -1

    result = compare(quantized, requantized(quantized, tmp_path, change))
    assert not result.failed and result.verdict == "the same model", result.describe()
    assert "of 1 different, which stand for the same values" in details(result)["codes"]


def test_a_head_that_is_the_embedding_is_the_same(full, copy):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_weights(copy, untie)
    change_json(copy, "config.json", tie_word_embeddings=False)
    result = compare(full, copy)
    assert not result.failed and "A shares the LM head" in details(result)["weights"]
    change_weights(copy, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    assert compare(copy, full).failed == ["weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta is 10000.0 in A, 500000.0 in B"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in A, 1e-06 in B"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window is None in A, 16 in B"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 128 in A, 64 in B"),
    ],
)
def test_a_configuration_that_computes_something_else(full, copy, changes, message):
    change_json(copy, "config.json", **changes)
    result = compare(full, copy)
    assert result.failed == ["configuration"] and message in details(result)["configuration"]


def test_shapes_and_missing_weights_are_named(full, tmp_path):
    save_random_model(tmp_path / "other", num_hidden_layers=1, intermediate_size=64)
    result = compare(full, tmp_path / "other")
    assert result.failed == ["configuration", "weights"]
    found = details(result)["weights"]
    assert "only in A: model.layers.1." in found and "and 8 more" in found
    assert "model.layers.0.mlp.down_proj.weight has shapes (64, 96) and (64, 64)" in found


def test_weights_that_are_not_finite(full, copy):
    change_weights(copy, lambda tensors: tensors[K_PROJ].fill_(float("nan")))
    result = compare(full, copy)
    assert result.failed == ["weights"] and "holds NaN" in details(result)["weights"]
    assert status(result)["codes"] == "skipped"


def test_ids_that_mean_other_bytes(full, copy):
    spec = json.loads((copy / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["q"], vocab["z"] = vocab["z"], vocab["q"]
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    result = compare(full, copy)
    assert result.failed == ["tokenizer"]
    assert "2 of 320 ids mean other bytes" in details(result)["tokenizer"]
    skipped = compare(full, copy, predictions=True, device="cpu")
    assert status(skipped)["predictions"] == "skipped"


def test_another_split_rule_is_found_by_the_sample_texts(full, copy):
    spec = json.loads((copy / "tokenizer.json").read_text())
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}")
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    # merges of digits make the difference visible; a vocabulary without them has none
    vocab = spec["model"]["vocab"]
    if not any(len(piece) > 1 and piece.isdigit() for piece in vocab):
        pytest.fail("the fixture's tokenizer has no merged digits")
    result = compare(full, copy)
    assert result.failed == ["tokenizer"]
    assert "split by another rule" in details(result)["tokenizer"]


def test_roles_of_ids(full, copy):
    change_json(copy, "tokenizer_config.json", eos_token="<|begin|>")
    assert "EOS is 1 in A, 0 in B" in details(compare(full, copy))["tokenizer"]


def test_templates_that_differ_for_tools_alone(full, copy):
    path = copy / "chat_template.jinja"
    path.write_text("{% if tools %}{{ tools[0].function.name }}{% endif %}" + TEMPLATE)
    result = compare(full, copy)
    assert result.failed == ["chat template"]
    assert "chats with tools differ" in details(result)["chat template"]
    path.write_text("{# the same #}" + TEMPLATE)
    result = compare(full, copy)
    assert not result.failed and "two templates" in details(result)["chat template"]
    path.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    found = details(compare(full, copy))["chat template"]
    assert "chats with a system prompt differ: only the template of B refuses" in found


def test_a_missing_template_and_missing_tokenizers(full, copy):
    save_tokenizer(copy, template=None)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    assert "B has no chat template" in details(compare(full, copy))["chat template"]
    for file in copy.glob("tokenizer*"):
        file.unlink()
    result = compare(full, copy)
    assert result.failed == ["tokenizer"] and status(result)["chat template"] == "skipped"
    assert status(compare(copy, copy))["tokenizer"] == "skipped"


def test_settings_of_generation(full, copy):
    change_json(copy, "generation_config.json", temperature=0.2, transformers_version="9")
    result = compare(full, copy)
    assert result.failed == ["generation settings"]
    assert "temperature is None in A, 0.2 in B" in details(result)["generation settings"]


def test_predictions_are_those_of_transformers(full, quantized, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(ImportConfig(quantized, tmp_path / "same"))
    same = compare(quantized, tmp_path / "same", predictions=True, device="cpu")
    assert not same.failed and "KL(A, B) 0 nats" in details(same)["predictions"]
    result = compare(full, quantized, predictions=True, device="cpu")
    assert result.failed == ["weights", "predictions"]
    tokenizer = AutoTokenizer.from_pretrained(full)
    kl = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        logs = []
        for folder in (full, tmp_path / "same"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                logs.append(model(ids).logits[0].double().log_softmax(-1))
        kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    mean, largest = torch.cat(kl).mean().item(), torch.cat(kl).max().item()
    assert f"KL(A, B) {mean:.2g} nats a token on {len(torch.cat(kl))} tokens" in str(result)
    assert f"at most {largest:.2g}" in str(result)


def test_models_that_only_transformers_knows(full, tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3TextConfig(**sizes, **heads)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "a")
    save_tokenizer(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "b").verdict == "the same model"
    change_json(tmp_path / "b", "config.json", rms_norm_eps=1e-4)
    assert compare(tmp_path / "a", tmp_path / "b").failed == ["configuration"]
    result = compare(full, tmp_path / "a")
    assert "model_type is llama in A, gemma3_text in B" in details(result)["configuration"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_compared_part_by_part(full, tmp_path, family):
    save_random_model(tmp_path / "a", **FAMILIES[family])
    run(GgufConfig(tmp_path / "a", tmp_path / "a.gguf", outtype="f32"))
    assert compare(tmp_path / "a", tmp_path / "a.gguf").verdict == "the same model"
    found = details(compare(full, tmp_path / "a"))["configuration"]
    part = "qk_norm" if family == "qwen3" else "attention_bias"
    assert f"{part} is False in A, True in B" in found
    kind = "qwen" in family
    assert (f"model_type is llama in A, {family} in B" in found) == kind


def test_a_model_that_cannot_be_opened_is_a_usage_error(full, tmp_path):
    with pytest.raises(UsageError, match="there is no model"):
        compare(full, tmp_path / "absent")
