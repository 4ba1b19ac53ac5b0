"""A tokenizer of bytes, after the protocol: ids 0-255 are bytes, then BOS, EOS and padding."""

import hashlib
import json
from pathlib import Path

import numpy as np


class ByteTokenizer:
    def __init__(self, bos=True, eos=True, vocab_size=259, chat=True):
        self.vocab_size = vocab_size
        self.bos_id = 256 if bos else None
        self.eos_id = 257 if eos else None
        self.start_ids = [id for id in (self.bos_id, self.eos_id) if id is not None][:1]
        self.pad_id = 258
        self.special_tokens = {"<bos>": 256, "<eos>": 257, "<pad>": 258}
        self.chat_template = "{{ messages }}" if chat else None

    def encode(self, text, allowed_special=False):
        return list(text.encode())

    def encode_batch(self, texts):
        ids = [self.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        flat = [token for one in ids for token in one]
        return np.array(flat, np.uint16 if self.vocab_size <= 65536 else np.uint32), offsets

    def decode(self, ids, skip_special=False):
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token):
        names = {v: k for k, v in self.special_tokens.items()}
        return names[token].encode() if token in names else bytes([token])

    def apply_chat_template(self, messages, add_generation_prompt=False):
        ids, mask = [], []
        for message in messages:
            head = self.encode(f"[{message['role']}]")
            body = [*self.encode(message["content"]), 257]
            ids += head + body
            mask += [0] * len(head) + [int(message["role"] == "assistant")] * len(body)
        return ids, mask

    def fingerprint(self):
        return hashlib.sha256(
            repr((self.vocab_size, self.bos_id, self.eos_id)).encode()
        ).hexdigest()

    def save(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(json.dumps({"bytes": True}))
