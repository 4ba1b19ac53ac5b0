"""Teachers of several architectures against transformers' own logits, also where more follows the
head.
"""

import json

import numpy as np
import pytest
import torch
import transformers

from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import open_model
from xinslm.sampling import UNFILTERED, Sampling
from xinslm.teachers.generate import prompt_ids
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.open import TeacherOptions, open_teacher
from xinslm.teachers.own import OwnTeacher
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.chat import end_ids

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
    "Qwen3": (transformers.Qwen3Config, {**SHAPE, "head_dim": 8}),
    "Mistral": (transformers.MistralConfig, {**SHAPE, "sliding_window": 6}),
    "DeepseekV3": (
        transformers.DeepseekV3Config,
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "GPT2": (
        transformers.GPT2Config,
        {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
}


@pytest.fixture
def saved(tmp_path):
    """Saves a random model of an architecture with a tokenizer beside it; gives the model in eval
    mode.
    """

    def save(name, **changes):
        cls, settings = MODELS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(cls(**{**settings, **changes})).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(8)  # peaked enough for a greedy choice to be a choice
        model.save_pretrained(tmp_path)
        tokenizer = BPETokenizer(vocab_size=300)
        tokenizer.train(
            ["a few words to learn some merges from, a few words more, and then some more words"]
        )
        tokenizer.save(tmp_path)
        return model

    return save


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path, saved):
    model = saved(name)
    teacher = HuggingFaceTeacher(open_model(tmp_path))
    sequences = [np.arange(5, 25), np.arange(9, 16)]
    found = teacher.logits(teacher.states(sequences))
    with torch.no_grad():
        expected = torch.cat([model(torch.from_numpy(ids)[None]).logits[0] for ids in sequences])
    torch.testing.assert_close(found, expected[:, : teacher.vocab_size], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "DeepseekV3"])
def test_teacher_is_in_eval_mode_and_scores_twice_alike(name, tmp_path, saved):
    saved(name, attention_dropout=0.5)
    teacher = HuggingFaceTeacher(open_model(tmp_path))
    assert teacher.model.config.attention_dropout == 0.5
    assert not any(module.training for module in teacher.model.modules())
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    first, second = (teacher.states([np.arange(5, 30), np.arange(9, 16)]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_writing_is_transformers_own_greedy_text(name, tmp_path, saved):
    """Prompts of different lengths in one batch, with a key-value cache, against `generate` on each
    alone.
    """
    model = saved(name)
    teacher = HuggingFaceTeacher(open_model(tmp_path))
    prompts = ["a few words", "some", "and then some more words from"]
    written = teacher.generate(prompts, [0, 1, 2], Sampling(temperature=0), 12)
    for prompt, found in zip(prompts, written, strict=True):
        ids = prompt_ids(teacher.tokenizer, prompt)
        never = list(range(teacher.vocab_size, model.config.vocab_size))
        expected = model.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(end_ids(teacher.tokenizer)),
            suppress_tokens=never,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        if found.finished:
            assert expected[-1] in end_ids(teacher.tokenizer)
            expected = expected[:-1]
        assert found.token_bytes == [teacher.tokenizer.token_bytes(token) for token in expected]


@pytest.mark.parametrize(("name", "key"), [("Gemma2", "num_hidden_layers"), ("GPT2", "n_layer")])
def test_more_layers_than_weights_are_refused_before_they_are_built(
    name, key, tmp_path, saved, monkeypatch
):
    saved(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 10**12}))
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("built")
    )
    with pytest.raises(XinslmError, match=r"has 1,000,000,000,000 layers, but .* only \d+"):
        open_teacher(str(tmp_path))


def test_a_prompt_beyond_the_context_is_refused(tmp_path, saved):
    saved("Llama")
    teacher = HuggingFaceTeacher(open_model(tmp_path))
    with pytest.raises(
        UsageError, match=r"a prompt has \d+ tokens, the context of teacher .* is 128"
    ):
        teacher.generate(["word " * 200], [0], UNFILTERED)


def test_the_real_model_continues_as_llama2c_does(shared_data):
    """`expected_greedy.json` is what llama2.c's own tests expect of this model."""
    folder = shared_data / "models" / "stories260K"
    expected = json.loads((folder / "expected_greedy.json").read_text())
    text = expected["expected"]
    teacher = HuggingFaceTeacher(open_model(folder))
    written = teacher.generate([""], [0], Sampling(temperature=0), 100)[0]
    assert len(written.text) > 100 and text.strip().startswith(written.text.strip())


@pytest.mark.parametrize("name", MODELS)
def test_four_families_run_in_our_transformer(name, tmp_path, saved):
    """Whichever runs it, logits, hidden states and fingerprint are transformers' own."""
    model = saved(name)
    teacher, theirs = open_teacher(str(tmp_path)), HuggingFaceTeacher(open_model(tmp_path))
    assert isinstance(teacher, OwnTeacher) == (name in ("Llama", "Mistral", "Qwen2", "Qwen3"))
    assert teacher.fingerprint == theirs.fingerprint and teacher.max_length == theirs.max_length
    sequences = [np.arange(5, 25), np.arange(9, 16)]
    with torch.no_grad():
        expected = torch.cat([model(torch.from_numpy(ids)[None]).logits[0] for ids in sequences])
    if isinstance(teacher, OwnTeacher):  # as on a GPU
        teacher.packs = False
        padded = teacher.logits(teacher.states(sequences))
        torch.testing.assert_close(padded, expected[:, : teacher.vocab_size], atol=1e-5, rtol=1e-4)
        teacher.packs = True
    found, hidden = teacher.states_and_hidden(sequences, (1, 2))
    torch.testing.assert_close(
        teacher.logits(found), expected[:, : teacher.vocab_size], atol=1e-5, rtol=1e-4
    )
    for ours, other in zip(hidden, theirs.states_and_hidden(sequences, (1, 2))[1], strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)
    assert isinstance(
        open_teacher(str(tmp_path), TeacherOptions(trust_remote_code=True)), HuggingFaceTeacher
    )
