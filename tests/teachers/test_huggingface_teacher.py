"""Teachers of several architectures against transformers' own logits, also where more follows the head."""

import numpy as np
import pytest
import torch
import transformers

from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.tokenizer.bpe import BPETokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
MODELS = {
    "Llama": (transformers.LlamaConfig, SHAPE),
    "Qwen2": (transformers.Qwen2Config, SHAPE),
    "Gemma2": (transformers.Gemma2Config, {**SHAPE, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "GPT2": (transformers.GPT2Config, {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    cls, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**settings)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = BPETokenizer(vocab_size=300)
    tokenizer.train(["a few words to learn some merges from, a few words more, and then some more words"])
    tokenizer.save(tmp_path)
    teacher = HuggingFaceTeacher(str(tmp_path))
    sequences = [np.arange(5, 25), np.arange(9, 16)]
    found = teacher.logits(teacher.states(sequences))
    with torch.no_grad():
        expected = torch.cat([model(torch.from_numpy(ids)[None]).logits[0] for ids in sequences])
    torch.testing.assert_close(found, expected[:, : tokenizer.vocab_size], atol=1e-6, rtol=1e-4)
