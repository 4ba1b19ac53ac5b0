"""GGUF teachers: the weights and tokenizers in the file, against our models, gguf's own
quantization and llama.cpp.
"""

import shutil

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from llama_cpp import LlamaCpp
from small_models import TEXT, save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export
from xinslm.model.files import load_model
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.sampling import Sampling
from xinslm.teachers.open import TeacherOptions, open_teacher
from xinslm.teachers.own import OwnTeacher
from xinslm.tokenizer.gguf import read_tokenizer
from xinslm.tokenizer.load import load_tokenizer

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(5, 320, length)


def logits_of(model, ids):
    with torch.no_grad():
        return model.logits(model.hidden(torch.from_numpy(ids)[None]))[0]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "rope_theta": 500000.0},
        {"rope_scaling": LLAMA3_SCALING},
        {"vocab_size": 331},
    ],
    ids=["tied GQA", "untied", "llama3 rope", "padded vocabulary"],
)
def test_logits_are_those_of_the_model_that_was_exported(tmp_path, changes, dtype):
    model = save_random_model(tmp_path / "model", **changes)
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype=dtype))
    if dtype != "f32":
        kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data = weight.data.to(kind).float()
    teacher = open_teacher(str(tmp_path / "m.gguf"))
    assert isinstance(teacher, OwnTeacher) and (teacher.vocab_size, teacher.max_length) == (
        320,
        128,
    )
    assert not teacher.model.training
    texts = [prompt(40), prompt(7, 1)]
    found = teacher.logits(teacher.states(texts))
    expected = torch.cat([logits_of(model, ids) for ids in texts])[:, :320]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_files_are_the_quantized_model(tmp_path, bits):
    save_random_model(tmp_path / "model", tie_word_embeddings=False)
    quantize(QuantizeConfig(tmp_path / "model", tmp_path / "q", method="rtn", bits=bits))
    export(GgufConfig(tmp_path / "q", tmp_path / "m.gguf"))
    assert {t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors} >= {f"Q{bits}_0"}
    teacher = open_teacher(str(tmp_path / "m.gguf"))
    ids = prompt(30)
    expected = logits_of(load_model(tmp_path / "q"), ids)
    torch.testing.assert_close(
        teacher.logits(teacher.states([ids])), expected, atol=2e-5, rtol=1e-5
    )


def test_real_model_against_llama_cpp_on_the_same_file(shared_data, tmp_path):
    """llama.cpp is the independent reader: its log-probabilities and ids on the same file."""
    export(GgufConfig(shared_data / "models" / "stories260K", tmp_path / "m.gguf", outtype="f32"))
    teacher = open_teacher(str(tmp_path / "m.gguf"))
    text = "Once upon a time, there was a little girl named Lily. She liked to play outside"
    ids = np.array([teacher.tokenizer.bos_id, *teacher.tokenizer.encode(text)])
    ours = teacher.logits(teacher.states([ids])).double().log_softmax(1)[-1].numpy()
    with LlamaCpp(tmp_path / "m.gguf", 512) as llama:
        assert llama.tokenize(text, add_special=True) == ids.tolist()
        theirs = llama.next_logprobs(ids.tolist(), 512)
    assert np.abs(ours - theirs).max() < 1e-4
    original = load_tokenizer(shared_data / "models" / "stories260K")
    assert teacher.tokenizer.fingerprint() == original.fingerprint(), (
        "caches fit datasets of either"
    )


def test_byte_level_tokenizer_comes_back_as_it_was(tmp_path):
    save_random_model(tmp_path / "model")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    ours, original = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(tmp_path / "model")
    assert ours.fingerprint() == original.fingerprint()
    assert (
        ours.encode(TEXT) == original.encode(TEXT) and ours.chat_template == original.chat_template
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == original.apply_chat_template(chat)


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_llama_cpps_own_vocabularies_and_test_vectors(shared_data, name):
    """Files and ids that llama.cpp's repository carries: other people wrote them."""
    file = shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(file)
    texts = (
        file.with_name(file.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    )
    wanted = [
        [int(x) for x in line.split()]
        for line in file.with_name(file.name + ".out").read_text().split("\n")
    ]
    assert len(texts) > 40
    for text, ids in zip(texts, wanted, strict=False):
        assert tokenizer.encode(text) == ids, text


def test_writing_is_the_models_greedy_choice_whatever_shares_the_batch(tmp_path):
    model = save_random_model(tmp_path / "model")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    teacher = open_teacher(str(tmp_path / "m.gguf"))
    prompts = ["The quick brown fox", "It", "Numbers: 0 1 22 333 and naïve"]
    found = teacher.generate(prompts, [0, 1, 2], Sampling(temperature=0), 20)
    ends = {teacher.tokenizer.bos_id, teacher.tokenizer.eos_id}
    for text, written in zip(prompts, found, strict=True):
        ids = teacher.tokenizer.encode(text)
        expected, values, ended = [], [], False
        while len(expected) < 20 and not ended:
            log_p = logits_of(model, np.array(ids + expected))[-1].log_softmax(0)
            token = int(log_p.argmax())
            ended = token in ends or token == teacher.tokenizer.special_tokens["<|end|>"]
            if not ended:
                expected.append(token)
                values.append(log_p[token].item())
        assert written.token_bytes == [teacher.tokenizer.token_bytes(t) for t in expected]
        assert written.log_probs == pytest.approx(values, abs=1e-4)
        assert written.finished == ended
    alone = teacher.generate(["It"], [1], Sampling(temperature=0), 20)[0]
    assert alone.text == found[1].text and alone.log_probs == pytest.approx(
        found[1].log_probs, abs=1e-4
    )


def foreign(path, architecture, **keys):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for name, value in keys.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_that_cannot_teach_are_refused_by_name(tmp_path):
    foreign(tmp_path / "other.gguf", "rwkv6")
    save_random_model(tmp_path / "model")
    tokenizer = str(tmp_path / "model")
    with pytest.raises(UsageError, match=r"contains no tokenizer.*--teacher-tokenizer-path"):
        load_tokenizer(tmp_path / "other.gguf")
    with pytest.raises(UsageError, match=r"holds a rwkv6 model; .*Hugging Face folder"):
        open_teacher(str(tmp_path / "other.gguf"), TeacherOptions(tokenizer=tokenizer))
    foreign(tmp_path / "moe.gguf", "llama", expert_count=4)
    with pytest.raises(UsageError, match="mixture-of-experts"):
        open_teacher(str(tmp_path / "moe.gguf"), TeacherOptions(tokenizer=tokenizer))
    foreign(tmp_path / "bare.gguf", "llama")
    with pytest.raises(XinslmError, match=r"key 'llama.attention.head_count' is missing"):
        open_teacher(str(tmp_path / "bare.gguf"), TeacherOptions(tokenizer=tokenizer))
    with pytest.raises(UsageError, match="there is no file"):
        open_teacher("nowhere.gguf")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    data = (tmp_path / "m.gguf").read_bytes()
    for size in (3, 100, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(XinslmError, match=r"not a whole GGUF file|ends at byte"):
            open_teacher(str(tmp_path / "cut.gguf"))


def rewrite(path, edit):
    """Change numbers of a file in place; `edit` finds (place, value) with gguf's reader."""
    reader = GGUFReader(path)
    part, value = edit(reader)
    base = reader.data.__array_interface__["data"][0]
    at = part.__array_interface__["data"][0] - base
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array(value, part.dtype).tobytes())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda reader: reader.tensors[1].data_offset - reader.data_offset, "overlaps '"),
        (
            lambda reader: reader.tensors[3].data_offset - reader.data_offset + 4,
            "not aligned to 32",
        ),
        (
            lambda reader: (len(reader.data) - reader.data_offset) // 32 * 32 - 64,
            "overlaps|not a w",
        ),
        (lambda reader: 2**40, "not a whole GGUF|ends at byte"),
        (lambda reader: 2**64 - 32, "overlaps the header|not a whole GGUF|ends at byte"),
    ],
    ids=["overlap", "misaligned", "past the end", "far behind the end", "negative"],
)
def test_tensors_that_overlap_or_leave_the_file_are_refused(tmp_path, place, message):
    save_random_model(tmp_path / "model")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    open_teacher(str(tmp_path / "m.gguf"))
    rewrite(
        tmp_path / "m.gguf",
        lambda reader: (reader.tensors[3].field.parts[5], int(place(reader))),
    )
    with pytest.raises(XinslmError, match=message):
        open_teacher(str(tmp_path / "m.gguf"))


def test_more_blocks_than_the_file_can_hold_are_refused_before_they_are_built(
    tmp_path, monkeypatch
):
    save_random_model(tmp_path / "model")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    rewrite(
        tmp_path / "m.gguf",
        lambda reader: (reader.fields["llama.block_count"].parts[-1], 10**6),
    )
    monkeypatch.setattr("xinslm.model.source.Transformer", lambda *_: pytest.fail("it was built"))
    with pytest.raises(XinslmError, match=r"m.gguf has 1,000,000 layers, but .* only \d+ w"):
        open_teacher(str(tmp_path / "m.gguf"))


def test_a_missing_weight_is_named(tmp_path):
    save_random_model(tmp_path / "model")
    export(GgufConfig(tmp_path / "model", tmp_path / "m.gguf"))
    source = GGUFReader(tmp_path / "m.gguf")
    writer = GGUFWriter(tmp_path / "less.gguf", "llama")
    for key, field in source.fields.items():
        if key.startswith("llama."):
            value = field.contents()
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for tensor in source.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        XinslmError,
        match=r"1 weights are missing, the first is 'model.layers.1.mlp.up_proj.weight'",
    ):
        open_teacher(str(tmp_path / "less.gguf"), TeacherOptions(tokenizer=str(tmp_path / "model")))
    shutil.rmtree(tmp_path / "model")


def test_unknown_split_rules_ask_for_the_tokenizer():
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.token_type": [1],
    }
    with pytest.raises(
        UsageError, match=r"split rule 'tekken' is not supported.*--teacher-tokenizer-path"
    ):
        read_tokenizer(keys, "x.gguf")
    with pytest.raises(UsageError, match="tokenizer of kind 'bert'"):
        read_tokenizer({**keys, "tokenizer.ggml.model": "bert"}, "x.gguf")
