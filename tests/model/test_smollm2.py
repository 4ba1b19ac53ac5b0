"""The real SmolLM2-135M-Instruct in 4 bits: weights, ids and greedy text of other programs' readers
of the same file.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_cpp import LlamaCpp
from smollm2 import find_smollm2
from xinslm.commands import run
from xinslm.export.config import ImportConfig
from xinslm.inference.config import GenerateConfig
from xinslm.tokenizer.load import load_tokenizer

TEXTS = [
    "The capital of France is Paris, and the capital of Germany is",
    "It's 12345 o'clock,  3.14  1 \n\n 7 Zwölf Boxkämpfer Съешь ещё мягких 我们在学习。１２３ ½",
    "  def f(x):\n\treturn x  # 😀👩‍👩‍👧 café \u00a0 1  \t2\r\n\r\n   ",
    "हिन्दी ภาษาไทย العربية עברית 한국어 日本語",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    result = run(ImportConfig(find_smollm2(), folder))
    assert (result.dtype, result.is_exact, result.has_template) == ("float32", True, True)
    return folder


def test_weights_are_ggufs_dequantized_ones_bit_for_bit(folder):
    stored = {tensor.name: tensor for tensor in GGUFReader(find_smollm2()).tensors}

    def dequantized(name):
        return quants.dequantize(stored[name].data, stored[name].tensor_type)

    with safe_open(folder / "model.safetensors", "np") as weights:
        assert len(weights.keys()) == len(stored) == 272
        for theirs, ours in (
            ("token_embd", "model.embed_tokens"),
            ("output_norm", "model.norm"),
            ("blk.3.ffn_down", "model.layers.3.mlp.down_proj"),
            ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
        ):
            assert (weights.get_tensor(f"{ours}.weight") == dequantized(f"{theirs}.weight")).all()
        # query rows of a head: llama.cpp has pairs (i, i + 32) as neighbours
        rows = dequantized("blk.0.attn_q.weight")[:64]
        ours = weights.get_tensor("model.layers.0.self_attn.q_proj.weight")[:64]
        for i in range(32):
            assert (ours[i] == rows[2 * i]).all() and (ours[i + 32] == rows[2 * i + 1]).all()


def test_the_folder_is_the_model_in_transformers_and_llama_cpp(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(find_smollm2())
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    with LlamaCpp(find_smollm2()) as llama:
        for text in TEXTS:
            ids = llama.tokenize(text, add_special=True)
            assert tokenizer(text).input_ids == ours.encode(text) == ids
        chat = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        ) == llama.apply_template(chat)
        written = llama.complete(TEXTS[0], 16)
        with torch.no_grad():
            found = model(torch.tensor([tokenizer(TEXTS[0]).input_ids])).logits[0, -1]
        theirs = llama.next_logprobs(tokenizer(TEXTS[0]).input_ids, 49152)
    # llama.cpp rounds activations to 8 bits
    likely = np.argsort(-theirs)[:8]
    assert np.abs(found.double().log_softmax(0).numpy() - theirs)[likely].max() < 0.5
    config = GenerateConfig(
        model=find_smollm2(), prompt=TEXTS[0], max_new_tokens=16, temperature=0.0
    )
    assert run(config).text == written


def test_ids_are_those_of_the_original_tokenizers_vocabulary(shared_data):
    """The vocabulary from other hands, with SmolLM2's rule as `tokenizers` runs it."""
    content = json.loads((shared_data / "tokenizers/smollm2/tokenizer.json").read_text())
    byte_level = content["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    original = Tokenizer.from_str(json.dumps(content | {"truncation": None}))
    ours = load_tokenizer(find_smollm2())
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text, add_special_tokens=False).ids


def test_no_token_is_put_in_front_of_a_text():
    tokenizer = load_tokenizer(find_smollm2())
    assert tokenizer.start_ids == [] and tokenizer.bos_id == 1
    ids, _ = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert ids[0] == 1
