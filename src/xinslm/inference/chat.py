"""A conversation with a model, and the terminal loop of `xinslm chat`.

Each turn encodes the full conversation; the engine computes only the part that changed. If the
context is full, the oldest exchange is dropped with a message.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from xinslm.errors import UsageError
from xinslm.inference.config import ChatConfig
from xinslm.inference.engine import Engine
from xinslm.inference.generate import Clock, Piece, generate, require_chat_template
from xinslm.sampling import Sampling
from xinslm.tokenizer.chat import end_ids

Message = dict[str, str]


class Conversation:
    """Messages of a chat and the engine that answers them."""

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        require_chat_template(engine.tokenizer, "Use `xinslm generate`")
        self.engine = engine
        self.messages: list[Message] = []
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._ends = end_ids(engine.tokenizer)
        self.dropped = 0
        """Number of messages that were dropped to fit the last question."""
        self.clock = Clock()
        """Counts and speed of the last answer."""

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []
        self.engine.reset()

    def ask(
        self, question: str, sampling: Sampling | None = None, max_tokens: int = 512
    ) -> Generator[Piece, None, None]:
        """Ask a question and stream the answer; the text so far is kept in `messages` if the caller
        stops early.

        UsageError, without a change, if the question alone is longer than the context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        room = min(max_tokens, self.engine.context_length // 4)
        ids = self._encode(messages)
        dropped = 0
        while len(ids) + room > self.engine.context_length and len(messages) > 2:
            messages, dropped = messages[2:], dropped + 2
            ids = self._encode(messages)
        if len(ids) >= self.engine.context_length:
            raise UsageError(
                f"the message takes {len(ids):,} tokens, the context of {self.engine.name} holds "
                f"{self.engine.context_length:,} with the answer; shorten it"
            )
        self.dropped = dropped
        pieces = generate(self.engine, ids, sampling, max_tokens, self._ends)
        return self._answer(messages, len(ids), pieces)

    def _answer(
        self, messages: list[Message], prompt_tokens: int, pieces: Iterator[Piece]
    ) -> Generator[Piece, None, None]:
        self.clock = Clock()
        texts = None
        try:
            for piece in self.clock.watch(pieces):
                self.clock.prompt_tokens = prompt_tokens - self.engine.reused
                texts = [*(texts or []), piece.text]
                yield piece
        finally:
            if texts is not None:
                self.messages = [*messages, {"role": "assistant", "content": "".join(texts)}]

    def _encode(self, messages: list[Message]) -> list[int]:
        return self.engine.tokenizer.apply_chat_template(
            [*self._system, *messages], add_generation_prompt=True
        )[0]


@dataclass(frozen=True)
class Result:
    """Totals of a session."""

    turns: int
    new_tokens: int

    def describe(self) -> str:
        """One line for the terminal."""
        return f"{self.turns:,} answers, {self.new_tokens:,} tokens"


def run(
    config: ChatConfig,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: None,
) -> Result:
    """Chat until /quit or the end of the input; /reset clears the conversation, Ctrl-C stops an
    answer.

    `read` receives the prompt to show and returns a line; `write` receives text as it is generated.
    """
    from xinslm.inference.load import load_engine, missing_library

    config.check()
    engine = load_engine(config)
    conversation = Conversation(engine, config.system)
    write(
        f"{engine.name}, context {engine.context_length:,} tokens. /reset starts anew, /quit "
        "ends.\n"
    )
    if note := missing_library(config):
        write(f"note: {note}\n")
    turns = new_tokens = 0
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            break
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            write("The conversation starts anew.\n")
        elif line.startswith("/"):
            write(f"{line.split()[0]} is no command; there are /reset and /quit\n")
        elif line and _turn(conversation, line, config, write):
            turns, new_tokens = turns + 1, new_tokens + conversation.clock.new_tokens
    return Result(turns, new_tokens)


def _turn(
    conversation: Conversation, line: str, config: ChatConfig, write: Callable[[str], None]
) -> bool:
    """Answer one line and print its speed; False if there was no answer."""
    try:
        pieces = conversation.ask(line, config, config.max_new_tokens)
    except UsageError as error:
        write(f"{error}\n")
        return False
    if conversation.dropped:
        write(f"[the context is full: the {conversation.dropped} oldest messages were dropped]\n")
    stop = None
    try:
        for piece in pieces:
            write(piece.text)
            stop = piece.stop
    except KeyboardInterrupt:
        pieces.close()
    notes = {"length": ", cut off at --max-new-tokens", "context": ", the context is full"}
    write(f"\n[{conversation.clock.describe()}{notes.get(stop or '', '')}]\n")
    return conversation.clock.new_tokens > 0
