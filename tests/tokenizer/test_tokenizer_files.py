"""Files: what is written loads elsewhere with the same ids; what is read is what the file says; bad
ones refused.
"""

import json
import pickle
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xinslm.errors import XinslmError
from xinslm.tokenizer import BPETokenizer, load_tokenizer
from xinslm.tokenizer.files import UnsupportedTokenizerError
from xinslm.tokenizer.hf import HFTokenizer


@pytest.fixture
def folder(tmp_path, trained):
    trained.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="module")
def trained(prose):
    tokenizer = BPETokenizer(vocab_size=800)
    tokenizer.train(prose)
    return tokenizer


def edit(folder, **changes):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(content), "utf-8")


def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_transformers_loads_the_folder_with_the_same_ids(
    folder, trained, tricky, prose, model_type
):
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = auto(folder)
    for text in [*tricky, *prose[:10]]:
        assert theirs(text)["input_ids"] == [796, *trained.encode(text, allowed_special=True)]
        assert theirs(text, split_special_tokens=True)["input_ids"] == [796, *trained.encode(text)]
        assert theirs(text, add_special_tokens=False)["input_ids"] == trained.encode(
            text, allowed_special=True
        )
        assert theirs.decode(trained.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (796, 796, 799)
    assert len(theirs) == trained.vocab_size and theirs.chat_template == trained.chat_template


def test_written_class_is_known_everywhere(folder):
    """Traps 5, 15: not transformers' own TokenizersBackend; nothing that changes text is left to a
    default.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (
        config["tokenizer_class"] == "PreTrainedTokenizerFast"
        and config["clean_up_tokenization_spaces"] is False
    )
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    assert content["truncation"] is None and content["padding"] is None
    assert content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] is False
    assert not list(folder.glob("*.pkl"))


def test_what_is_saved_is_read_back(folder, trained, tmp_path):
    again = BPETokenizer.load(folder)
    assert again.definition == trained.definition
    again.save(tmp_path / "second")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "second" / name).read_bytes() == (folder / name).read_bytes()
    assert BPETokenizer.load(folder / "tokenizer.json").definition == trained.definition


def test_a_template_of_another_tokenizer_does_not_stay(folder):
    BPETokenizer(300, special_tokens=("<end>",)).save(folder)
    assert load_tokenizer(folder).chat_template is None


def test_old_spellings_are_read(folder, trained, prose):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    edit(folder, model=content["model"])
    named = {"eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None}
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": templates}))
    (folder / "chat_template.jinja").unlink()
    again = load_tokenizer(folder)
    assert again.encode(prose[0]) == trained.encode(prose[0])
    assert (again.bos_id, again.eos_id, again.pad_id) == (
        None,
        798,
        None,
    ) and again.chat_template == "y"


def test_what_surrounds_a_text_is_kept_for_transformers_and_not_applied(folder, tmp_path, trained):
    single = [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [796], "tokens": ["<|endoftext|>"]}}
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": tokens,
    }
    edit(folder, post_processor=processor)
    tokenizer = BPETokenizer.load(folder)
    assert tokenizer.encode("hi") == trained.encode("hi")
    tokenizer.save(tmp_path / "kept")
    assert auto(tmp_path / "kept")("hi")["input_ids"] == [796, *trained.encode("hi")]


def test_nfc_is_applied_like_hugging_face(folder):
    edit(folder, normalizer={"type": "NFC"})
    ours, theirs = BPETokenizer.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "e\u0301 \u212b <|im_end|>e\u0301"
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, allowed_special=True) == expected
    assert (
        ours.fingerprint()
        != BPETokenizer.of(
            ours.definition.__class__(**{**vars(ours.definition), "normalizer": None})
        ).fingerprint()
    )


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_baked_in_truncation_is_refused(folder, setting):
    edit(
        folder,
        **{
            setting: {
                "max_length": 8,
                "strategy": "LongestFirst",
                "stride": 0,
                "direction": "Right",
            }
        },
    )
    with pytest.raises(
        XinslmError, match=rf'tokenizer\.json: "{setting}" is set .*Set "{setting}" to null'
    ):
        load_tokenizer(folder)


def test_files_that_are_no_tokenizer(tmp_path, folder):
    with pytest.raises(XinslmError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(XinslmError, match=r"it has no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    text = (folder / "tokenizer.json").read_bytes()
    bad = tmp_path / "tokenizer.json"
    for content, message in [
        (text[: len(text) // 2], "half-written"),
        (b"", "not valid JSON"),
        (pickle.dumps({"a": 1}), "is a pickle"),
        (b"\xff\xfe\x00binary", "not a JSON file"),
        (b"[1, 2]", "has no 'model'"),
        (b'{"model": {"type": "BPE"}}', "not a valid tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": [], "merges": 3}}', "not a valid tokenizer.json"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(XinslmError, match=message):
            load_tokenizer(bad)


def test_merges_hold_no_copies_of_tokens(folder):
    definition = BPETokenizer.load(folder).definition
    own = {id(token) for token in definition.vocab}
    assert len(definition.merges) > 500
    assert {id(part) for merge in definition.merges for part in merge} <= own


def test_a_merge_without_its_token_is_found(folder):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"].insert(3, ["q", "~"])
    edit(folder, model=content["model"])
    with pytest.raises(XinslmError, match=r"merge 3 \('q', '~'\)"):
        load_tokenizer(folder)


def other_byte_level(path, prose):
    """A byte-level BPE with a split rule that BPETokenizer does not know: punctuation before
    GPT-2's.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    steps = [
        pre_tokenizers.Punctuation(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))


def test_unknown_split_rules_go_to_hugging_face(tmp_path, prose):
    other_byte_level(tmp_path / "other", prose)
    with pytest.raises(UnsupportedTokenizerError, match="does not split text like"):
        BPETokenizer.load(tmp_path / "other")
    tokenizer = load_tokenizer(tmp_path / "other")
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.decode(tokenizer.encode("é 12")) == "é 12"


def test_gpt2_files(shared_data, tmp_path, corpora):
    """vocab.json and merges.txt, against the same file read by `tokenizers`."""
    ours = load_tokenizer(shared_data / "tokenizers/gpt2")
    source = shared_data / "tokenizers/gpt2"
    theirs = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in corpora["peps"][:10]:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.eos_id == 50256
    ours.save(tmp_path)
    assert auto(tmp_path)("It's 2024\n\n")["input_ids"] == ours.encode("It's 2024\n\n")


@pytest.mark.parametrize("name", ["models/stories5M", "tokenizers/smollm2"])
def test_real_byte_level_files(shared_data, corpora, tricky, name, tmp_path):
    source = shared_data / name
    ours, theirs = load_tokenizer(source), Tokenizer.from_file(str(source / "tokenizer.json"))
    assert isinstance(ours, BPETokenizer)
    theirs.encode_special_tokens = True
    for text in [*corpora["stories"][:50], *corpora["peps"][:10], *tricky]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    ours.save(tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.get_vocab(with_added_tokens=True) == theirs.get_vocab(with_added_tokens=True)
    assert again.encode(corpora["peps"][0]).ids == ours.encode(corpora["peps"][0])
    assert load_tokenizer(tmp_path).fingerprint() == ours.fingerprint()


def test_a_copy_of_a_model_folder_says_the_same(shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / "models/stories5M")
    shutil.copy(shared_data / "models/stories5M/tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).eos_id is None  # no tokenizer_config.json, no roles
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
        4094,
        4094,
        4095,
        4096,
    )
