"""A small OpenAI-compatible server in this process, that speaks as vLLM does and misbehaves on
demand.

Its answers are written after vLLM's protocol (`CompletionResponse` and `ChatCompletionResponse` of
its OpenAI entry points: `prompt_logprobs` with `logprob`, `rank`, `decoded_token`, the token that
came added behind the n most likely, -9999.0 for minus infinity); they are not recorded from a
running vLLM. The numbers come from transformers."""

import json
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Mischief = Callable[[int, str, dict], Any]
"""Gets the number of the request (from 0), its path and body. None: answer well. Bytes: send these.
(status, headers, body): send these. A function: change the answer with it. 'hang', 'cut', 'close':
say nothing, stop in the middle, hang up."""


@lru_cache(maxsize=4)
def _load(folder: str) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


class FakeVllm:
    """`with FakeVllm(folder) as server: server.url`; `server.bodies` are the requests that came."""

    def __init__(
        self, folder: Any, mischief: Mischief = lambda *_: None, model: str = "tiny", **facts: Any
    ) -> None:
        self.model, self.tokenizer = _load(str(folder))
        self.mischief, self.name = mischief, model
        self.facts = {"max_model_len": self.model.config.max_position_embeddings, **facts}
        self.bodies: list[tuple[str, dict]] = []
        self.keys: list[str | None] = []
        self.lock, self.released = threading.Lock(), threading.Event()
        self.at_once = self.most_at_once = 0

    def __enter__(self) -> "FakeVllm":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, fake.models())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    number = len(fake.bodies)
                    fake.bodies.append((self.path, body))
                    fake.keys.append(self.headers.get("Authorization"))
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                self.counted = True
                try:
                    self.serve(fake.mischief(number, self.path, body), body)
                finally:
                    self.leave()

            def leave(self) -> None:
                """Before the answer: with it, the client may send its next request at once."""
                with fake.lock:
                    fake.at_once -= getattr(self, "counted", False)
                    self.counted = False

            def serve(self, mischief: Any, body: dict) -> None:
                if mischief == "hang":
                    fake.released.wait(20)
                elif mischief == "close":
                    self.connection.close()
                elif isinstance(mischief, tuple):
                    status, headers, content = mischief
                    self.reply(status, content, headers)
                elif isinstance(mischief, bytes):
                    self.send(200, mischief)
                else:
                    answer = (
                        fake.chat(body)
                        if self.path.endswith("chat/completions")
                        else fake.complete(body)
                    )
                    if callable(mischief):
                        answer = mischief(answer) or answer
                    content = json.dumps(answer).encode()
                    if mischief == "cut":
                        self.send(200, content[: len(content) // 2], length=len(content))
                    else:
                        self.send(200, content)

            def reply(self, status: int, content: Any, headers: dict | None = None) -> None:
                self.send(status, json.dumps(content).encode(), headers)

            def send(
                self,
                status: int,
                content: bytes,
                headers: dict | None = None,
                length: int | None = None,
            ) -> None:
                self.leave()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def models(self) -> dict:
        row = {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.name,
        }
        return {"object": "list", "data": [row | self.facts]}

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """(T, V): row t is the distribution of token t + 1."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def entry(self, row: torch.Tensor, token: int, count: int) -> dict[int, dict]:
        """One place as vLLM gives it: the token that came first, then the n most likely."""
        tokens = dict.fromkeys([token, *row.topk(count).indices.tolist()])
        return {
            t: {
                "logprob": max(row[t].item(), -9999.0),
                "rank": int((row >= row[t]).sum()),
                "decoded_token": self.tokenizer.decode([t]),
            }
            for t in tokens
        }

    def complete(self, body: dict) -> dict:
        ids = (
            body["prompt"]
            if isinstance(body["prompt"], list)
            else self.tokenizer(body["prompt"]).input_ids
        )
        text, written, rows, reason = self.write(ids, body)
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
        }
        if body.get("prompt_logprobs") is not None:
            rows_of_prompt, count = self.log_probs(ids), body["prompt_logprobs"]
            choice["prompt_logprobs"] = [
                None,
                *(self.entry(rows_of_prompt[t], ids[t + 1], count) for t in range(len(ids) - 1)),
            ]
        if body.get("logprobs") is not None:
            decode, count = self.tokenizer.decode, body["logprobs"]
            choice["logprobs"] = {
                "tokens": [decode([t]) for t in written],
                "token_logprobs": [row[t].item() for t, row in zip(written, rows, strict=True)],
                "top_logprobs": [
                    {decode([t]): row[t].item() for t in row.topk(count).indices.tolist()}
                    for row in rows
                ],
                "text_offset": [0] * len(written),
            }
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def chat(self, body: dict) -> dict:
        ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)[
            "input_ids"
        ]
        text, written, rows, reason = self.write(ids, body)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": reason,
        }
        if body.get("logprobs"):
            choice["logprobs"] = {
                "content": [
                    self.row(t, row[t].item())
                    | {
                        "top_logprobs": [
                            self.row(r, row[r].item())
                            for r in row.topk(body["top_logprobs"]).indices
                        ]
                    }
                    for t, row in zip(written, rows, strict=True)
                ]
            }
        return {"object": "chat.completion", "model": self.name, "choices": [choice]}

    def row(self, token: Any, value: float) -> dict:
        text = self.tokenizer.decode([int(token)])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    def write(self, ids: list[int], body: dict) -> tuple[str, list[int], list[torch.Tensor], str]:
        """Greedy text; it ends at EOS, which is not among the tokens that are told."""
        ids, written, rows = list(ids), [], []
        while len(written) < body["max_tokens"]:
            row = self.log_probs(ids)[-1]
            token = int(row.argmax())
            if token == self.tokenizer.eos_token_id:
                return self.tokenizer.decode(written), written, rows, "stop"
            ids.append(token)
            written.append(token)
            rows.append(row)
        return self.tokenizer.decode(written), written, rows, "length"
