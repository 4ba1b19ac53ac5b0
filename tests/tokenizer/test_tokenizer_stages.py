"""The stages `tokenizer train` and `tokenizer show`."""

import itertools
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from xinslm.data import prepare
from xinslm.data import train_tokenizer as train
from xinslm.data.config import PrepareConfig
from xinslm.errors import UsageError, XinslmError
from xinslm.files import read_manifest
from xinslm.tokenizer import BPETokenizer, load_tokenizer, show
from xinslm.tokenizer.config import ShowConfig, TokenizerConfig


@pytest.fixture
def text_file(tmp_path, prose):
    file = tmp_path / "text.jsonl"
    rows = [{"text": text} for text in prose[:50]]
    chat = {
        "messages": [
            {"role": "user", "content": "zebra zebra"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    file.write_text("\n".join(json.dumps(row) for row in [*rows, chat]), "utf-8")
    return file


def test_train_writes_a_tokenizer_folder(tmp_path, text_file, prose):
    config = TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=600)
    notes = []
    result = train.run(config, notes.append)
    manifest = read_manifest(config.output_dir, "tokenizer", 1, "xinslm tokenizer train")
    made = BPETokenizer.load(config.output_dir)
    assert (
        manifest["fingerprint"] == made.fingerprint()
        and manifest["vocab_size"] == made.vocab_size == 600
    )
    expected = BPETokenizer(600)
    expected.train([*prose[:50], "zebra zebra\nyes"])
    assert made.merges == expected.merges
    assert (
        f"{result.vocab_size:,} ids" in result.describe()
        and str(config.output_dir) in result.describe()
    )
    tokens = sum(len(made.encode(text)) for text in [*prose[:50], "zebra zebra\nyes"])
    size = sum(len(text.encode()) for text in [*prose[:50], "zebra zebra\nyes"])
    assert result.bytes_per_token == pytest.approx(size / tokens)
    assert not any(note.note for note in notes)


def test_nothing_is_overwritten_without_force(tmp_path, text_file):
    config = TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=300)
    train.run(config)
    before = (tmp_path / "out/tokenizer.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        train.run(TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=310))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == before
    train.run(TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=310, force=True))
    assert BPETokenizer.load(tmp_path / "out").vocab_size == 310


def test_failure_leaves_nothing(tmp_path, text_file):
    text_file.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(XinslmError, match=r"text\.jsonl:2"):
        train.run(TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]


def test_small_text_is_noted(tmp_path, text_file):
    notes = []
    train.run(TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=90_000), notes.append)
    assert any("the text is too small" in note.note for note in notes)


def test_nested_from_a_teacher(tmp_path, text_file):
    train.run(TokenizerConfig(tmp_path / "teacher", (str(text_file),), vocab_size=600))
    config = TokenizerConfig(
        tmp_path / "out", (str(text_file),), vocab_size=400, prefix_of=tmp_path / "teacher"
    )
    result = train.run(config)
    teacher = BPETokenizer.load(tmp_path / "teacher")
    assert BPETokenizer.load(tmp_path / "out").merges == teacher.merges[: 400 - 260]
    assert read_manifest(tmp_path / "out", "tokenizer", 1, "")["inputs"] == {
        "teacher": teacher.fingerprint()
    }
    assert result.bytes_per_token is not None and result.bytes_per_token > 1
    unmeasured = train.run(
        TokenizerConfig(tmp_path / "bare", vocab_size=400, prefix_of=tmp_path / "teacher")
    )
    assert unmeasured.bytes_per_token is None and "not measured" in unmeasured.describe()


def test_options_without_effect_or_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--data-path, or --prefix-of"):
        train.run(TokenizerConfig(tmp_path / "out"))
    with pytest.raises(UsageError, match="--min-frequency has no effect"):
        train.run(TokenizerConfig(tmp_path / "out", prefix_of=tmp_path, min_frequency=3))


def test_show_follows_the_merges(tmp_path, text_file):
    train.run(TokenizerConfig(tmp_path / "out", (str(text_file),), vocab_size=600))
    tokenizer = BPETokenizer.load(tmp_path / "out")
    text = "zebra thing é🙂\n<|im_end|>"
    result = show.run(ShowConfig(text, tmp_path / "out"))
    assert list(result.ids) == tokenizer.encode(text) and b"".join(result.tokens) == text.encode()
    for piece in result.pieces:
        data = piece.piece.encode()
        tokens = [bytes([byte]) for byte in data]
        for step in piece.steps:
            assert tokenizer.merges[step.rank] == tuple(
                spelled(part) for part in (step.left, step.right)
            )
            assert len(step.tokens) == len(tokens) - 1 and b"".join(step.tokens) == data
            tokens = list(step.tokens)
        assert [tokenizer.token_bytes(t) for t in tokenizer.encode_piece(data)] == tokens
    described = result.describe()
    assert "tokens for" in described and " ".join(map(str, result.ids)) in described
    controlled = show.run(ShowConfig(text, tmp_path / "out", allow_special=True))
    assert controlled.ids[-1] == tokenizer.special_tokens["<|im_end|>"]


def spelled(part):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return "".join(bytes_to_unicode()[byte] for byte in part)


def test_show_without_a_tokenizer_learns_from_the_text():
    result = show.run(ShowConfig("banana banana"))
    assert [token.decode() for token in result.tokens] == ["banana", " ", "banana"] or len(
        result.ids
    ) < 13
    assert "trained on this text" in result.describe()
    with pytest.raises(UsageError, match="empty"):
        show.run(ShowConfig(""))


def test_colours_separate_neighbours():
    from rich.text import Text

    result = show.run(ShowConfig("banana bandana"))
    drawn = show.render(result)
    assert isinstance(drawn, Text)
    styles = [str(span.style) for span in drawn.spans][: len(result.ids)]
    assert all(a != b for a, b in itertools.pairwise(styles))
    assert drawn.plain.splitlines()[1] == " ".join(map(str, result.ids))


def test_bytes_that_are_no_text_are_visible():
    assert show.visible(b" a\n\t") == "·a↵⇥"
    assert show.visible(b"\xf0\x9f") == "\\xf0\\x9f"
    assert show.visible(b"\x1b[31m") == "\\x1b[31m"


@pytest.fixture
def run_folder(tmp_path, text_file):
    """A run folder: only its checkpoints hold a tokenizer."""
    best = tmp_path / "run" / "checkpoints" / "best"
    train.run(TokenizerConfig(best, (str(text_file),), vocab_size=400))
    return tmp_path / "run"


def test_a_run_folder_means_its_best_checkpoint(run_folder, tmp_path, text_file):
    own = load_tokenizer(run_folder / "checkpoints" / "best")
    assert load_tokenizer(run_folder).fingerprint() == own.fingerprint()
    assert show.run(ShowConfig("a thing", run_folder)).ids == tuple(own.encode("a thing"))
    train.run(TokenizerConfig(tmp_path / "nested", vocab_size=300, prefix_of=run_folder))
    assert load_tokenizer(tmp_path / "nested").vocab_size == 300
    prepare.run(PrepareConfig((str(text_file),), run_folder, tmp_path / "data"))
    assert load_tokenizer(tmp_path / "data" / "tokenizer").fingerprint() == own.fingerprint()


def test_a_hub_name_is_taken_from_the_hub(run_folder, tmp_path, monkeypatch):
    """Offline, from a cache laid out as the Hub's client lays it out."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(run_folder / "checkpoints" / "best", repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert (
        load_tokenizer(Path("org/name")).fingerprint() == load_tokenizer(run_folder).fingerprint()
    )
    assert show.run(ShowConfig("a thing", Path("org/name"))).vocab_size == 400
    with pytest.raises(
        UsageError, match=r"org/other does not exist here, and the Hub returned no tokenizer"
    ):
        load_tokenizer("org/other")
    (repository / "snapshots" / ("a" * 40) / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="the Hub repository of that name has no tokenizer"):
        load_tokenizer("org/name")


def test_only_tokenizer_files_are_asked_of_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(name, revision, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer("org/name")
    (patterns,) = asked.values()
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    ]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in wanted)
    refused = [
        "model.safetensors",
        "config.json",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert not any(fnmatch(name, pattern) for name in refused for pattern in patterns)


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "../a", "/a/b"])
def test_what_is_no_hub_name_is_not_asked_for(path, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"there is no tokenizer at {path}"):
        load_tokenizer(path)
