"""A tokenizer with the methods of transformers' class, without its import.

`PreTrainedTokenizerFast` hands texts to the library `tokenizers`, which needs 0.05 s to import;
transformers needs 0.4 s, for which it reads its 1,600 source files. Here the same library encodes,
from the same files, with the named tokens that transformers adds. Only a chat is written by
transformers' class.

    encoder = Encoder(load_tokenizer("student"))
    ids = encoder(["Once upon a time"], add_special_tokens=False)["input_ids"]
"""

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from xinslm.tokenizer.base import Tokenizer
from xinslm.tokenizer.files import TOKENIZER

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""In the order in which transformers adds tokens that the vocabulary does not have."""


class Encoder:
    """Turns texts into the ids that `AutoTokenizer` gives for what `tokenizer.save` writes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            self._backend = Backend.from_file(f"{folder}/{TOKENIZER}")
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        named = dict.fromkeys(filter(None, map(tokenizer.named_tokens.get, ROLES)))
        missing = [AddedToken(token, special=True) for token in named if token not in known]
        self._backend.add_tokens(missing)

    @property
    def bos_token_id(self) -> int | None:
        """Id of BOS; None if the tokenizer has none."""
        return self._named("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of EOS; None if the tokenizer has none."""
        return self._named("eos_token")

    def _named(self, role: str) -> int | None:
        content = self._tokenizer.named_tokens.get(role)
        found: int | None = None if content is None else self._backend.token_to_id(content)
        return found

    def __call__(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """Encode texts: their ids as `input_ids`."""
        found = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text."""
        return self([text], add_special_tokens)["input_ids"][0]

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        """A chat as transformers writes it."""
        return self._transformers.apply_chat_template(messages, **options)

    @cached_property
    def _transformers(self) -> Any:
        """The class that `AutoTokenizer` takes; that one also imports the configurations of all
        models, which takes half a second.
        """
        from transformers import PreTrainedTokenizerFast

        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save(Path(folder))
            return PreTrainedTokenizerFast.from_pretrained(folder)
