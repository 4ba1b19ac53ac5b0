"""Conversations: what the model is given, what is reused, what happens when the context is full;
and the loop.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from small_models import save_random_model, save_tokenizer
from xinslm.errors import UsageError
from xinslm.inference.chat import Conversation, run
from xinslm.inference.config import ChatConfig
from xinslm.inference.torch_engine import TorchEngine
from xinslm.sampling import Sampling

SAMPLING = Sampling(seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, max_position_embeddings=400)
    return folder


def ask(conversation: Conversation, question: str, max_tokens: int = 8) -> str:
    return "".join(piece.text for piece in conversation.ask(question, SAMPLING, max_tokens))


def test_the_answers_are_those_of_the_whole_text_without_a_cache(folder: Path) -> None:
    """Each turn of one conversation equals a fresh engine that reads everything anew."""
    conversation = Conversation(TorchEngine.load(folder, "cpu"), "be brief")
    for question in ("the fox?", "and the dog?", "why"):
        before = list(conversation.messages)
        answer = ask(conversation, question)
        fresh = Conversation(TorchEngine.load(folder, "cpu"), "be brief")
        fresh.messages = before
        assert ask(fresh, question) == answer
        assert conversation.messages == [
            *before,
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    assert conversation.engine.reused > 20, "the earlier turns are not computed again"
    assert conversation.clock.prompt_tokens < fresh.clock.prompt_tokens


def test_a_full_context_drops_the_oldest_exchange(folder: Path) -> None:
    conversation = Conversation(TorchEngine.load(folder, "cpu", context_length=100), "be brief")
    dropped = 0
    for turn in range(8):
        ask(conversation, f"question {turn}")
        dropped += conversation.dropped
        assert conversation.messages[-2]["content"] == f"question {turn}"
        assert conversation.messages[0]["role"] == "user"
        assert conversation.engine.position <= 100
    assert dropped > 0 and dropped % 2 == 0
    assert len(conversation.messages) == 16 - dropped


def test_a_question_longer_than_the_context_is_refused_and_forgotten(folder: Path) -> None:
    conversation = Conversation(TorchEngine.load(folder, "cpu", context_length=60))
    ask(conversation, "hi")
    before = list(conversation.messages)
    with pytest.raises(UsageError, match=r"takes \d+ tokens, the context of .* holds 60"):
        conversation.ask("much too long " * 40)
    assert conversation.messages == before
    ask(conversation, "hi again")
    assert len(conversation.messages) == len(before) + 2


def test_an_interrupted_answer_is_kept_as_far_as_it_came(folder: Path) -> None:
    conversation = Conversation(TorchEngine.load(folder, "cpu"))
    pieces = conversation.ask("the fox", SAMPLING, 8)
    text = next(pieces).text
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}


def test_no_template_is_a_clear_error(tmp_path: Path) -> None:
    save_random_model(tmp_path)
    save_tokenizer(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"has no chat template.*`xinslm generate`") as caught:
        run(ChatConfig(model=tmp_path, device="cpu"))
    assert "--" not in str(caught.value), "chat has no flag that helps"


def reader(lines: list[str | type[BaseException]]) -> Callable[[str], str]:
    """A terminal that types these lines, then ends."""
    left = iter(lines)

    def read(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_the_loop(folder: Path) -> None:
    shown: list[str] = []
    lines = ["the fox", "", "/reset", "/wat", "the fox", "/quit", "never read"]
    result = run(
        ChatConfig(model=folder, device="cpu", seed=1, max_new_tokens=6),
        reader(lines),
        shown.append,
    )
    text = "".join(shown)
    assert result.turns == 2 and result.new_tokens > 0
    assert "tok/s, prompt" in text and "/wat is no command" in text and "starts anew" in text
    one, two = text.split("The conversation starts anew.\n")
    answer = one.split("/quit ends.\n")[1].split("\n[")[0]
    assert answer and answer in two, "after /reset the same question and seed give the same answer"


def test_the_loop_ends_with_the_input_and_with_ctrl_c(folder: Path) -> None:
    for end in (EOFError, KeyboardInterrupt):
        assert run(ChatConfig(model=folder, device="cpu"), reader([end])).turns == 0


def test_ctrl_c_stops_the_answer_but_not_the_loop(folder: Path) -> None:
    pieces = 0

    def write(text: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            raise KeyboardInterrupt

    result = run(
        ChatConfig(model=folder, device="cpu", seed=1), reader(["the fox", "the dog"]), write
    )
    assert result.turns == 2


def test_a_too_long_message_is_told_and_the_loop_goes_on(folder: Path) -> None:
    shown: list[str] = []
    lines = ["very long " * 200, "hi"]
    result = run(
        ChatConfig(model=folder, device="cpu", max_new_tokens=4), reader(lines), shown.append
    )
    assert result.turns == 1 and "shorten it" in "".join(shown)
