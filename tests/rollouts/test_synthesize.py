"""Sequence-level distillation: answers, their dataset, their cache, from teachers here and behind
an address.
"""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import training as train
from fake_endpoint import FakeVllm
from llama_cpp import LlamaCpp
from xinslm.cache.folder import Cache
from xinslm.data.dataset import open_dataset
from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export
from xinslm.files import sha256_file
from xinslm.model.files import load_model
from xinslm.rollouts import synthesize
from xinslm.rollouts.prompts import read_prompts
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.rollouts.synthesize_data import Answer, encode, split_answers
from xinslm.teachers.base import Generation
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.tokenizer.load import load_tokenizer

CHATS = [
    {"prompt": "Who is there?"},
    {"instruction": "Tell a story.", "input": "About a dog."},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Go on"},
            {"role": "assistant", "content": "never used"},
        ]
    },
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    texts = [
        "One day a",
        "The little dog",
        "Yesterday",
        "A very old house by the sea",
        "Tom and Lily",
        "In the morning",
    ]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CHATS))
    return folder


def config(world, prompts, folder, **changes):
    settings = {
        "teacher": str(world.teacher),
        "samples": 2,
        "max_new_tokens": 16,
        "batch_size": 4,
        "device": "cpu",
        "max_seq_length": 64,
        "validation_fraction": 0.3,
        **changes,
    }
    return SynthesizeConfig(prompts=prompts, output_dir=folder, **settings)


def content(folder):
    files = [
        folder / "text.jsonl",
        *sorted(folder.glob("data/*/*")),
        *sorted(folder.glob("cache/*/*.bin")),
    ]
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}


def rows(folder):
    return [json.loads(line) for line in (folder / "text.jsonl").read_text().splitlines()]


def test_answers_dataset_and_cache_of_a_teacher_here(world, prompts, tmp_path):
    folder = tmp_path / "s"
    result = synthesize.run(config(world, prompts / "texts.txt", folder))
    assert result.answers == 12 and "scored by the teacher" in result.describe()
    assert not (folder / "answers.jsonl").exists() and not (folder / "unfinished.json").exists()
    texts, dataset = rows(folder), open_dataset(folder / "data")
    assert {name: split["documents"] for name, split in dataset.manifest["splits"].items()}[
        "validation"
    ] % 2 == 0
    tokenizer, seen = load_tokenizer(world.teacher), 0
    model, cache = load_model(world.teacher), Cache(folder / "cache")
    for name in ("train", "validation"):
        split = dataset.split(name)
        for start, end in zip(split.documents[:-1], split.documents[1:], strict=True):
            ids, mask = split.tokens[start:end].astype(np.int64), split.mask[start:end] != 0
            whole = tokenizer.decode(ids.tolist(), skip_special=True)
            row = next(row for row in texts if row["text"] == whole)
            answer = tokenizer.decode(ids[mask].tolist(), skip_special=True)
            assert whole.endswith(answer) and len(whole) - len(answer) <= row["prompt_characters"]
            assert len(whole) - len(answer) > row["prompt_characters"] - 6, (
                "all of the answer but its first token counts"
            )
            assert (ids[-1] == tokenizer.eos_id) == row["finished"], (
                "no end is learnt where the teacher set none"
            )
            with torch.no_grad():
                log_p = model.logits(model.hidden(torch.from_numpy(ids)[None, :64]))[0].log_softmax(
                    1
                )
            targets = cache.split(name).targets(np.arange(start, end - 1))
            assert np.array_equal(targets.valid_mask.numpy(), mask[1:])
            at = np.flatnonzero(mask) - 1
            expected = log_p[at].gather(1, targets.top_k_ids[at])
            torch.testing.assert_close(targets.top_k_log_probs[at], expected, atol=0.06, rtol=0.02)
            seen += 1
    assert seen == 12
    run = train.run(_distill(world, folder, tmp_path / "run"))
    assert np.isfinite(run.state.best_validation)


def _distill(world, folder, output):
    settings = world.distill(output, max_steps=2, eval_steps=2, batch_size=2)
    return dataclasses.replace(settings, data_path=folder / "data", cache=folder / "cache")


def test_chats_are_answered_and_only_the_last_answer_counts(world, prompts, tmp_path):
    synthesize.run(
        config(world, prompts / "chats.jsonl", tmp_path / "s", samples=1, validation_fraction=0.0)
    )
    texts = rows(tmp_path / "s")
    said = [[message["role"] for message in row["messages"]] for row in texts]
    assert said == [
        ["user", "assistant"],
        ["user", "assistant"],
        ["user", "assistant", "user", "assistant"],
    ]
    assert texts[1]["messages"][0]["content"] == "Tell a story.\n\nAbout a dog."
    assert "never used" not in (tmp_path / "s" / "text.jsonl").read_text()
    split, tokenizer = (
        open_dataset(tmp_path / "s" / "data").split("train"),
        load_tokenizer(world.teacher),
    )
    for row, start, end in zip(texts, split.documents[:-1], split.documents[1:], strict=True):
        ids, mask = split.tokens[start:end], split.mask[start:end] != 0
        assert (
            tokenizer.decode(ids[mask].tolist(), skip_special=True)
            == row["messages"][-1]["content"]
        )
        assert (ids[mask][-1] == tokenizer.special_tokens["<|im_end|>"]) == row["finished"]
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    text = (str(tmp_path / "s" / "text.jsonl"),)
    prepare.run(
        PrepareConfig(data_path=text, tokenizer_path=world.tokenizer, output_dir=tmp_path / "again")
    )


def test_killed_and_continued_equals_uninterrupted(world, prompts, tmp_path):
    """Killed in the middle of the second group of answers."""
    group = 2 * 4
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    settings = config(world, prompts / "texts.txt", whole)
    synthesize.run(settings)
    code = f"""
import os, signal
from pathlib import Path, PosixPath
import torch
torch.set_num_threads(1)
from xinslm.rollouts import synthesize
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.teachers.endpoint_config import EndpointConfig
def listen(progress):
    if progress.stage == "synthesize" and progress.done > {group}:
        os.kill(os.getpid(), signal.SIGKILL)
synthesize.run({config(world, prompts / "texts.txt", folder)!r}, listen)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    journal = folder / "answers.jsonl"
    assert len(journal.read_text().splitlines()) == group
    journal.write_bytes(journal.read_bytes()[:-20])  # as if the last line had been half-written
    with pytest.raises(UsageError, match="unfinished synthesis with another seed"):
        synthesize.run(config(world, prompts / "texts.txt", folder, seed=1))
    synthesize.run(config(world, prompts / "texts.txt", folder))
    assert content(folder) == content(whole)


@pytest.fixture(scope="module")
def gguf(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "teacher.gguf"
    export(GgufConfig(world.teacher, path, outtype="f32"))
    return path


def test_a_gguf_teacher_writes_what_its_model_writes(world, prompts, tmp_path, gguf):
    synthesize.run(
        config(world, prompts / "texts.txt", tmp_path / "hf", temperature=0.0, samples=1)
    )
    synthesize.run(
        config(
            world,
            prompts / "texts.txt",
            tmp_path / "g",
            temperature=0.0,
            samples=1,
            teacher=str(gguf),
        )
    )
    assert rows(tmp_path / "hf") == rows(tmp_path / "g")
    assert content(tmp_path / "hf").keys() == content(tmp_path / "g").keys()


def check_cache(world, folder, least):
    """Records of a written cache against the model's own distributions; returns the share that has
    them.
    """
    model, cache, dataset = (
        load_model(world.teacher),
        Cache(folder / "cache"),
        open_dataset(folder / "data"),
    )
    assert (cache.format.tail_sample_mass, cache.format.temperature) == (0, 1.0)
    valid = total = 0
    for name in dataset.manifest["splits"]:
        split, entries = dataset.split(name), cache.split(name)
        for start, end in zip(split.documents[:-1], split.documents[1:], strict=True):
            ids, mask = split.tokens[start:end].astype(np.int64), split.mask[start:end] != 0
            with torch.no_grad():
                log_p = model.logits(model.hidden(torch.from_numpy(ids)[None]))[0].log_softmax(1)
            targets = entries.targets(np.arange(start, end - 1))
            ok = targets.valid_mask.numpy()
            assert not (ok & ~mask[1:]).any()
            found = log_p[:-1].gather(1, targets.top_k_ids)[ok]
            torch.testing.assert_close(targets.top_k_log_probs[ok], found, atol=0.06, rtol=0.02)
            torch.testing.assert_close(
                targets.log_tail[ok], (1 - found.exp().sum(1)).log(), atol=0.02, rtol=0.02
            )
            stored = entries.fixed_parts[0][int(start) : int(end) - 1][ok]
            labels = log_p[:-1].gather(1, torch.from_numpy(ids[1:, None]))[:, 0].numpy()[ok]
            np.testing.assert_allclose(
                stored["log_label"].astype(float), labels, atol=0.01, rtol=2e-3
            )
            assert not stored["num_samples"].any()
            valid, total = valid + int(ok.sum()), total + int(mask.sum())
    assert valid / total > least
    return valid / total


@pytest.mark.parametrize("kind", ["texts.txt", "chats.jsonl"])
def test_llama_cpp_writes_text_and_the_cache_comes_with_it(world, prompts, tmp_path, gguf, kind):
    """A real llama.cpp server; the numbers are held against our own transformer."""
    folder = tmp_path / "s"
    with LlamaCpp(gguf, 64) as llama:
        url = llama._server.listening_address
        result = synthesize.run(
            config(
                world,
                prompts / kind,
                folder,
                teacher=url,
                teacher_tokenizer_path=str(world.tokenizer),
                top_k=6,
                samples=3,
                temperature=0.3,
            )
        )
    assert "from the log-probabilities that came with the text" in result.describe()
    check_cache(world, folder, 0.3)
    run = train.run(_distill(world, folder, tmp_path / "run"))
    assert np.isfinite(run.state.best_validation)


def test_a_vllm_like_server_with_older_lists_of_tokens(world, prompts, tmp_path):
    folder = tmp_path / "s"
    with FakeVllm(world.teacher) as server:
        changes = {
            "teacher": server.url,
            "teacher_tokenizer_path": str(world.tokenizer),
            "top_k": 5,
            "samples": 1,
        }
        synthesize.run(config(world, prompts / "texts.txt", folder, temperature=0.0, **changes))
        asked = {body["seed"] for _, body in server.bodies if body["max_tokens"] == 16}
        assert len(asked) == 6, "each answer has a seed of its own"
    check_cache(world, folder, 0.3)


def test_refused_and_empty_answers_are_dropped_and_counted(world, prompts, tmp_path):
    def mischief(number, path, body):
        def refuse(answer):
            answer["choices"][0]["message"].update(content=None, refusal="I will not")
            answer["choices"][0]["logprobs"] = None

        def empty(answer):
            answer["choices"][0]["message"]["content"] = "  \n"

        said = body["messages"][0]["content"] if body["max_tokens"] > 1 else ""
        return refuse if said.startswith("Who") else empty if said.startswith("Tell") else None

    notes = []
    with FakeVllm(world.teacher, mischief) as server:
        changes = {
            "teacher": server.url,
            "teacher_tokenizer_path": str(world.tokenizer),
            "samples": 1,
            "validation_fraction": 0.0,
        }
        result = synthesize.run(
            config(world, prompts / "chats.jsonl", tmp_path / "s", **changes), notes.append
        )
    assert (result.answers, result.refused, result.empty) == (1, 1, 1)
    assert "dropped     1 refused and 1 empty" in result.describe()
    assert any("left out" in progress.note for progress in notes)
    with (
        FakeVllm(
            world.teacher, lambda n, p, b: lambda a: a["choices"][0]["message"].update(content="")
        ) as server,
        pytest.raises(XinslmError, match="answered none of 3 prompts: 0 refused, 3 empty"),
    ):
        synthesize.run(
            config(
                world, prompts / "chats.jsonl", tmp_path / "t", **{**changes, "teacher": server.url}
            )
        )


def test_without_tokenizer_or_log_probabilities_there_is_text_and_it_is_said(
    world, prompts, tmp_path
):
    with FakeVllm(world.teacher) as server:
        changes = {"teacher": server.url, "samples": 1}
        result = synthesize.run(config(world, prompts / "texts.txt", tmp_path / "a", **changes))
        assert (
            "give its model's tokenizer with --teacher-tokenizer-path" in result.describe()
            and not (tmp_path / "a/data").exists()
        )
        assert all("logprobs" not in body for _, body in server.bodies), (
            "nothing is asked for that is not used"
        )
        other = synthesize.run(
            config(
                world,
                prompts / "texts.txt",
                tmp_path / "b",
                tokenizer_path=str(world.tokenizer),
                **changes,
            )
        )
        assert (
            "the dataset's tokens are not the endpoint's" in other.describe()
            and (tmp_path / "b/data").is_dir()
        )

    def refuse(number, path, body):
        return (400, {}, {"error": "logprobs are not offered"}) if "logprobs" in body else None

    with FakeVllm(world.teacher, refuse) as server:
        changes |= {"teacher": server.url, "teacher_tokenizer_path": str(world.tokenizer)}
        result = synthesize.run(config(world, prompts / "texts.txt", tmp_path / "c", **changes))
    assert (
        "does not say how likely its tokens are" in result.cached and "not offered" in result.cached
    )
    assert (tmp_path / "c" / "data").is_dir() and not (tmp_path / "c" / "cache").exists()


def test_a_server_that_breaks_costs_what_was_under_way(world, prompts, tmp_path):
    quick = EndpointConfig(retries=0, timeout_seconds=0.5, concurrency=1)
    changes = {
        "teacher_tokenizer_path": str(world.tokenizer),
        "top_k": 5,
        "samples": 1,
        "temperature": 0.0,
        "endpoint": quick,
    }
    with (
        FakeVllm(world.teacher, lambda n, *_: "hang" if n == 4 else None) as server,
        pytest.raises(
            XinslmError, match=r"prompt \d+: POST .*no response within 0.5 s.*same command again"
        ),
    ):
        synthesize.run(
            config(world, prompts / "texts.txt", tmp_path / "s", teacher=server.url, **changes)
        )
    kept = len((tmp_path / "s" / "answers.jsonl").read_text().splitlines())
    assert kept == 3, "one request was the trial, three answers came"
    with FakeVllm(world.teacher) as server:
        synthesize.run(
            config(world, prompts / "texts.txt", tmp_path / "s", teacher=server.url, **changes)
        )
        assert len(server.bodies) == 1 + 3, "only what was missing is asked for"
    with FakeVllm(world.teacher) as server:
        synthesize.run(
            config(world, prompts / "texts.txt", tmp_path / "w", teacher=server.url, **changes)
        )
    assert content(tmp_path / "s") == content(tmp_path / "w")


def test_fewer_log_probabilities_than_are_kept_are_an_error(world, prompts, tmp_path):
    def few(answer):
        for row in answer["choices"][0]["logprobs"]["top_logprobs"]:
            for name in list(row)[3:]:
                del row[name]

    changes = {"teacher_tokenizer_path": str(world.tokenizer), "top_k": 5, "samples": 1}
    with (
        FakeVllm(world.teacher, lambda *_: few) as server,
        pytest.raises(
            XinslmError,
            match=r"returned 3 log-probabilities .* 9 were requested.*--top-k 3",
        ),
    ):
        synthesize.run(
            config(world, prompts / "texts.txt", tmp_path / "s", teacher=server.url, **changes)
        )


def generated(text, finished=True):
    return Generation(text, [], [], [], finished)


def test_all_answers_to_a_prompt_are_on_one_side_and_no_side_is_empty():
    answers = [Answer(f"prompt {n}", generated(f"{n} {k}")) for n in range(8) for k in range(3)]
    for fraction in (0.01, 0.3, 0.99):
        splits = split_answers(answers, fraction, seed=1)
        sides = [{answer.prompt for answer in splits[name]} for name in ("train", "validation")]
        assert all(sides) and not sides[0] & sides[1] and sum(map(len, splits.values())) == 24
    assert not split_answers(answers, 0.0, seed=1)["validation"]


@pytest.mark.parametrize("name", ["own", "stories260K"])
def test_the_mask_begins_with_the_first_token_that_holds_anything_of_the_answer(
    world, shared_data, name
):
    from xinslm.data.encode import Encoder

    tokenizer = load_tokenizer(world.tokenizer if name == "own" else shared_data / "models" / name)
    for prompt, answer in (
        ("One day", " a dog ran."),
        ("One da", "y a dog"),
        ("naïve caf", "é 🙂 ok"),
        ("", "Once"),
    ):
        encoded = encode(Answer(prompt, generated(answer)), Encoder(tokenizer, "eos", False))
        first = int(np.flatnonzero(encoded.mask)[0])
        before = b"".join(tokenizer.token_bytes(int(t)) for t in encoded.tokens[1:first])
        upto = b"".join(tokenizer.token_bytes(int(t)) for t in encoded.tokens[1 : first + 1])
        extra = int(tokenizer.strips_first_space)
        assert len(before) <= len(prompt.encode()) + extra < len(upto)
        assert encoded.mask[first:].all() and not encoded.mask[:first].any()
        assert encoded.num_bytes == len(answer.encode())


def test_prompts_that_are_none(tmp_path):
    for name, data, message in (
        ("a.jsonl", b'{"prompt": "x"}\n{"pro', r"a.jsonl:2: not valid JSON"),
        ("b.jsonl", b'{"question": "x"}\n', r"b.jsonl:1: unknown record format"),
        (
            "c.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
            "has no message of the user's",
        ),
        ("d.txt", b"\n\n", "there is no prompt in it"),
        ("e.txt", b"caf\xe9\n", "e.txt:1: not UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(XinslmError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(UsageError, match="there is no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(UsageError, match="unknown kind of file"):
        read_prompts(tmp_path / "x.csv")


@pytest.mark.parametrize("cache", [True, False])
def test_lengths_beyond_the_teachers_context_are_shortened_and_this_is_said(
    world, prompts, tmp_path, cache
):
    settings = config(
        world,
        prompts / "texts.txt",
        tmp_path / "s",
        max_new_tokens=2000,
        max_seq_length=512,
        samples=1,
        keep_cache=cache,
    )
    notes = []
    synthesize.run(settings, lambda p: notes.append(p.note))
    (note,) = (note for note in notes if "context" in note)
    assert "has a context of 64 tokens" in note and "--max-new-tokens 2,000" in note
    assert ("--max-seq-length 512" in note) == cache
    split = open_dataset(tmp_path / "s" / "data").split("train")
    assert np.diff(split.documents).max() < 80, "tokens change a little when text is read again"
    if cache:
        made = Cache(tmp_path / "s" / "cache")
        assert made.manifest["config"]["max_seq_length"] == 64
    notes.clear()
    synthesize.run(config(world, prompts / "texts.txt", tmp_path / "t"), notes.append)
    assert not any("context" in note.note for note in notes)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_the_first_of_mt_benchs_turns_is_the_prompt(tmp_path, ending):
    file = tmp_path / f"question.{ending}"
    record = {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Rewrite it."]}
    file.write_text(json.dumps(record) + "\n")
    assert read_prompts(file) == [[{"role": "user", "content": "Write a post."}]]
    for turns, message in (([], "must be a list of questions"), ([3], "must be text")):
        file.write_text(json.dumps({"turns": turns}) + "\n")
        with pytest.raises(XinslmError, match=rf"question.{ending}:1: .*turns.* {message}"):
            read_prompts(file)


def test_what_makes_no_sense_is_refused(world, prompts, tmp_path):
    with pytest.raises(UsageError, match="repetition_penalty is for local teachers"):
        synthesize.run(
            SynthesizeConfig("http://127.0.0.1:9", prompts, tmp_path / "o", repetition_penalty=1.1)
        )
    with pytest.raises(UsageError, match="at temperature 0 all answers to a prompt are the same"):
        synthesize.run(config(world, prompts / "texts.txt", tmp_path / "s", temperature=0.0))
    with pytest.raises(UsageError, match=r"top_p is 0.0, but must be above 0"):
        synthesize.run(config(world, prompts / "texts.txt", tmp_path / "s", top_p=0.0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    with pytest.raises(UsageError, match="is not a synthesis"):
        synthesize.run(config(world, prompts / "texts.txt", tmp_path / "mine", force=True))
    assert (tmp_path / "mine" / "x").is_file()
