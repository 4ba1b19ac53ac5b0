import errno
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
from fake_tokenizer import ByteTokenizer

from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.data.dataset import open_dataset, require_tokenizer
from xinslm.data.writer import SplitWriter
from xinslm.errors import UsageError, XinslmError

BOS, EOS = 256, 257


@pytest.fixture
def tokenizer(monkeypatch):
    """The tokenizer that every path loads in these tests; a test may replace `.value`."""
    holder = types.SimpleNamespace(value=ByteTokenizer())
    module = types.ModuleType("xinslm.tokenizer.load")
    module.load_tokenizer = lambda path: holder.value
    monkeypatch.setitem(sys.modules, "xinslm.tokenizer.load", module)
    return holder


@pytest.fixture
def make(tmp_path, tokenizer):
    """Prepares records (strings are texts) into `tmp_path/out`."""

    def run(records, name="in.jsonl", on_progress=lambda p: None, **options):
        lines = [json.dumps({"text": r} if isinstance(r, str) else r) for r in records]
        (tmp_path / name).write_text("\n".join(lines))
        options = {"tokenizer_path": tmp_path / "tok", "output_dir": tmp_path / "out", **options}
        return prepare.run(PrepareConfig(data_path=(str(tmp_path / name),), **options), on_progress)

    return run


def documents(split):
    """The documents of a split as (ids, mask) lists."""
    return [
        (split.tokens[a:b].tolist(), split.mask[a:b].tolist())
        for a, b in zip(split.documents[:-1], split.documents[1:], strict=True)
    ]


def texts(split):
    return [bytes(i for i in ids if i < 256).decode() for ids, _ in documents(split)]


def stories(count, word="story"):
    return [f"{word} number {i}" for i in range(count)]


def left(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "tokenizer_options, end, before, after",
    [
        ({}, "eos", [BOS], [EOS]),
        ({}, "bos", [BOS], [BOS]),
        ({}, "none", [BOS], []),
        ({"bos": False}, "eos", [EOS], [EOS]),
        ({"bos": False, "eos": False}, "none", [], []),
    ],
)
def test_a_text_between_its_tokens(
    make, tmp_path, tokenizer, tokenizer_options, end, before, after
):
    tokenizer.value = ByteTokenizer(**tokenizer_options)
    make(["héllo"], validation_fraction=0.0, document_end=end)
    split = open_dataset(tmp_path / "out").split("train")
    ids = before + list("héllo".encode()) + after
    assert documents(split) == [(ids, [0] + [1] * (len(ids) - 1))]
    assert split.document_bytes.tolist() == [6]
    assert split.tokens.dtype == np.uint16 and split.vocab_size == 259


def test_chats_learn_the_answers_only(make, tmp_path):
    records = [
        {"prompt": "why?", "response": "só"},
        {"messages": [{"role": "user", "content": "alone"}]},
    ]
    result = make(records, validation_fraction=0.0, show=1)
    split = open_dataset(tmp_path / "out").split("train")
    ids = [*b"[user]why?", EOS, *b"[assistant]", *"só".encode(), EOS]
    assert documents(split) == [(ids, [0] * (len(ids) - 4) + [1] * 4)]
    assert split.document_bytes.tolist() == [3]
    assert result.splits["train"] == {"documents": 1, "tokens": len(ids), "targets": 4, "bytes": 3}
    shown = result.describe().splitlines()
    assert shown[0].endswith("in.jsonl:1: 26 tokens, 4 of them targets")
    assert shown[1] == "  - [|u|s|e|r|]|w|h|y|?|<eos>|[|a|s|s|i|s|t|a|n|t|]"
    assert shown[2].startswith("  + s|") and shown[2].endswith("|<eos>")
    assert "without an answer dropped: 1" in result.describe()


@pytest.mark.parametrize("length", [30, 5000, 100_000])
def test_a_shown_document_fits_a_screen(make, length):
    result = make(["a b\n" * length + "the end"], validation_fraction=0.0, show=1)
    (shown,) = result.samples
    lines = shown.splitlines()
    assert len(lines) <= 24 and max(map(len, lines[1:])) < 120
    assert lines[0].endswith(f"{4 * length + 9:,} tokens, {4 * length + 8:,} of them targets")
    assert lines[2].startswith("  + a|·|b|↵|") and lines[-1].endswith("|t|h|e|·|e|n|d|<eos>")
    assert ("  ..." in lines) == (length > 200)


def test_train_on_prompts(make, tmp_path):
    make([{"prompt": "why?", "response": "so"}], validation_fraction=0.0, train_on_prompts=True)
    split = open_dataset(tmp_path / "out").split("train")
    assert split.mask.tolist() == [0] + [1] * (len(split.tokens) - 1)
    assert split.document_bytes.tolist() == [6]


def test_a_tokenizer_without_what_is_needed(make, tokenizer):
    tokenizer.value = ByteTokenizer(chat=False)
    with pytest.raises(XinslmError, match=r"in.jsonl:1 is a chat, .* no chat template"):
        make([{"prompt": "a", "response": "b"}])
    tokenizer.value = ByteTokenizer(eos=False)
    with pytest.raises(UsageError, match="--document-end eos: the tokenizer has no EOS"):
        make(["a"])


def test_large_vocabularies_take_four_bytes(make, tmp_path, tokenizer):
    tokenizer.value = ByteTokenizer(vocab_size=65_537)
    make(stories(30))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.split("train").tokens.dtype == np.uint32
    assert set(texts(dataset.split("train"))) | set(texts(dataset.split("validation"))) == set(
        stories(30)
    )


def test_validation_is_a_stable_share(make, tmp_path):
    make(stories(2000), output_dir=tmp_path / "a", validation_fraction=0.1)
    make(
        [*stories(500, "other"), *stories(2000)], output_dir=tmp_path / "b", validation_fraction=0.1
    )
    make(stories(2000), output_dir=tmp_path / "c", validation_fraction=0.1, seed=1)
    a, b, c = (open_dataset(tmp_path / name) for name in "abc")
    first, more, other = ({*texts(d.split("validation"))} for d in (a, b, c))
    assert 150 < len(first) < 250 and 150 < len(other) < 250
    assert {t for t in more if t.startswith("story")} == first
    assert first != other
    assert [t for t in stories(2000) if t not in first] == texts(a.split("train"))
    assert a.manifest["splits"]["validation"]["documents"] == len(first)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 7])
def test_both_splits_get_a_document(make, tmp_path, fraction, count):
    make(stories(count), validation_fraction=fraction)
    dataset = open_dataset(tmp_path / "out")
    train, validation = dataset.split("train"), dataset.split("validation")
    assert sorted(texts(train) + texts(validation)) == sorted(stories(count))
    assert min(len(train.document_bytes), len(validation.document_bytes)) == 1
    assert all(
        mask[0] == 0 and all(mask[1:]) for _, mask in documents(train) + documents(validation)
    )


def test_the_document_that_comes_nearest_fills_an_empty_split(make, tmp_path):
    validation = {}
    for fraction in (1e-9, 0.3, 0.7, 0.999999):
        make(stories(12), validation_fraction=fraction, force=True)
        validation[fraction] = {*texts(open_dataset(tmp_path / "out").split("validation"))}
    assert len(validation[1e-9]) == 1 and len(validation[0.999999]) == 11
    assert validation[1e-9] < validation[0.3] < validation[0.7] < validation[0.999999]


def test_a_single_text_is_cut_at_a_line(make, tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    notes = []
    make([text], on_progress=lambda p: notes.append(p.note))
    dataset = open_dataset(tmp_path / "out")
    (head,), (tail,) = texts(dataset.split("train")), texts(dataset.split("validation"))
    assert head + tail == text and head.endswith("\n")
    assert len(tail) == pytest.approx(0.05 * len(text), abs=8)
    assert any(f"the last {len(tail) + 2} tokens of 1 of them" in note for note in notes)


def book(name, size):
    """A text of about `size` bytes whose lines occur nowhere else."""
    lines = (f"{name}: line {i} has ünlike characters\n" for i in range(size // 20))
    return "".join(lines).encode()[:size].decode(errors="ignore")


DISTRIBUTIONS = {
    "two books": [71_000, 29_000],
    "one text": [50_000],
    "five books": [40_000] * 5,
    "a book and stories": [300_000] + [700] * 90,
    "sixty texts": [4_000] * 60,
    "heavy tail": [int(200 * 1.1**i) for i in range(70)],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_the_share_held_back_is_the_one_asked_for(make, tmp_path, sizes, seed):
    books = [book(f"book {i}", size) for i, size in enumerate(sizes)]
    result = make(books, seed=seed)
    dataset = open_dataset(tmp_path / "out")
    train, validation = dataset.split("train"), dataset.split("validation")
    sizes = [sum(len(text.encode()) for text in texts(split)) for split in (train, validation)]
    assert 0.025 < sizes[1] / sum(sizes) < 0.075 and not result.warning
    assert sizes == [split.document_bytes.sum() for split in (train, validation)]
    pieces = texts(train) + texts(validation)
    heads = {text for text in texts(train) if text not in books}
    tails = {text for text in texts(validation) if text not in books}
    cut = [text for text in books if text not in pieces]
    assert sorted(cut) == sorted(
        head + tail for head in heads for tail in tails if head + tail in cut
    )
    assert len(pieces) == len(books) + len(cut) and len(heads) == len(tails) == len(cut) <= 4
    assert all(head.endswith("\n") for head in heads)
    assert all(
        ids[0] == BOS and ids[-1] == EOS for ids, _ in documents(train) + documents(validation)
    )
    make(books[::-1], seed=seed, output_dir=tmp_path / "again")
    again = open_dataset(tmp_path / "again")
    for name in ("train", "validation"):
        assert sorted(texts(again.split(name))) == sorted(texts(dataset.split(name)))


def test_a_share_that_cannot_hold_is_said_in_the_summary(make, tmp_path):
    chats = [{"prompt": "why?", "response": "so " * n} for n in (1000, 2000, 3000)]
    result = make(chats)
    assert "note: validation has 16.7% of the tokens, not 5.0%" in result.describe()
    assert len(open_dataset(tmp_path / "out").split("validation").document_bytes) == 1
    result = make(chats, validation_fraction=0.15, force=True)
    assert "note:" not in result.describe()


def test_max_tokens_are_left_to_train_on(make):
    books = [book("a", 40_000), book("b", 60_000)]
    result = make(books, max_tokens=39_900)
    assert result.splits["train"]["tokens"] >= 39_900
    assert 0 < result.splits["validation"]["tokens"] < 200
    assert "note: validation has 0." in result.describe()


def test_a_cut_without_lines_and_spaces_is_between_characters(make, tmp_path):
    make(["é" * 1000], validation_fraction=0.0505)
    dataset = open_dataset(tmp_path / "out")
    (head,), (tail,) = texts(dataset.split("train")), texts(dataset.split("validation"))
    assert head + tail == "é" * 1000 and 45 < len(tail) < 51


@pytest.mark.parametrize("text", ["a", "ab", "a b", "abcdefgh" * 10])
def test_a_tiny_single_text(make, tmp_path, text):
    make([text])
    dataset = open_dataset(tmp_path / "out")
    assert "".join(texts(dataset.split("train")) + texts(dataset.split("validation"))) == text
    assert len(dataset.split("train").tokens) > 2


def test_duplicates_are_dropped_also_across_splits(make, tmp_path):
    (tmp_path / "held.jsonl").write_text(
        '{"text": "story number 3"}\n{"text": "held"}\n{"text": "held"}'
    )
    records = [*stories(5), "story number 1"]
    held = (str(tmp_path / "held.jsonl"),)
    result = make(records, validation_path=held)
    dataset = open_dataset(tmp_path / "out")
    assert texts(dataset.split("train")) == [f"story number {i}" for i in (0, 1, 2, 4)]
    assert texts(dataset.split("validation")) == ["story number 3", "held"]
    assert dataset.manifest["duplicates_dropped"] == 3
    assert "exact duplicates dropped: 3" in result.describe()
    assert dataset.manifest["sources"] == {
        str(tmp_path / "held.jsonl"): 2,
        str(tmp_path / "in.jsonl"): 4,
    }
    make(records, validation_path=held, keep_duplicates=True, force=True)
    assert texts(open_dataset(tmp_path / "out").split("train")) == records


def test_copies_stay_on_one_side(make, tmp_path):
    make(stories(100) * 2, keep_duplicates=True, validation_fraction=0.3)
    dataset = open_dataset(tmp_path / "out")
    train, validation = texts(dataset.split("train")), texts(dataset.split("validation"))
    assert len(train) + len(validation) == 200 and not set(train) & set(validation)


def test_max_tokens_stops_at_a_document(make, tmp_path):
    result = make(["abc", *stories(50)], validation_fraction=0.0, max_tokens=6)
    assert result.splits["train"]["documents"] == 2
    there = sum(len(story) + 2 for story in stories(60))
    assert there < 2000
    with pytest.raises(
        XinslmError, match=rf"max-tokens is 2,000, .* only {there:,} training tokens\."
    ):
        make(stories(60), validation_fraction=0.0, max_tokens=2000, force=True)
    assert open_dataset(tmp_path / "out").manifest["splits"]["train"]["documents"] == 2


@pytest.mark.parametrize(
    "options", [{"validation_fraction": 1.0}, {"validation_fraction": -0.1}, {"max_tokens": 0}]
)
def test_settings_that_make_no_sense(make, options):
    with pytest.raises(UsageError, match="must be"):
        make(["a"], **options)


def test_the_folder_stands_alone_and_is_named_by_its_tokens(make, tmp_path):
    make(stories(50), output_dir=tmp_path / "a")
    make(stories(50), output_dir=tmp_path / "b", name="elsewhere.jsonl")
    make(stories(51), output_dir=tmp_path / "c")
    a, b, c = (open_dataset(tmp_path / name) for name in "abc")
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert (tmp_path / "a" / "tokenizer" / "tokenizer.json").is_file()
    raw = np.frombuffer((tmp_path / "a" / "train" / "tokens.bin").read_bytes(), "<u2")
    assert np.array_equal(raw, a.split("train").tokens)
    with pytest.raises(UsageError, match=r"no split 'test'\. It has: train, validation"):
        a.split("test")


def test_another_tokenizer_is_refused_by_name(make, tmp_path, tokenizer):
    make(stories(5))
    dataset = open_dataset(tmp_path / "out")
    require_tokenizer(dataset, tokenizer.value.fingerprint(), "the model runs/a")
    other = ByteTokenizer(vocab_size=300).fingerprint()
    with pytest.raises(UsageError) as caught:
        require_tokenizer(dataset, other, "the model runs/a")
    message = str(caught.value)
    for part in (
        "the model runs/a",
        other[:12],
        str(tmp_path / "out"),
        dataset.tokenizer_fingerprint[:12],
    ):
        assert part in message


def test_a_damaged_folder_is_refused(make, tmp_path):
    make(stories(50))
    tokens = tmp_path / "out" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(XinslmError, match=r"tokens.bin has .* the manifest says"):
        open_dataset(tmp_path / "out")
    with pytest.raises(UsageError, match=r"not a dataset folder.*xinslm prepare"):
        open_dataset(tmp_path)


def test_progress_is_reported(make):
    reports = []
    make(stories(3000), on_progress=reports.append)
    counts = [r.done for r in reports if not r.note]
    assert counts == sorted(counts) and counts[-1] == 3000 and len(counts) > 2
    assert all(r.unit == "documents" and r.values["tokens/s"] > 0 for r in reports if not r.note)


def test_a_folder_that_holds_something_is_kept(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="already holds something"):
        make(stories(5))
    assert left(tmp_path / "out") == ["mine.txt"]
    with pytest.raises(UsageError, match="no xinslm command made"):
        make(stories(5), force=True)
    assert left(tmp_path / "out") == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    make(stories(5))
    make(stories(6), force=True)
    assert open_dataset(tmp_path / "out").manifest["splits"]["train"]["documents"] == 5


@pytest.mark.parametrize("force", [False, True])
def test_an_output_folder_in_the_input_is_refused(make, tmp_path, force):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a book")
    for output, message in (("books/out", "lies in .*books, which is read"), ("books", "is the")):
        for given in ({"name": "books"}, {"validation_path": (str(tmp_path / "books"),)}):
            config = PrepareConfig(
                data_path=(str(tmp_path / given.pop("name", "other.txt")),),
                tokenizer_path=tmp_path,
                output_dir=tmp_path / output,
                force=force,
                **given,
            )
            with pytest.raises(UsageError, match=message) as caught:
                prepare.run(config)
            assert "--force" not in str(caught.value)
    assert left(tmp_path / "books") == ["a.txt"]


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_disk_full_and_interrupt_leave_nothing(make, tmp_path, monkeypatch, fault):
    append = SplitWriter.append

    def failing(self, *arguments):
        if len(self) == 20:
            raise fault
        append(self, *arguments)

    monkeypatch.setattr(SplitWriter, "append", failing)
    with pytest.raises(type(fault)):
        make(stories(50))
    assert left(tmp_path) == ["in.jsonl"]


def test_a_truly_full_disk_leaves_nothing_and_says_so(make, tmp_path, monkeypatch):
    real = open

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path, mode="r", *rest, **options):
        if str(path).endswith("tokens.bin") and "w" in mode:
            return io.BufferedRandom(Full(path, "w+b"))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("xinslm.data.writer.open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        make(stories(5000))
    assert left(tmp_path) == ["in.jsonl"]


def test_killed_in_the_middle(make, tmp_path):
    (tmp_path / "k.jsonl").write_text(
        "\n".join(json.dumps({"text": f"story {i}"}) for i in range(3000))
    )
    script = f"""
        import sys, time, types
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from fake_tokenizer import ByteTokenizer
        from xinslm.data import prepare
        from xinslm.data.config import PrepareConfig
        class Slow(ByteTokenizer):
            calls = 0
            def encode_batch(self, texts):
                self.calls += 1
                if self.calls == 2:
                    print("now", flush=True)
                    time.sleep(60)
                return super().encode_batch(texts)
        module = sys.modules["xinslm.tokenizer.load"] = types.ModuleType("load")
        module.load_tokenizer = lambda path: Slow()
        prepare.run(PrepareConfig(("{tmp_path}/k.jsonl",), Path("tok"), Path("{tmp_path}/out")))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"now\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert any(name.startswith(".out.partial-") for name in left(tmp_path))
    make(stories(50))
    assert open_dataset(tmp_path / "out").manifest["splits"]["train"]["documents"] > 40
    assert left(tmp_path) == ["in.jsonl", "k.jsonl", "out"]


def test_memory_holds_hashes_not_the_corpus(make, tmp_path):
    import tracemalloc

    big = [hashlib.sha256(str(i).encode()).hexdigest() * 40 for i in range(8000)]  # 20 MB of text
    with gzip.open(tmp_path / "big.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in big)
    del big
    module = sys.modules["xinslm.tokenizer.load"]

    class Words(ByteTokenizer):
        def encode(self, text, allowed_special=False):
            return list(text.encode()[::64])

    module.load_tokenizer = lambda path: Words()
    config = PrepareConfig((str(tmp_path / "big.jsonl.gz"),), tmp_path / "tok", tmp_path / "out")
    tracemalloc.start()
    prepare.run(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("splits", None),
        ("splits", ["train"]),
        ("splits", {"train": 3}),
        ("inputs", None),
        ("inputs", {}),
        ("vocab_size", None),
        ("vocab_size", "9"),
        ("dtype", None),
        ("dtype", "float99"),
    ],
)
def test_a_damaged_manifest_is_named(make, tmp_path, key, value):
    make(stories(50))
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    for damaged in ({**manifest, key: value}, {k: v for k, v in manifest.items() if k != key}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(XinslmError, match=rf"manifest\.json(: .*{key}| is incomplete)"):
            open_dataset(tmp_path / "out")
