"""Caches of encoder teachers: where student and encoder tokens end together, and training from
them.
"""

import json

import numpy as np
import pytest
import torch
import transformers

import training as train
from small_encoders import save_encoder
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.encoder_scorer import match_ends
from xinslm.cache.folder import Cache
from xinslm.cache.projected_states import (
    CachedHiddenStates,
    decode_projected_states,
    projection_matrix,
    rms_normalise,
)
from xinslm.cli.main import main
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset
from xinslm.distill.auxiliary_config import ContrastConfig, HiddenConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.teachers.encoder import EncoderTeacher, Reading, find_encoder
from xinslm.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def encoder(world, tmp_path_factory):
    text = "".join(json.loads(line)["text"] + "\n" for line in world.text.read_text().splitlines())
    return save_encoder(tmp_path_factory.mktemp("encoder") / "flux", diffusers=True, text=text)


def config(encoder, data, folder, **changes):
    settings = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "hidden_state_depths": (0.5, 1.0),
        "device": "cpu",
        **changes,
    }
    return CacheConfig(str(encoder), data, folder, **settings)


@pytest.fixture(scope="module")
def cache(world, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "cache"
    result = score.run(config(encoder, world.data, folder))
    assert (
        result.positions == 0
        and result.hidden_state_positions > 1000
        and "scored" not in result.describe()
    )
    return folder


def test_a_token_is_matched_only_where_both_end():
    reading = Reading(np.arange(5), np.array([0, 0, 3, 5, 5]), np.array([1, 3, 5, 6, 6]))
    # 1: the next token begins before it ends; 2, 4: inside; 6: the last of two that end there.
    assert match_ends(np.array([1, 2, 3, 4, 5, 6, 7]), reading).tolist() == [
        -1,
        -1,
        1,
        -1,
        2,
        4,
        -1,
    ]
    assert match_ends(np.array([1]), Reading(*(np.zeros(0, np.int64),) * 3)).tolist() == [-1]


def ends_of(teacher, text):
    """Byte -> number of the last encoder token that ends there, by way of decoding character
    offsets one by one.
    """
    encoded = teacher.tokenizer.fast(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    found = {}
    for number, (_, end) in enumerate(offsets):
        if number + 1 == len(offsets) or offsets[number + 1][0] >= end:
            found[len(text[:end].encode())] = number
    return encoded["input_ids"], found


def test_projected_states_are_the_encoders_states_at_common_ends_and_entries_are_uncovered(
    world, encoder, cache
):
    teacher = EncoderTeacher(str(encoder), find_encoder(str(encoder)))
    reference = transformers.T5EncoderModel.from_pretrained(encoder / "text_encoder_2").eval()
    student, split = load_tokenizer(world.tokenizer), open_dataset(world.data).split("train")
    opened = Cache(cache)
    source = CachedHiddenStates(opened, "train")
    assert source.format.alone and source.format.depths == (2, 3)
    assert not bool(opened.split("train").targets(np.arange(len(split.tokens))).valid_mask.any())
    matched = 0
    for document in (0, 2, 5):
        start, end = (int(x) for x in split.documents[document : document + 2])
        ids = split.tokens[start:end].astype(int).tolist()
        theirs, ends = ends_of(teacher, student.decode(ids[1:-1]))
        with torch.no_grad():
            states = [
                reference(
                    torch.tensor([[*theirs[at : at + 63], 1]]), output_hidden_states=True
                ).hidden_states[2][0, :-1]
                for at in range(0, len(theirs), 63)
            ]
        expected = rms_normalise(torch.cat(states)) @ projection_matrix(64, 24).t()
        at = 0
        for place in range(len(ids)):
            at += len(student.token_bytes(ids[place])) if 0 < place < len(ids) - 1 else 0
            found, valid = decode_projected_states(source.entries(np.array([start + place])))
            assert bool(valid[0]) == (0 < place < len(ids) - 1 and at in ends), (document, place)
            if bool(valid[0]):
                assert float((found[0, 0] - expected[ends[at]]).abs().max()) < 0.03
                matched += 1
    assert matched > 100


def test_texts_between_control_tokens_are_aligned_one_by_one(world, encoder, tmp_path):
    lines = [
        {"prompt": f"Wie heißt Nr. {i}? 😀", "response": f"Zoë  naïve {i}."} for i in range(300)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, folder = tmp_path / "data", tmp_path / "c"
    prepare.run(
        PrepareConfig(
            (str(tmp_path / "chat.jsonl"),), tokenizer_path=world.tokenizer, output_dir=data
        )
    )
    score.run(config(encoder, data, folder, max_seq_length=512))
    split, source = open_dataset(data).split("train"), CachedHiddenStates(Cache(folder), "train")
    student, teacher = (
        load_tokenizer(world.tokenizer),
        EncoderTeacher(str(encoder), find_encoder(str(encoder))),
    )
    controls = set(student.special_tokens.values())
    valid = np.concatenate([(np.asarray(m["scales"]) > 0).all(1) for m in source.fixed_parts])
    ids = split.tokens.astype(int)
    for document in (0, 7):
        start, end = (int(x) for x in split.documents[document : document + 2])
        run, controls_seen = [], 0
        for place in range(start, end):
            if ids[place] not in controls:
                run.append(place)
                continue
            _, ends = ends_of(teacher, b"".join(student.token_bytes(ids[p]) for p in run).decode())
            at = 0
            for p in run:
                at += len(student.token_bytes(ids[p]))
                assert valid[p] == (at in ends and bool(split.mask[p + 1]))
            assert not valid[place]
            run, controls_seen = [], controls_seen + 1
        assert controls_seen > 2
    assert 0.1 < valid[:-1][split.mask[1:] != 0].mean() < 1


def test_scoring_twice_gives_the_same_bytes(world, encoder, cache, tmp_path):
    """The encoder's own dropout is 0.1."""
    score.run(config(encoder, world.data, tmp_path / "c"))
    for path in cache.glob("*/*.bin"):
        assert sha256_file(path) == sha256_file(tmp_path / "c" / path.relative_to(cache))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_from_an_encoder_is_cross_entropy_and_hidden_states(
    world, encoder, cache, tmp_path
):
    notes = []
    losses = {"hidden": HiddenConfig(0.5, until=1.0), "contrast": ContrastConfig(0.05, until=1.0)}
    made = world.distill(tmp_path / "run", cache=cache, teacher=str(encoder), **losses)
    result = train.run(made, lambda progress: notes.append(progress.note))
    assert any(
        "predicts no tokens: the weight loss.beta (0.5) goes to the cross-entropy" in note
        for note in notes
    )
    assert result.warnings
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert all({"hidden", "contrast"} <= line.keys() and "kd" not in line for line in lines)
    assert lines[-1]["hidden"] < lines[0]["hidden"]
    split = open_dataset(world.data).split("train")
    source = CachedHiddenStates(Cache(cache), "train")
    share = source.count() / int(split.mask.sum())
    first = lines[0]
    matched = first["loss"] - first["ce"] - 0.05 * first["contrast"]
    assert matched == pytest.approx(0.5 * share * first["hidden"], rel=0.15), (
        "uncovered positions count as targets"
    )


def test_an_encoder_as_auxiliary_teacher(world, encoder, cache, tmp_path):
    train.run(
        world.distill(tmp_path / "run", hidden_states=cache, max_steps=3, hidden=HiddenConfig(0.5))
    )
    assert all(
        {"hidden", "kd"} <= line.keys()
        for line in metrics(tmp_path / "run")
        if "loss" in line and line["step"] < 2
    )


def test_refusals_say_what_to_do(world, encoder, cache, tmp_path):
    with pytest.raises(
        UsageError, match=r"is an encoder: it gives hidden states.*--hidden-state-depths 1.0"
    ):
        score.run(config(encoder, world.data, tmp_path / "c", hidden_state_depths=()))
    with pytest.raises(UsageError, match=r"holds hidden states only.*--hidden.weight 1"):
        train.run(world.distill(tmp_path / "r", cache=cache))
    with pytest.raises(UsageError, match=r"is an encoder.*Make a cache of them"):
        train.run(world.distill(tmp_path / "r", teacher=str(encoder), hidden=HiddenConfig(1.0)))
    assert not (tmp_path / "r").exists() and not (tmp_path / "c").exists()
    other = tmp_path / "other"
    (tmp_path / "t.txt").write_text("another text\n" * 400)
    prepare.run(
        PrepareConfig((str(tmp_path / "t.txt"),), tokenizer_path=world.tokenizer, output_dir=other)
    )
    score.run(config(encoder, other, tmp_path / "foreign"))
    with pytest.raises(UsageError, match="was made from another dataset"):
        train.run(
            world.distill(
                tmp_path / "r", hidden_states=tmp_path / "foreign", hidden=HiddenConfig(1.0)
            )
        )


def test_states_that_are_not_finite_are_named(world, encoder, tmp_path, monkeypatch):
    real = EncoderTeacher.hidden
    monkeypatch.setattr(
        EncoderTeacher, "hidden", lambda self, *args: [x * float("nan") for x in real(self, *args)]
    )
    with pytest.raises(
        XinslmError, match=r"encoder .*flux: hidden states are not finite. Try --dtype float32"
    ):
        score.run(config(encoder, world.data, tmp_path / "c"))
    assert not list((tmp_path / "c").glob("*/*"))


def test_the_command_line_takes_depths_and_weights(world, encoder, tmp_path, capsys):
    cache, run = tmp_path / "c", tmp_path / "r"
    line = (
        f"cache {encoder} --data-path {world.data} -o {cache} --hidden-state-depths 0.3 1.0 "
        "--hidden-state-width 16 --device cpu"
    )
    assert main([*line.split(), "--max-seq-length", "64"]) == 0
    assert "36 bytes each" in capsys.readouterr().out
    assert Cache(cache).manifest["hidden_states"]["depths"] == [1, 3]
    small = (
        "--hidden-size 32 --num-layers 2 --num-heads 2 --intermediate-size 64 --max-seq-length 64 "
        "--batch-size 4"
    )
    line = (
        f"distill --data-path {world.data} --cache {cache} -o {run} {small} --max-steps 2 "
        "--device cpu"
    )
    line += " --hidden.weight 1 --hidden.kind cka --hidden.depths 0.3 1.0"
    assert main(line.split()) == 0
    assert "hidden" in metrics(run)[0]


def test_an_interrupted_shard_continues_with_the_next_batch(world, encoder, tmp_path, monkeypatch):
    settings = {"shard_positions": 10**6, "batch_tokens": 512}
    real, calls = EncoderTeacher.hidden, []

    def counted(self, texts, depths):
        calls.append(sum(map(len, texts)))
        if stop_at == len(calls):
            raise KeyboardInterrupt
        return real(self, texts, depths)

    monkeypatch.setattr(EncoderTeacher, "hidden", counted)
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        score.run(config(encoder, world.data, tmp_path / "c", **settings))
    stop_at = 0
    calls.clear()
    score.run(config(encoder, world.data, tmp_path / "c", **settings))
    continued = list(calls)
    calls.clear()
    score.run(config(encoder, world.data, tmp_path / "whole", **settings))
    assert continued == calls[3:]
    for name in ("00000.bin", "00000.hidden_states.bin"):
        whole = (tmp_path / "whole" / "train" / name).read_bytes()
        assert (tmp_path / "c" / "train" / name).read_bytes() == whole
