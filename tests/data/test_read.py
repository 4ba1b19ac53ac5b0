import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xinslm.data.read import ReadOptions, read_documents
from xinslm.errors import UsageError, XinslmError


@pytest.fixture
def put(tmp_path):
    """Writes a file and gives its path as a string."""

    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def texts(*paths, **options):
    return [document.text for document in read_documents(paths, ReadOptions(**options))]


def error(*paths, kind=XinslmError, **options):
    with pytest.raises(kind) as caught:
        texts(*paths, **options)
    return str(caught.value)


def test_a_text_file_is_one_document_byte_for_byte(put):
    assert texts(put("a.txt", b"one\r\ntwo\n\n three\n")) == ["one\r\ntwo\n\n three\n"]


def test_endoftext_lines_cut_a_text_file(put):
    data = "a\nb\n<|endoftext|>\r\nc <|endoftext|> d\n\n<|endoftext|>\n<|endoftext|>\ne\r\n"
    path = put("a.txt", data)
    documents = list(read_documents([path]))
    assert [d.text for d in documents] == ["a\nb", "c <|endoftext|> d\n", "e"]
    assert [d.source for d in documents] == [f"{path}:1", f"{path}:4", f"{path}:8"]
    assert texts(path, split_documents="file") == [data]


def test_blank_lines_and_lines_cut_a_text_file(put):
    path = put("a.txt", "one\ntwo\n\n \r\n\nthree\r\n\nfour")
    assert texts(path, split_documents="blank-line") == ["one\ntwo", "three", "four"]
    assert texts(path, split_documents="line") == ["one", "two", "three", "four"]


def test_json_array_object_and_concatenated_objects(put):
    records = [{"text": "a, ]"}, {"text": "b\n"}, {"text": "é\u2028"}]
    assert texts(put("a.json", json.dumps(records, indent=2))) == ["a, ]", "b\n", "é\u2028"]
    assert texts(put("b.json", json.dumps(records[0]))) == ["a, ]"]
    assert texts(put("c.json", " [\n" + json.dumps(records[2], ensure_ascii=False) + "\n]\n")) == [
        "é\u2028"
    ]
    assert texts(put("d.json", "\n".join(map(json.dumps, records)))) == ["a, ]", "b\n", "é\u2028"]


def test_json_lines_name_file_and_line(put):
    path = put("a.jsonl", '\ufeff{"text": "a"}\r\n\n{"text": "b"}')
    assert [(d.text, d.source) for d in read_documents([path])] == [
        ("a", f"{path}:1"),
        ("b", f"{path}:3"),
    ]


json_texts = st.lists(
    st.text(st.characters(codec="utf-8")).filter(lambda t: t and not t.isspace()), min_size=1
)


@given(json_texts, st.booleans(), st.sampled_from([None, 1, 2]))
def test_what_json_writes_is_read_back(tmp_path_factory, values, ascii_only, indent):
    folder = tmp_path_factory.mktemp("json")
    records = [{"text": value} for value in values]
    (folder / "a.json").write_text(
        json.dumps(records, ensure_ascii=ascii_only, indent=indent), "utf-8"
    )
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    (folder / "b.jsonl").write_bytes(lines.encode())
    assert texts(str(folder / "a.json")) == values
    assert texts(str(folder / "b.jsonl")) == values


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.json.gz", "a.jsonl.gz", "a.parquet.gz", "a.parquet"]
)
def test_compressed_and_parquet(put, name):
    data = b'{"text": "hello"}\n'
    if "parquet" in name:
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["hello", "you"]}), buffer)
        data = buffer.getvalue()
    path = put(name, gzip.compress(data) if name.endswith(".gz") else data)
    got = [(d.text, d.source) for d in read_documents([path])]
    expected = (
        [("hello", f"{path}:1"), ("you", f"{path}:2")]
        if "parquet" in name
        else [("hello", f"{path}:1")]
    )
    assert got == ([(data.decode(), f"{path}:1")] if name == "a.txt.gz" else expected)


def test_parquet_holds_chats_too(put, tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages]}), tmp_path / "a.parquet")
    (document,) = read_documents([str(tmp_path / "a.parquet")])
    assert document.messages == tuple(messages)


def test_folder_is_read_in_order_and_says_what_it_leaves_out(put, tmp_path):
    put("d/b.txt", "b")
    put("d/a/z.jsonl", '{"text": "z"}')
    put("d/c.JSON", '{"text": "c"}')
    put("d/.hidden.txt", "hidden")
    put("d/picture.png", "x")
    put("d/none.txt", "")
    notes = []
    assert texts(str(tmp_path / "d"), on_note=notes.append) == ["z", "b", "c"]
    assert any("picture.png" in note and ".parquet" in note for note in notes)
    assert any("none.txt is empty" in note for note in notes)


def test_folder_without_anything_usable(put, tmp_path):
    put("d/picture.png", "x")
    assert "contains only picture.png" in error(str(tmp_path / "d"), kind=UsageError)
    (tmp_path / "e").mkdir()
    assert "contains no file" in error(str(tmp_path / "e"), kind=UsageError)


def test_saved_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "dict")
    assert texts(str(tmp_path / "one")) == ["a", "b"]
    assert texts(str(tmp_path / "dict"), dataset_split="test") == ["b"]
    assert "choose with --dataset-split: train, test" in error(
        str(tmp_path / "dict"), dataset_split="dev"
    )


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"instruction": "i", "input": "", "output": "o"}, ["i", "o"]),
        ({"instruction": "i", "output": "o", "text": "all"}, ["i", "o"]),
        ({"instruction": "i", "input": "x", "output": "o"}, ["i\n\nx", "o"]),
        ({"prompt": "p", "response": "r"}, ["p", "r"]),
        ({"prompt": "p", "completion": "c"}, ["p", "c"]),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            ["u", "a"],
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            ["u", "a"],
        ),
    ],
)
def test_conversations_are_recognised(put, record, expected):
    (document,) = read_documents([put("a.jsonl", json.dumps(record))])
    assert document.text is None
    assert [m["content"] for m in document.messages] == expected
    assert [m["role"] for m in document.messages] == ["user", "assistant"]


def test_text_field(put):
    path = put("a.jsonl", '{"body": "b", "text": "t"}')
    assert texts(path, text_field="body") == ["b"]
    assert f"{path}:1: has no 'title'. Keys here: 'body', 'text'" in error(path, text_field="title")


@pytest.mark.parametrize(
    "line, words",
    [
        (
            '{"title": "x", "body": 1}',
            ["'title', 'body'", '{"text"}', '{"prompt", "response"}', "--text-field"],
        ),
        ('{"text": 3}', ["'text' must be text, but is a number"]),
        ('{"text": null}', ["'text' must be text, but is null"]),
        ('["text"]', ["found a list"]),
        ('{"messages": []}', ["must be a list of messages, but is an empty list"]),
        (
            '{"messages": [{"role": "robot", "content": "x"}]}',
            ["messages[0] has the role 'robot'", "assistant"],
        ),
        ('{"messages": [{"role": "user"}]}', ["messages[0]: has no 'content'"]),
        ('{"text": "\\ud800"}', ["half a surrogate pair"]),
        ('{"text": "half', ["not valid JSON", "incomplete"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"text": ' + "9" * 5000 + "}", ["not valid JSON"]),
    ],
)
def test_bad_records_name_file_and_line(put, line, words):
    path = put("a.jsonl", '{"text": "fine"}\n' + line)
    message = error(path)
    assert message.startswith(f"{path}:2: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "data, line",
    [
        ('[\n{"text": "a"},\n{"text": "b"', 3),
        ('[\n{"text": "a"}\n{"text": "b"}]', 3),
        ('[{"text": "a"},\n]', 2),
        ('[{"text": "a"}]\n\n x', 1),
        ('[{"text": "a"},\n{"text": \n nonsense}]', 3),
        ("[", 1),
    ],
)
def test_half_written_json_names_the_line(put, data, line):
    path = put("a.json", data)
    assert error(path).startswith(f"{path}:{line}: not valid JSON")


def test_wrong_encoding_names_the_byte(put):
    path = put("a.txt", b"\xef\xbb\xbfcaf\xc3\xa9\ncaf\xe9\n")
    assert f"{path}: byte 12 (0xe9) is not UTF-8" in error(path)
    assert texts(put("b.txt", b"\xef\xbb\xbfcaf\xc3\xa9")) == ["café"]
    assert "iconv -f UTF-16" in error(put("c.txt", "hello".encode("utf-16")))
    path = put("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"{path}: byte 24 (0xff)" in error(path)


def test_binary_is_refused(put):
    path = put("a.txt", b"some\nt\0ext")
    assert error(path) == f"{path}:2: not a text file (NUL at byte 6)"
    assert "not a valid Parquet file" in error(put("a.parquet", b"PAR1 no"))


def test_damaged_gzip_names_the_file(put):
    whole = gzip.compress(b'{"text": "a"}\n' * 5000)
    assert "a.jsonl.gz: the .gz file is incomplete" in error(put("a.jsonl.gz", whole[:-20]))
    assert "b.jsonl.gz: not a valid .gz file" in error(put("b.jsonl.gz", b"plain"))
    assert "c.jsonl.gz: not a valid .gz file" in error(
        put("c.jsonl.gz", whole[:-6] + b"\1\2" + whole[-4:])
    )


def test_an_empty_corpus_is_an_error(put):
    notes = []
    assert "every document is empty" in error(
        put("a.txt", ""), put("b.txt", " \n"), on_note=notes.append
    )
    assert len(notes) == 2
    assert "no data given" in error(kind=UsageError)


def test_a_missing_path_names_near_ones(put, tmp_path):
    put("stories.txt", "x")
    put("other.bin", "x")
    message = error(str(tmp_path / "storis.txt"), kind=UsageError)
    assert f"Did you mean {tmp_path / 'stories.txt'}?" in message
    assert f"{tmp_path} exists, but" in error(str(tmp_path / "qq" / "x.txt"), kind=UsageError)
    assert "unknown file type" in error(str(tmp_path / "other.bin"), kind=UsageError)


def test_paths_are_checked_before_anything_is_read(put, tmp_path):
    documents = read_documents([put("a.txt", "x"), str(tmp_path / "missing.txt")])
    with pytest.raises(UsageError, match="does not exist"):
        next(documents)


def test_a_hub_name_without_a_connection_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = error("someone/stories")
    assert "someone/stories is not a local path" in message and "--data-path" in message
    with pytest.raises(UsageError, match=r"stories does not exist.*OWNER/NAME"):
        texts("stories")
