"""Caches from an endpoint that scores given text as vLLM does: right numbers, nothing lost, every
bad answer named.

The server is `fake_endpoint`, written after vLLM's protocol; its numbers are transformers'.
"""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
import torch

import training as train
from fake_endpoint import FakeVllm
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.journal import Journal
from xinslm.cli.main import main
from xinslm.data.dataset import open_dataset
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.files import sha256_file
from xinslm.model.files import load_model
from xinslm.teachers.endpoint_config import EndpointConfig

QUICK = EndpointConfig(retries=1, timeout_seconds=0.5, concurrency=2)


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """The world's teacher and a dataset of a few short documents."""
    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig

    folder = tmp_path_factory.mktemp("small")
    lines = world.text.read_text().splitlines()[:12]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": json.loads(line)["text"][:120]}) + "\n" for line in lines)
    )
    prepare.run(
        PrepareConfig(
            data_path=(str(folder / "text.jsonl"),),
            tokenizer_path=world.tokenizer,
            output_dir=folder / "data",
            validation_fraction=0.2,
        )
    )
    return dataclasses.replace(world, data=folder / "data")


def config(world, url, folder, **changes):
    settings = {
        "max_seq_length": 40,
        "top_k": 6,
        "endpoint": QUICK,
        "teacher_tokenizer_path": str(world.tokenizer),
        **changes,
    }
    return CacheConfig(url, world.data, folder, **settings)


def shards(folder):
    return {
        p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.glob("*/*.bin"))
    }


def test_entries_are_exact_in_the_top_k_and_have_one_bucket_for_the_tail(small, tmp_path):
    with FakeVllm(small.teacher) as server:
        result = score.run(config(small, server.url, tmp_path / "c"))
        assert {body["prompt_logprobs"] for _, body in server.bodies} == {6}
    model, cache = load_model(small.teacher), Cache(tmp_path / "c")
    assert (cache.format.tail_sample_mass, cache.format.temperature) == (0, 1.0)
    split = open_dataset(small.data).split("train")
    outside = 0
    for start, end in zip(split.documents[:-1], split.documents[1:], strict=True):
        ids = torch.from_numpy(split.tokens[start:end].astype(np.int64))
        # a sequence sees its own 40 inputs and nothing before
        for first in range(0, len(ids) - 1, 40):
            piece = ids[first : first + 41]
            with torch.no_grad():
                log_p = model.logits(model.hidden(piece[None, :-1]))[0].log_softmax(1)
            positions = np.arange(start + first, start + first + len(piece) - 1)
            targets = cache.split("train").targets(positions)
            top = log_p.topk(6)
            assert (
                targets.valid_mask.all()
                and not targets.num_samples.any()
                and (targets.log_z == 0).all()
            )
            torch.testing.assert_close(
                log_p.gather(1, targets.top_k_ids), top.values, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(targets.top_k_log_probs, top.values, atol=0.06, rtol=0.02)
            torch.testing.assert_close(
                targets.log_tail, (1 - top.values.exp().sum(1)).log(), atol=0.01, rtol=0.01
            )
            entries = cache.split("train").fixed_parts[0][positions]
            labels = log_p.gather(1, piece[1:, None])[:, 0]
            np.testing.assert_allclose(
                entries["log_label"].astype(float), labels.numpy(), atol=0.01, rtol=2e-3
            )
            outside += int((labels < top.values[:, -1]).sum())
            assert not entries["num_samples"].any()
    assert outside > 20, "tokens that came from outside the most likely ones have their log p"
    assert "positions" in result.describe()


def test_a_student_trains_from_it(small, tmp_path):
    with FakeVllm(small.teacher) as server:
        score.run(config(small, server.url, tmp_path / "c", max_seq_length=62))
    result = train.run(
        small.distill(tmp_path / "run", cache=tmp_path / "c", max_steps=2, eval_steps=2)
    )
    assert np.isfinite(result.state.best_validation)


def test_masked_positions_and_documents_that_count_nothing_are_not_asked_for(small, tmp_path):
    from xinslm.cache.endpoint_scorer import EndpointScorer, endpoint_format
    from xinslm.data.dataset import Split
    from xinslm.teachers.endpoint import EndpointTeacher

    tokens = np.arange(5, 25).astype(np.uint16)
    mask = np.zeros(20, np.uint8)
    mask[14:] = 1
    split = Split(tokens, mask, np.array([0, 10, 20]), np.array([9, 9]), 400)
    with FakeVllm(small.teacher) as server:
        teacher = EndpointTeacher(server.url, QUICK, 4, str(small.tokenizer))
        entries = EndpointScorer(teacher, endpoint_format(400, 4), 40).shard(
            split, 0, 2, tmp_path / "s", lambda n: None
        )
        assert [body["prompt"] for _, body in server.bodies] == [tokens[10:].tolist()]
    assert (entries["entries"]["flags"] != 0).tolist() == [False] * 13 + [True] * 6 + [False]


def break_at(number, mischief):
    """A server that answers badly from request `number` on: a request that is repeated, because a
    busy machine let it time out, has a later number.
    """
    return lambda n, path, body: mischief if n >= number else None


def entry_of(answer, place=3):
    return answer["choices"][0]["prompt_logprobs"][place]


def change(edit):
    def apply(answer):
        edit(answer)
        return answer

    return apply


def first_key(entry):
    return next(iter(entry))


BAD = {
    "too few": (
        change(lambda a: [entry_of(a).pop(key) for key in list(entry_of(a))[1:4]]),
        r"token 3: .* has [34] log-probabilities, but 6 were requested; pass a smaller --top-k",
    ),
    "ids out of range": (
        change(
            lambda a: entry_of(a).update(
                {"400": {"logprob": -1.0, "rank": 9, "decoded_token": "x"}}
            )
        ),
        r"token 3: token id '400' is not in the tokenizer's 400 ids: .*another vocabulary",
    ),
    "other tokens": (
        change(lambda a: entry_of(a)[first_key(entry_of(a))].update(decoded_token="Zebra")),
        r"token 3: token id \d+ is 'Zebra' on the server and .* the vocabularies differ",
    ),
    "NaN": (
        change(lambda a: entry_of(a)[first_key(entry_of(a))].update(logprob=float("nan"))),
        "a log-probability is nan, but must be at most 0",
    ),
    "positive": (
        change(lambda a: entry_of(a)[first_key(entry_of(a))].update(logprob=0.5)),
        "a log-probability is 0.5, but must be at most 0",
    ),
    "null": (
        change(lambda a: entry_of(a)[first_key(entry_of(a))].update(logprob=None)),
        "a log-probability is None, but must be a number",
    ),
    "more than 1": (
        change(lambda a: [v.update(logprob=-0.5) for v in entry_of(a).values()]),
        r"token 3: the probabilities sum to 3\.\d+, more than 1",
    ),
    "positions": (
        change(lambda a: a["choices"][0]["prompt_logprobs"].pop()),
        r"has \d+ tokens, but \d+ were sent",
    ),
    "hole": (
        change(lambda a: a["choices"][0]["prompt_logprobs"].__setitem__(3, None)),
        "token 3: it has no log-probabilities",
    ),
    "own token": (
        change(lambda a: entry_of(a).pop(first_key(entry_of(a)))),
        r"token 3: the response does not include the token that was sent, \d+",
    ),
    "no choices": (change(lambda a: a.pop("choices")), "the response has no 'choices'"),
    "refused": ((400, {}, {"error": {"message": "too long"}}), "the server returned 400 too long"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_answer_is_named_and_what_was_finished_stays(small, tmp_path, kind):
    mischief, message = BAD[kind]
    with (
        FakeVllm(small.teacher, break_at(5, mischief)) as server,
        pytest.raises(XinslmError, match=rf"document \d+, tokens \d+ to \d+: .*{message}"),
    ):
        score.run(config(small, server.url, tmp_path / "c"))
    scratch = next((tmp_path / "c").glob("*/*.scratch"))
    kept = [json.loads(line)["step"] for line in scratch.read_text().splitlines()]
    assert kept, "documents before it are in the journal"
    with FakeVllm(small.teacher) as server:
        score.run(config(small, server.url, tmp_path / "c"))
        asked = [body["prompt"] for _, body in server.bodies[1:]]
    split = open_dataset(small.data).split("train")
    for number in kept:
        start, end = split.documents[number : number + 2]
        assert split.tokens[start : min(end, start + 41)].tolist() not in asked, (
            "asked for once only"
        )
    assert not list((tmp_path / "c").glob("*/*.scratch"))


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "c"
    with FakeVllm(small.teacher) as server:
        score.run(config(small, server.url, folder))
    return shards(folder)


@pytest.mark.parametrize(
    ("mischief", "message"),
    [
        ("hang", "no response within 0.5 s"),
        ("cut", r"the response is incomplete: it ended after [\d,]+ bytes"),
        ("close", r"the connection failed \(.*\)"),
        (b'{"choices": [{"prompt_log', "the response is not valid JSON; it begins with .*"),
        ((500, {}, {"detail": "out of memory"}), "the server returned 500 out of memory"),
    ],
)
def test_passing_trouble_is_tried_again_and_lasting_trouble_is_named(
    small, tmp_path, mischief, message, whole
):
    with FakeVllm(small.teacher, lambda n, *_: mischief if n in (3, 7) else None) as server:
        score.run(config(small, server.url, tmp_path / "c"))
    assert shards(tmp_path / "c") == whole
    with (
        FakeVllm(small.teacher, lambda n, *_: mischief if n >= 5 else None) as server,
        pytest.raises(
            XinslmError, match=rf"{message} \(2 attempts in .*run the same command again"
        ),
    ):
        score.run(config(small, server.url, tmp_path / "d"))
    with FakeVllm(small.teacher) as server:  # at another address, more patiently
        score.run(config(small, server.url, tmp_path / "d", endpoint=EndpointConfig(concurrency=1)))
    assert shards(tmp_path / "d") == whole


def test_half_a_line_of_the_journal_is_dropped_before_the_next_is_written(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append({"document": 1}, {"document": 2})
    with open(path, "ab") as file:
        file.write(b'{"document": 3, "rec')
    with Journal(path) as journal:
        assert list(journal) == [{"document": 1}, {"document": 2}]
        journal.append({"document": 4})
    assert [json.loads(line)["document"] for line in path.read_text().splitlines()] == [1, 2, 4]
    path.write_bytes(b'{"document": 1}\nrubbish\n{"document": 2}\n')
    with Journal(path) as journal:
        assert list(journal) == [{"document": 1}], "what stands behind damage is not trusted"
    assert path.read_bytes() == b'{"document": 1}\n'


def test_damaged_entries_in_the_journal_are_requested_again(small, tmp_path, whole):
    with FakeVllm(small.teacher, break_at(9, "close")) as server, pytest.raises(XinslmError):
        score.run(
            config(
                small, server.url, tmp_path / "c", endpoint=dataclasses.replace(QUICK, retries=0)
            )
        )
    scratch = next((tmp_path / "c").glob("*/*.scratch"))
    lines = [json.loads(line) for line in scratch.read_text().splitlines()]
    assert len(lines) > 2
    lines[0]["entries"] = "!!"
    lines[1]["entries"] = lines[1]["entries"][:8]
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with FakeVllm(small.teacher) as server:
        score.run(config(small, server.url, tmp_path / "c"))
    assert shards(tmp_path / "c") == whole


def test_spaces_as_vllm_0_8_writes_them_are_the_same_vocabulary(small, tmp_path, whole):
    """vLLM 0.8.3 wrote tokens as the vocabulary spells them ('Ġthat', vllm-project/vllm issue
    16838).
    """

    def spelled(answer):
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            for facts in entry.values():
                facts["decoded_token"] = facts["decoded_token"].replace(" ", "Ġ").replace("\n", "Ċ")

    with FakeVllm(small.teacher, lambda *_: spelled) as server:
        score.run(config(small, server.url, tmp_path / "c"))
    assert shards(tmp_path / "c") == whole


def test_minus_infinity_comes_as_a_number_and_stays_finite(small, tmp_path):
    def impossible(answer):
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            list(entry.values())[-1]["logprob"] = -9999.0

    with FakeVllm(small.teacher, lambda *_: impossible) as server:
        score.run(config(small, server.url, tmp_path / "c"))
    split = open_dataset(small.data).split("train")
    targets = Cache(tmp_path / "c").split("train").targets(np.arange(len(split.tokens)))
    assert torch.isfinite(targets.top_k_log_probs).all() and torch.isfinite(targets.log_tail).all()


def test_requests_are_in_flight_together(small, tmp_path):
    def slow(*_):
        time.sleep(0.05)

    with FakeVllm(small.teacher, slow) as server:
        score.run(config(small, server.url, tmp_path / "c", endpoint=EndpointConfig(concurrency=4)))
        assert 2 <= server.most_at_once <= 4


def test_servers_that_cannot_score_are_recognized_when_opened(small, tmp_path):
    def without_log_probs(answer):
        answer["choices"][0].pop("prompt_logprobs", None)

    for mischief, reason in (
        (without_log_probs, "ignores prompt_logprobs"),
        (
            (400, {}, {"error": {"message": "Unknown parameter: 'prompt_logprobs'"}}),
            "Unknown parameter",
        ),
    ):
        with (
            FakeVllm(small.teacher, lambda *_, m=mischief: m) as server,
            pytest.raises(
                UsageError,
                match=rf"cannot score a given text \(.*{reason}.*xinslm synthesize.*gguf",
            ),
        ):
            score.run(config(small, server.url, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_other_refusals(small, tmp_path):
    with FakeVllm(small.teacher) as server:
        with pytest.raises(UsageError, match=r"has no model 'big'. It has: tiny"):
            score.run(
                config(small, server.url, tmp_path / "c", endpoint=EndpointConfig(model="big"))
            )
        with pytest.raises(
            UsageError,
            match=r"no tokenizer was found for tiny; pass .*--teacher-tokenizer-path",
        ):
            score.run(config(small, server.url, tmp_path / "c", teacher_tokenizer_path=None))
        with pytest.raises(
            UsageError, match=r"context of 64 tokens and needs two more: pass --max-seq-length 62"
        ):
            score.run(config(small, server.url, tmp_path / "c", max_seq_length=63))
        with pytest.raises(UsageError, match="gives no hidden states"):
            score.run(config(small, server.url, tmp_path / "c", hidden_state_depths=(1.0,)))
        from xinslm.tokenizer.bpe import BPETokenizer

        BPETokenizer.prefix_of(BPETokenizer.load(small.tokenizer), 300).save(tmp_path / "other")
        with pytest.raises(UsageError, match="the same ids mean different text"):
            score.run(
                config(
                    small,
                    server.url,
                    tmp_path / "c",
                    teacher_tokenizer_path=str(tmp_path / "other"),
                )
            )


def test_key_comes_from_a_file_or_a_variable_and_is_written_nowhere(
    small, tmp_path, monkeypatch, capsys
):
    (tmp_path / "key").write_text("sk-from-file\n")
    monkeypatch.setenv("MY_TEST_KEY", "sk-from-variable")
    flags = [
        "--data-path",
        str(small.data),
        "--max-seq-length",
        "40",
        "--teacher-tokenizer-path",
        str(small.tokenizer),
    ]
    for name, value, key in (
        ("--endpoint.api-key-file", str(tmp_path / "key"), "sk-from-file"),
        ("--endpoint.api-key-env", "MY_TEST_KEY", "sk-from-variable"),
    ):
        with FakeVllm(small.teacher) as server:
            folder = tmp_path / name
            assert main(["cache", server.url, "-o", str(folder), *flags, name, value]) == 0
            assert set(server.keys) == {f"Bearer {key}"}
        written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
        assert key.encode() not in written
    assert (
        main(
            [
                "cache",
                "http://127.0.0.1:9",
                "-o",
                "x",
                *flags,
                "--endpoint.api-key-env",
                "NO_SUCH_KEY",
            ]
        )
        == 2
    )
    assert "NO_SUCH_KEY: there is no such environment variable" in capsys.readouterr().err
    assert "MY_TEST_KEY" in os.environ


def test_an_address_with_a_password_is_refused_before_anything_is_written(small, tmp_path):
    with FakeVllm(small.teacher) as server:
        url = server.url.replace("http://", "http://user:hunter2@")
        with pytest.raises(UsageError, match="must not contain a password") as caught:
            score.run(config(small, url, tmp_path / "c"))
        assert "hunter2" not in str(caught.value) and not (tmp_path / "c").exists()
    settings = {"data_path": small.data, "output_dir": tmp_path / "run", "teacher": url}
    with pytest.raises(UsageError, match="must not contain a password") as caught:
        train.run(DistillConfig(**settings))
    assert "hunter2" not in str(caught.value)
    written = [path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any("hunter2" in text for text in written)
