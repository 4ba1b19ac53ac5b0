"""The start token: our tokenizers put it in front of a text, others keep what their files say."""

import json

import pytest
from tokenizers import Tokenizer

from xinslm.data.encode import Encoder
from xinslm.data.records import Document
from xinslm.errors import XinslmError
from xinslm.inference.generate import prompt_ids
from xinslm.teachers.generate import prompt_ids as teacher_prompt_ids
from xinslm.tokenizer import BPETokenizer, load_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
ZEPHYR = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def ours(prose):
    tokenizer = BPETokenizer(vocab_size=600)
    tokenizer.train(prose)
    return tokenizer


def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def edited(folder, processor):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8")) | {"post_processor": processor}
    file.write_text(json.dumps(content), "utf-8")
    return folder


def template(*contents):
    """A post-processor that puts special tokens around a text, as `tokenizers` writes it."""
    pieces = [{"SpecialToken": {"id": content, "type_id": 0}} for content, _ in contents]
    single = [*pieces, {"Sequence": {"id": "A", "type_id": 0}}, *pieces[:1]]
    special = {c: {"id": c, "ids": [index], "tokens": [c]} for c, index in contents}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


@pytest.mark.parametrize("text", ["One morning", "", " x"])
def test_prompt_document_and_transformers_begin_alike(ours, tmp_path, text):
    ours.save(tmp_path)
    theirs = auto(tmp_path)(text)["input_ids"]
    assert theirs == [ours.bos_id, *ours.encode(text)]
    for tokenizer in (ours, load_tokenizer(tmp_path)):
        assert prompt_ids(tokenizer, text, chat=False) == theirs
        (document,) = Encoder(tokenizer, "none", False)([Document("d", text=text)])
        assert document.tokens.tolist() == theirs
        assert document.mask.tolist() == [0] + [1] * (len(theirs) - 1)


def test_a_chat_begins_with_one_start_token(ours, tmp_path):
    ours.save(tmp_path)
    ids, _ = ours.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1
    theirs = auto(tmp_path)
    assert theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] == ids
    text = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_a_start_that_a_template_has_already_is_not_doubled():
    tokenizer = BPETokenizer(300, special_tokens=("<|im_start|>", "<|im_end|>"))
    ids, _ = tokenizer.apply_chat_template(CHAT)
    start = tokenizer.special_tokens["<|im_start|>"]
    assert tokenizer.start_ids == [start] and ids[0] == start != ids[1]


def test_a_tokenizer_without_special_tokens_has_no_start(tmp_path):
    tokenizer = BPETokenizer(256, special_tokens=())
    tokenizer.save(tmp_path)
    assert tokenizer.start_ids == [] == load_tokenizer(tmp_path).start_ids
    assert auto(tmp_path)("ab")["input_ids"] == tokenizer.encode("ab")


@pytest.mark.parametrize(
    "named", [{"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "</s>"}]
)
def test_a_nested_tokenizer_begins_as_its_documents_do(prose, tmp_path, named):
    """Also when the teacher has no BOS, or adds none, and has a template of its own."""
    teacher = BPETokenizer(500, special_tokens=("<s>", "</s>"))
    teacher.train(prose)
    values = {"named_tokens": named, "chat_template": ZEPHYR, "post_processor": None}
    teacher = BPETokenizer.of(type(teacher.definition)(**vars(teacher.definition) | values))
    student = BPETokenizer.prefix_of(teacher, 400)
    start = student.special_tokens[named.get("bos_token", "</s>")]
    student.save(tmp_path)
    assert student.start_ids == [start]
    assert auto(tmp_path)("hello")["input_ids"] == [start, *student.encode("hello")]
    ids, _ = student.apply_chat_template(CHAT)
    assert ids[0] == start and ids[1] != start
    assert auto(tmp_path).apply_chat_template(CHAT)["input_ids"] == ids


def test_another_tokenizer_keeps_what_its_files_say(ours, tmp_path):
    """Documents, prompts of both generators and `AutoTokenizer` begin alike."""
    ours.save(tmp_path)
    end = ours.special_tokens["<|im_end|>"]
    one, two = ("<|im_end|>", end), ("<|pad|>", ours.pad_id)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    for processor, start in [
        (None, []),
        (byte_level, []),
        (template(one), [end]),
        (template(one, two), [end, ours.pad_id]),
        ({"type": "Sequence", "processors": [byte_level, template(one)]}, [end]),
    ]:
        tokenizer = load_tokenizer(edited(tmp_path, processor))
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.start_ids == start == backend.encode("a").ids[: len(start)]
        assert prompt_ids(tokenizer, "a", chat=False) == [*start, *ours.encode("a")]
        assert prompt_ids(tokenizer, "", chat=False) == (start or [ours.bos_id])
        (twice,) = Encoder(tokenizer, "eos", False)([Document("d", text="a a")])
        text = [*start, *ours.encode("a a")]
        assert twice.tokens.tolist() == [*text, ours.eos_id]
        unseen = len(start) or 1  # nothing predicts the first token of a text without a start
        assert twice.mask.tolist() == [0] * unseen + [1] * (len(text) + 1 - unseen)
        assert teacher_prompt_ids(tokenizer, "a a") == text
        tokenizer.save(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").start_ids == start
        assert tokenizer.fingerprint() == ours.fingerprint()


def test_a_start_outside_the_vocabulary_is_refused(ours, tmp_path):
    ours.save(tmp_path)
    with pytest.raises(XinslmError, match=r"tokenizer\.json.*ids \[600\], which are not all in"):
        load_tokenizer(edited(tmp_path, template(("<|pad|>", 600))))
