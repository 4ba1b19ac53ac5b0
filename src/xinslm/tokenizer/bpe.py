"""`BPETokenizer`: byte-level BPE: train, save, load, encode, decode.

    tokenizer = BPETokenizer(vocab_size=30000)
    tokenizer.train(texts)
    tokenizer.save("my-tokenizer")
    ids = BPETokenizer.load("my-tokenizer").encode("Once upon a time")

Merges and ids are identical to those of Hugging Face `tokenizers`. The saved folder loads in
`transformers.AutoTokenizer`. The native library does the work if there is one; the same in Python
(`learn.py`, `merges.py`) defines the results and does what is rare: texts that NFC changes.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unicodedata import is_normalized, normalize

import numpy as np

from xinslm.errors import UsageError, XinslmError
from xinslm.machine import usable_cores
from xinslm.native.bpe import NativeEncoder, NativeLearner, Search, Vocabulary
from xinslm.progress import Listener, Progress, ignore
from xinslm.tokenizer import base, files
from xinslm.tokenizer.alphabet import ALPHABET, SPLITS, unspell

if TYPE_CHECKING:
    import regex

    from xinslm.tokenizer.learn import MergeLearner
    from xinslm.tokenizer.learn_native import LibraryLearner
    from xinslm.tokenizer.merges import Merger, PieceTable

_LAZY = ("_native", "_merger", "_table", "_plain_finder", "_all_finder", "bytes_of_tokens")
DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


class BPETokenizer(base.Tokenizer):
    """A byte-level BPE tokenizer; special tokens have the last ids and count in `vocab_size`.

    Before training it has single bytes only. Adding special tokens does not change the ids of
    ordinary text.
    """

    strips_first_space = False
    num_threads: int | None = None
    """Threads of `train` and `encode_batch` in the native library; None: one for each core."""
    _define: Callable[[], files.Definition]

    def __init__(
        self,
        vocab_size: int = 30_000,
        special_tokens: Sequence[str] = DEFAULT_SPECIAL_TOKENS,
        min_frequency: int = 0,
        max_token_length: int | None = None,
        split: str = "llama-bpe",
    ):
        """Set the target `vocab_size`, which `train` fills.

        Pairs rarer than `min_frequency` are not merged (0 means no limit, as in Hugging Face's
        trainer). `max_token_length` is in bytes; `split` is 'llama-bpe', 'gpt-2' or 'qwen2'. The
        first special token is BOS and EOS and begins each text; the last is the pad token.
        """
        if split not in SPLITS:
            raise UsageError(f"unknown split rule '{split}'; choose one of {', '.join(SPLITS)}")
        if len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
            raise UsageError("special tokens must differ from each other and not be empty")
        smallest = len(ALPHABET) + len(special_tokens)
        if vocab_size < smallest:
            raise UsageError(
                f"vocab_size is {vocab_size}, but 256 bytes and {len(special_tokens)} special "
                f"tokens need {smallest}"
            )
        if max_token_length is not None and max_token_length < 2:
            raise UsageError("max_token_length must be at least 2 bytes")
        self._target = vocab_size
        self._min_frequency, self._longest = min_frequency, max_token_length
        self._take(files.new_definition(list(ALPHABET), [], list(special_tokens), split))

    def _take(self, definition: files.Definition) -> None:
        """Set the state from a definition."""
        for name in _LAZY:
            vars(self).pop(name, None)
        self.definition = definition
        self._describe(definition.outline())

    def _describe(self, outline: files.Outline) -> None:
        self.split_name, self._split = outline.split, SPLITS[outline.split]
        self.special_tokens = outline.special_tokens
        self.added_tokens = outline.added_tokens
        self.chat_template = outline.chat_template
        self.named_tokens = outline.named_tokens
        self.bos_id, self.eos_id, self.pad_id = outline.roles
        self.start_ids = outline.start_ids
        self.vocab_size = outline.vocab_size
        self._normalizer = outline.normalizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the native library, so that copies make their own."""
        left_out = {*_LAZY, "_define"} if self.definition else _LAZY
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @cached_property
    def definition(self) -> files.Definition:
        """The content of its files; of a GGUF file read when it is first asked for."""
        return self._define()

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens in the byte alphabet, the first to be joined first."""
        return self.definition.merges

    @cached_property
    def _native(self) -> NativeEncoder | None:
        definition = self.definition
        return NativeEncoder.make(
            Vocabulary(
                tokens=definition.vocab,
                merges=definition.merges,
                ignore_merges=definition.ignore_merges,
                split=definition.split,
                added=self.added_tokens,
                special=self.special_tokens,
                vocab_size=self.vocab_size,
            )
        )

    @cached_property
    def _plain_finder(self) -> "regex.Pattern[str] | None":
        return _finder(self.added_tokens)

    @cached_property
    def _all_finder(self) -> "regex.Pattern[str] | None":
        return _finder(self.added_tokens | self.special_tokens)

    @cached_property
    def _merger(self) -> "Merger":
        from xinslm.tokenizer.merges import Merger

        definition = self.definition
        return Merger(definition.vocab, definition.merges, definition.ignore_merges)

    @cached_property
    def _table(self) -> "PieceTable":
        from xinslm.tokenizer.merges import PieceTable

        return PieceTable(self._merger, self.vocab_size)

    @classmethod
    def of(cls, definition: files.Definition) -> Self:
        """Build a tokenizer from a definition."""
        made = cls.__new__(cls)
        made._target, made._min_frequency, made._longest = definition.vocab_size, 0, None
        made._take(definition)
        return made

    @classmethod
    def of_encoder(
        cls, encoder: NativeEncoder, outline: files.Outline, define: Callable[[], files.Definition]
    ) -> Self:
        """Build a tokenizer on an encoder that is there; `define` gives its definition."""
        made = cls.__new__(cls)
        made._target, made._min_frequency, made._longest = outline.vocab_size, 0, None
        made._describe(outline)
        made._define = define
        vars(made)["_native"] = encoder
        return made

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a folder or a tokenizer.json; UnsupportedTokenizerError for other tokenizers."""
        return cls.of(files.read(Path(path)))

    @classmethod
    def prefix_of(
        cls, teacher: Any, vocab_size: int, special_tokens: Sequence[str] | None = None
    ) -> Self:
        """Build the nested tokenizer of `vocab_size` ids from the teacher's first merges."""
        from xinslm.tokenizer.nested import prefix_definition

        return cls.of(prefix_definition(teacher, vocab_size, special_tokens))

    def save(self, path: Path | str) -> None:
        """Write the tokenizer's files into folder `path`."""
        files.write(self.definition, Path(path))

    def train(self, texts: Iterable[str], on_progress: Listener = ignore) -> None:
        """Learn up to `vocab_size` tokens from texts, which are read once and not kept."""
        if isinstance(texts, str):
            raise UsageError("train takes an iterable of texts, not one string; pass [text]")
        read = 0

        def on_text(characters: int) -> None:
            nonlocal read
            if read // 1_000_000 != (read + characters) // 1_000_000:
                on_progress(Progress("count pieces", read + characters, None, "characters"))
            read += characters

        learner = self._count(texts, on_text)
        special = list(self.special_tokens)
        wanted = self._target - len(special)
        step = max(1, wanted // 100)
        for size in learner.run(wanted):
            if size % step == 0 or size == wanted:
                done, total = size - len(ALPHABET), wanted - len(ALPHABET)
                on_progress(Progress("learn merges", done, total, "merges"))
        definition = files.new_definition(learner.tokens, learner.merges, special, self.split_name)
        self._take(definition)

    def _count(
        self, texts: Iterable[str], on_text: Callable[[int], None]
    ) -> "MergeLearner | LibraryLearner":
        """Count the pieces of texts; XinslmError if there are none."""
        from xinslm.tokenizer.learn import MergeLearner, count_pieces
        from xinslm.tokenizer.learn_native import LibraryLearner

        native = NativeLearner.make(self.split_name, self.num_threads or usable_cores())
        if native is not None:
            learner = LibraryLearner(native).count(texts, self._split, on_text)
            if learner.start(self._min_frequency, self._longest):
                return learner
        elif pieces := count_pieces(texts, self._split, on_text):
            return MergeLearner(pieces, self._min_frequency, self._longest)
        raise XinslmError("there is no text to train a tokenizer on: all documents are empty")

    def encode(self, text: str, allowed_special: bool = False) -> list[int]:
        """Turn text into ids; with `allowed_special` control tokens in it become their ids."""
        if self._native is not None:
            found, _ = self._encode_native(self._native, [text], allowed_special)
            return list(found.tolist())
        packed = self._pack(text, allowed_special)
        return list(np.frombuffer(packed, self._table.dtype).tolist())

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts into flat ids and offsets: text i is `ids[offsets[i]:offsets[i + 1]]`."""
        if self._native is not None:
            return self._encode_native(self._native, texts, False)
        packed = [self._pack(text, False) for text in texts]
        offsets = np.zeros(len(packed) + 1, np.int64)
        np.cumsum([len(data) for data in packed], out=offsets[1:])
        dtype = self._table.dtype
        return np.frombuffer(b"".join(packed), dtype), offsets // dtype.itemsize

    def _encode_native(
        self, native: NativeEncoder, texts: Sequence[str], allowed_special: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode in the native library, except texts that the normalizer changes."""
        search = Search.ALL if allowed_special else Search.ADDED
        threads = self.num_threads or usable_cores()
        form = self._normalizer
        changed = [form is not None and not is_normalized(form, text) for text in texts]
        if any(changed):
            kept = ["" if odd else text for odd, text in zip(changed, texts, strict=True)]
            ids, offsets = self._encode_native(native, kept, allowed_special)
            parts = [
                np.frombuffer(self._pack(text, allowed_special), ids.dtype) if odd else ids[a:b]
                for odd, text, (a, b) in zip(changed, texts, pairwise(offsets), strict=True)
            ]
            lengths = [0, *map(len, parts)]
            return np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)
        try:
            return native.encode(texts, search, threads)
        except UnicodeEncodeError:
            return native.encode([*map(base.clean_surrogates, texts)], search, threads)

    def _pack(self, text: str, allowed_special: bool) -> bytes:
        """Encode into the bytes of an id array."""
        finder = self._all_finder if allowed_special else self._plain_finder
        try:
            if finder is None:
                return self._pack_ordinary(text)
            packed, done = [], 0
            for match in finder.finditer(text):
                packed.append(self._pack_ordinary(text[done : match.start()]))
                packed.append(np.array(self._token_id(match[0]), self._table.dtype).tobytes())
                done = match.end()
            packed.append(self._pack_ordinary(text[done:]))
            return b"".join(packed)
        except UnicodeEncodeError:
            return self._pack(base.clean_surrogates(text), allowed_special)

    def _pack_ordinary(self, text: str) -> bytes:
        if self._normalizer:
            text = normalize(self._normalizer, text)
        from xinslm.tokenizer.learn import pieces_of

        return b"".join(map(self._table.__getitem__, pieces_of(text, self._split)))

    def _token_id(self, content: str) -> int:
        token = self.special_tokens.get(content)
        return self.added_tokens[content] if token is None else token

    @cached_property
    def bytes_of_tokens(self) -> list[bytes]:
        """The bytes of each id."""
        if self._native is not None:
            return self._native.bytes_of_tokens()
        table = [b""] * self.vocab_size
        for token, index in self.definition.vocab.items():
            spelled = unspell(token)
            table[index] = token.encode() if spelled is None else spelled
        for content, index in (self.added_tokens | self.special_tokens).items():
            table[index] = content.encode()
        return table

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes; XinslmError if it is not in the vocabulary."""
        if self._native is None or not 0 <= token < self.vocab_size:
            return super().token_bytes(token)
        return self._native.bytes_of_token(token)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD."""
        numbers = np.asarray(ids)
        if self._native is None or numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            return super().decode(ids, skip_special)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.vocab_size:
            return super().decode(ids, skip_special)  # which names the id
        return self._native.decode(numbers, skip_special).decode("utf-8", "replace")

    def merge_steps(self, piece: bytes) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a piece's byte ids and its merges in order: the rank and the index of each."""
        symbols = [token for byte in piece if (token := self._merger.bytes_to_id[byte]) is not None]
        return list(symbols), list(self._merger.steps(symbols))

    def encode_piece(self, piece: bytes) -> list[int]:
        """Encode bytes as one piece: merges only, no split."""
        if self._native is not None:
            return self._native.encode_piece(piece)
        return self._merger.encode(piece)

    def pieces(self, text: str) -> list[str]:
        """Cut text into the pieces that merges never cross."""
        from xinslm.tokenizer.learn import pieces_of

        return list(pieces_of(text, self._split))

    def encode_segments(
        self, segments: list[tuple[str, bool]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode the segments of a chat; return ids and ranges of characters."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for text, is_control in segments:
            new = [self.special_tokens[text]] if is_control else self.encode(text)
            ids += new
            spans += [(start, start + len(text))] if is_control else self._spans(text, new, start)
            start += len(text)
        return ids, spans

    def _spans(self, text: str, ids: list[int], start: int) -> list[tuple[int, int]]:
        """Return the range of characters that each token of a text covers, fully or partly."""
        sizes = np.array([0, *(len(self.bytes_of_tokens[token]) for token in ids)], np.int64)
        edges = np.cumsum(sizes)
        lengths = [len(char.encode("utf-8", "replace")) for char in text]
        owner = np.repeat(np.arange(len(text)), lengths)
        first = np.minimum(edges[:-1], len(owner) - 1)
        last = np.minimum(edges[1:] - 1, len(owner) - 1)
        pairs = zip(owner[first].tolist(), owner[last].tolist(), strict=True)
        return [(start + a, start + b + 1) for a, b in pairs]

    def fingerprint(self) -> str:
        """Return a hash that two tokenizers share if and only if the same ids mean the same."""
        normalizer = self._normalizer or ""
        return base.fingerprint(self, f"{self.split_name} {normalizer}".strip())


def _finder(tokens: dict[str, int]) -> "regex.Pattern[str] | None":
    """Return the pattern that finds tokens in text, the longest first."""
    import regex

    longest_first = sorted(tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first))) if tokens else None
