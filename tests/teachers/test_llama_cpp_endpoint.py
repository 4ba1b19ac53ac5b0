"""The endpoint adapter against a real llama.cpp server: its text, its log-probabilities, what it
cannot do.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_cpp import LlamaCpp
from xinslm.errors import UsageError
from xinslm.export.config import GgufConfig
from xinslm.export.gguf import run as export
from xinslm.model.files import open_model
from xinslm.sampling import UNFILTERED
from xinslm.teachers.endpoint import EndpointTeacher
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.teachers.generate import prompt_ids
from xinslm.teachers.huggingface import HuggingFaceTeacher


@pytest.fixture(scope="module")
def served(shared_data, tmp_path_factory):
    """The real stories260K with a chat template of its own: its folder, and the address of
    llama.cpp serving it.
    """
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(shared_data / "models" / "stories260K", folder / "model")
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    export(GgufConfig(folder / "model", folder / "m.gguf", outtype="f32"))
    with LlamaCpp(folder / "m.gguf", 512) as llama:
        yield folder / "model", llama._server.listening_address


def tokens_of(written, tokenizer):
    # pieces come behind single bytes
    table = {tokenizer.token_bytes(t): t for t in range(tokenizer.vocab_size)}
    return [table[data] for data in written.token_bytes]


@pytest.mark.parametrize(
    "prompt",
    ["Once upon a", [{"role": "user", "content": "Tim saw a big dog. He"}]],
    ids=["text", "chat"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_text_and_log_probabilities_are_transformers(served, prompt, temperature):
    """Whatever the temperature it draws with, llama.cpp tells the model's own distribution."""
    folder, url = served
    teacher = EndpointTeacher(url, EndpointConfig(), top=8, tokenizer=str(folder))
    assert teacher.max_length == 512
    assert teacher.gives_log_probs(prompt) is None
    written = teacher.write(prompt, 7, replace(UNFILTERED, temperature=temperature), 12)
    reference = HuggingFaceTeacher(open_model(folder))
    ids = prompt_ids(reference.tokenizer, prompt)
    new = tokens_of(written, reference.tokenizer)
    assert len(new) > 3 or written.finished
    log_p = (
        reference.logits(reference.states([np.array([*ids, *new])]))
        .double()
        .log_softmax(1)[len(ids) - 1 : -1]
    )
    expected = log_p[torch.arange(len(new)), new]
    np.testing.assert_allclose(written.log_probs, expected.numpy(), atol=1e-3)
    for row, top in zip(log_p, written.top, strict=True):
        assert len(top) == 12
        values, order = row.topk(12)
        np.testing.assert_allclose([value for _, value in top], values.numpy(), atol=1e-3)
        assert top[0][0] == reference.tokenizer.token_bytes(int(order[0]))
    assert written.finished == (len(new) < 12)
    if temperature == 0:
        assert new == log_p.argmax(1).tolist()


def test_it_is_told_apart_from_servers_that_score_given_text(served):
    folder, url = served
    teacher = EndpointTeacher(url, EndpointConfig(), tokenizer=str(folder))
    with pytest.raises(
        UsageError,
        match=r"cannot score a given text \(it ignores prompt_logprobs\).*synthesize",
    ):
        teacher.require_scoring()


def test_an_address_that_is_no_api_is_named(served):
    with pytest.raises(UsageError, match="Is this the address of an OpenAI-compatible API"):
        EndpointTeacher(f"{served[1]}/elsewhere", EndpointConfig())
