"""T5 encoders as teachers against transformers itself, in both layouts, and where their tokens
stand in a text.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from small_encoders import CONFIGS, save_encoder, save_unigram
from small_models import TEXT, save_random_model
from xinslm.errors import XinslmError
from xinslm.teachers.encoder import EncoderTeacher, find_encoder


def open_encoder(folder):
    return EncoderTeacher(str(folder), find_encoder(str(folder)))


def test_encoders_are_found_in_both_layouts_and_nothing_else_is_taken_for_one(tmp_path):
    plain, pipeline = (
        save_encoder(tmp_path / "plain"),
        save_encoder(tmp_path / "flux", diffusers=True),
    )
    save_random_model(tmp_path / "llama")
    assert find_encoder(str(plain)) == plain
    assert (
        find_encoder(str(pipeline))
        == find_encoder(str(pipeline / "text_encoder_2"))
        == pipeline / "text_encoder_2"
    )
    assert find_encoder(str(tmp_path / "llama")) is find_encoder(str(tmp_path / "nowhere")) is None
    assert find_encoder("google/t5-v1_1-xxl") is None
    one, two = open_encoder(plain), open_encoder(pipeline)
    assert (
        one.fingerprint == two.fingerprint
        and one.tokenizer.fingerprint() == two.tokenizer.fingerprint()
    )
    assert open_encoder(pipeline / "text_encoder_2").fingerprint == one.fingerprint


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("diffusers", [False, True])
def test_hidden_states_are_those_of_transformers_whatever_shares_the_batch(
    kind, diffusers, tmp_path
):
    teacher = open_encoder(save_encoder(tmp_path / "e", diffusers, kind))
    assert (teacher.num_layers, teacher.hidden_size) == (3, 24)
    sequences = [np.arange(5, 30), np.arange(40, 47), np.array([9])]
    found = teacher.hidden(sequences, (1, 3))
    reference = CONFIGS[kind][1].from_pretrained(teacher.source.path).eval()
    at = 0
    for ids in sequences:
        with torch.no_grad():
            out = reference(
                torch.tensor([[*ids, teacher.tokenizer.end]]), output_hidden_states=True
            )
        here = slice(at, at + len(ids))
        torch.testing.assert_close(
            found[0][here], out.hidden_states[1][0, :-1], atol=1e-5, rtol=1e-4
        )
        # transformers' last entry is behind the final norm.
        last = reference.encoder.final_layer_norm(found[1][here])
        torch.testing.assert_close(last, out.last_hidden_state[0, :-1], atol=1e-5, rtol=1e-4)
        at += len(ids)
    assert at == len(found[0]) == len(found[1])


def test_dropout_is_off(tmp_path):
    folder = save_encoder(tmp_path / "e", dropout_rate=0.5)
    teacher, ids = open_encoder(folder), [np.arange(5, 30)]
    assert torch.equal(teacher.hidden(ids, (3,))[0], teacher.hidden(ids, (3,))[0])
    teacher.model.train()
    assert not torch.equal(teacher.hidden(ids, (3,))[0], teacher.hidden(ids, (3,))[0]), (
        "this test can see dropout"
    )


def test_bytes_that_tokens_cover_survive_the_normaliser(tmp_path):
    """Spaces collapse, ligatures and fractions fall apart, emoji have four bytes."""
    save_encoder(tmp_path / "e")
    teacher = open_encoder(tmp_path / "e")
    text = "  Zwölf   dogs\tjump ½ ﬁne 12345. 😀 fox  "
    (reading,) = teacher.tokenizer.read([text])
    data, covered = text.encode(), []
    for token, begin, end in zip(reading.ids, reading.begins, reading.ends, strict=True):
        data[begin:end].decode()  # whole characters
        piece = (
            teacher.tokenizer.fast.convert_ids_to_tokens(int(token))
            .replace("▁", "")
            .replace("<unk>", "")
        )
        covered.append((piece, data[begin:end].decode()))
    assert all(
        not piece or piece in span.strip() or span.strip() in "½ﬁ" for piece, span in covered
    )
    assert reading.ends[-1] == len(text.rstrip().encode()) and bool(
        (np.diff(reading.ends) >= 0).all()
    )
    assert teacher.tokenizer.read([""])[0].ids.size == 0


def test_broken_encoders_are_refused_by_name(tmp_path):
    folder = save_encoder(tmp_path / "e")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file(
        {k: v for k, v in weights.items() if k != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        XinslmError, match=r"1 weights are missing or misshapen, such as 'encoder.block.1.layer.1"
    ):
        open_encoder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(XinslmError, match="a pickle, which can run code"):
        open_encoder(folder)
    small = save_encoder(tmp_path / "small", vocab_size=100)
    with pytest.raises(
        XinslmError, match="its embedding only 100 rows; the tokenizer belongs to another model"
    ):
        open_encoder(small)
    bare = save_encoder(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(XinslmError, match="has no tokenizer: neither"):
        open_encoder(bare)
    # a folder beside it that is not the diffusers name
    save_unigram(tmp_path / "tokenizer_9", TEXT)
    with pytest.raises(XinslmError, match="has no tokenizer"):
        open_encoder(bare)
