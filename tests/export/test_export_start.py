"""Texts and chats begin alike in xinslm, in transformers and in llama.cpp, and write the same."""

import pytest
import torch
from gguf import GGUFReader

from llama_cpp import LlamaCpp
from small_models import TEXT, save_random_model
from xinslm.data.encode import Encoder
from xinslm.data.records import Document
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run
from xinslm.inference.generate import generate, prompt_ids
from xinslm.inference.torch_engine import TorchEngine
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.sampling import Sampling
from xinslm.tokenizer import BPETokenizer, load_tokenizer

TEXTS = ["The quick", "Numbers: 0 1", "x"]
SAID = [{"role": "user", "content": "Why?"}]
COUNT = 12


def save_ours(folder):
    """A random model with a tokenizer of our own."""
    tokenizer = BPETokenizer(320)
    tokenizer.train([TEXT])
    token = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.bos_id)
    save_random_model(
        folder, vocab_size=tokenizer.vocab_size, **token, pad_token_id=tokenizer.pad_id
    )
    tokenizer.save(folder)
    return tokenizer


def our_text(folder, prompt, chat=False):
    engine = TorchEngine.load(folder)
    ids = prompt_ids(engine.tokenizer, prompt, chat)
    pieces = generate(engine, ids, Sampling(temperature=0), COUNT, at_start=chat)
    return "".join(piece.text for piece in pieces), ids


def their_text(folder, ids):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    given = torch.tensor([ids])
    written = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=COUNT,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("start")
    tokenizer = save_ours(root / "model")
    result = run(GgufConfig(root / "model", root / "m.gguf", outtype="f32"))
    assert result.notes == ()
    with LlamaCpp(root / "m.gguf") as llama:
        yield root, tokenizer, llama


def test_plain_texts_have_the_same_ids_and_continuation(exported):
    from transformers import AutoTokenizer

    root, tokenizer, llama = exported
    theirs = AutoTokenizer.from_pretrained(root / "model")
    for prompt in TEXTS:
        text, ids = our_text(root / "model", prompt)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert theirs(prompt)["input_ids"] == ids == llama.tokenize(prompt, add_special=True)
        assert text and their_text(root / "model", ids) == text == llama.complete(prompt, COUNT)


def test_chats_have_the_same_ids_and_answer(exported):
    from transformers import AutoTokenizer

    root, tokenizer, llama = exported
    theirs = AutoTokenizer.from_pretrained(root / "model")
    text, ids = our_text(root / "model", SAID[0]["content"], chat=True)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert theirs.apply_chat_template(SAID, add_generation_prompt=True)["input_ids"] == ids
    rendered = llama.apply_template(SAID)
    assert llama.tokenize(rendered, add_special=True, parse_special=True) == ids
    assert text and their_text(root / "model", ids) == text
    assert llama.answer(SAID, COUNT) == (text, len(ids))


def test_loss_of_the_first_token_is_the_documents(exported):
    """transformers' own loss of `tokenizer(text)` is that of the document which training sees."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, tokenizer, _ = exported
    theirs = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(root / "model")("The", return_tensors="pt").input_ids
    (document,) = Encoder(tokenizer, "none", False)([Document("d", text="The")])
    model = TorchEngine.load(root / "model").model
    tokens = torch.from_numpy(document.tokens)[None]
    with torch.no_grad():
        log_p = model.logits(model.hidden(tokens[:, :-1]))[0].log_softmax(-1)
        loss = theirs(ids, labels=ids).loss.item()
    targets = torch.from_numpy(document.mask[1:]) > 0
    ours = -log_p[range(len(log_p)), tokens[0, 1:]][targets].mean().item()
    assert len(log_p) == int(targets.sum()) >= 1 and loss == pytest.approx(ours, abs=1e-5)


def test_a_quantized_folder_and_its_export_begin_alike(exported, tmp_path):
    root, tokenizer, _ = exported
    quantize(QuantizeConfig(root / "model", tmp_path / "q4", method="rtn"))
    run(GgufConfig(tmp_path / "q4", tmp_path / "q4.gguf"))
    fields = GGUFReader(tmp_path / "q4.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_id
    assert load_tokenizer(tmp_path / "q4").start_ids == [tokenizer.bos_id]


def test_a_template_without_the_start_is_noted(tmp_path):
    """llama.cpp begins a chat as it begins a text: of such a template it makes other ids."""
    tokenizer = save_ours(tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text(file.read_text().removeprefix("{{ bos_token }}"))
    result = run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    assert "template does not begin with BOS" in result.describe()
    _, ids = our_text(tmp_path / "model", SAID[0]["content"], chat=True)
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        assert llama.answer(SAID, COUNT)[1] == len(ids) + 1 and ids[0] != tokenizer.bos_id


def test_an_end_of_text_in_front_needs_no_bos(tmp_path):
    """A nested tokenizer of a teacher that has only EOS: it becomes BOS, which begins a text."""
    save_ours(tmp_path / "model")
    teacher = load_tokenizer(tmp_path / "model")
    named = {"named_tokens": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}}
    teacher = BPETokenizer.of(type(teacher.definition)(**vars(teacher.definition) | named))
    student = BPETokenizer.prefix_of(teacher, teacher.vocab_size)
    student.save(tmp_path / "model")
    assert student.start_ids == [student.bos_id] == [student.eos_id]
    run(GgufConfig(tmp_path / "model", tmp_path / "m.gguf", outtype="f32"))
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        assert llama.tokenize("a", add_special=True) == [student.eos_id, *student.encode("a")]
        _, ids = our_text(tmp_path / "model", SAID[0]["content"], chat=True)
        rendered = llama.apply_template(SAID)
        assert llama.tokenize(rendered, add_special=True, parse_special=True) == ids
