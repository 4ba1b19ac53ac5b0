"""One engine with one GGUF file, driven over standard input: a line of JSON in, a line out.

    python benchmarks/peers/engine_worker.py ENGINE FILE THREADS

ENGINE: xinslm, xinslm-int8-cache, pytorch, llama.cpp, openvino, mistralrs. Runs in the engine's own environment and imports
nothing of xinslm for the others. Commands:
    {"do": "prefill", "ids": [...]}                     seconds to the logits after ids
    {"do": "decode", "ids": [...], "count": n}          seconds for n greedy tokens after the first
    {"do": "verify", "ids": [...], "count": n}          seconds for n tokens at once, all logits
    {"do": "batch", "ids": [...], "rows": r, "count": n} seconds for n tokens in each of r sequences
    {"do": "logits", "ids": [...]}                      log-probabilities after ids
    {"do": "greedy", "ids": [...], "count": n}          the greedy tokens
    {"do": "rows", "ids": [...], "file": "x.npy"}       saves float32 logits after each of the ids
    {"do": "memory"}                                    peak resident bytes
A command that the engine cannot do gives null.
"""

import importlib
import json
import resource
import sys
import time


class Xinslm:
    """Our native engine."""

    cache = "float16"

    def __init__(self, path, threads):
        from xinslm.inference.native_engine import NativeEngine

        self.engine = NativeEngine.load(path, threads=threads, cache=self.cache)

    def prefill(self, ids):
        self.engine.reset()
        start = time.perf_counter()
        self.engine.start(ids)
        return time.perf_counter() - start

    def decode(self, ids, count):
        token = int(self.engine.start(ids).argmax())
        start = time.perf_counter()
        for _ in range(count):
            token = int(self.engine.step(token).argmax())
        return time.perf_counter() - start

    def verify(self, ids, count):
        self.engine.start(ids[:-count])
        start = time.perf_counter()
        self.engine.verify(ids[-count:])
        return time.perf_counter() - start

    def batch(self, ids, rows, count):
        context = self.engine.context
        numbers = [context.add() for _ in range(rows)]
        for number in numbers:
            context.extend(ids, [number] * len(ids), [])
        start = time.perf_counter()
        tokens = [5 + row for row in range(rows)]
        for _ in range(count):
            logits = context.extend(tokens, numbers, range(rows))
            tokens = logits.argmax(1).tolist()
        took = time.perf_counter() - start
        for number in numbers:
            context.remove(number)
        return took

    def logits(self, ids):
        self.engine.reset()
        return _normalized(self.engine.start(ids))

    def rows(self, ids, file):
        import numpy as np

        self.engine.reset()
        first = self.engine.start(ids[:1])
        np.save(file, np.concatenate([first[None], self.engine.verify(ids[1:])]))

    def greedy(self, ids, count):
        self.engine.reset()
        found = [int(self.engine.start(ids).argmax())]
        while len(found) < count:
            found.append(int(self.engine.step(found[-1]).argmax()))
        return found


class XinslmInt8Cache(Xinslm):
    """The same with keys and values in 8 bits."""

    cache = "int8"


class PyTorch(Xinslm):
    """Our other engine; what it lacks gives null."""

    verify = batch = rows = None

    def __init__(self, path, threads):
        import torch

        from xinslm.inference.torch_engine import TorchEngine

        torch.set_num_threads(threads)
        self.engine = TorchEngine.load(path, "cpu")


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C interface."""

    def __init__(self, path, threads):
        import llama_cpp

        self.c = c = llama_cpp
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(
            path.encode(), c.llama_model_default_params()
        ) if hasattr(c, "llama_model_load_from_file") else c.llama_load_model_from_file(
            path.encode(), c.llama_model_default_params()
        )  # fmt: skip
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 2048, 2048, 512
        options.n_threads = options.n_threads_batch = threads
        if hasattr(options, "n_seq_max"):
            options.n_seq_max = 8
        if hasattr(options, "kv_unified"):
            options.kv_unified = True
        make = getattr(c, "llama_init_from_model", None) or c.llama_new_context_with_model
        self.context = make(self.model, options)
        vocab = c.llama_model_get_vocab(self.model) if hasattr(c, "llama_model_get_vocab") else None
        self.size = c.llama_vocab_n_tokens(vocab) if vocab else c.llama_n_vocab(self.model)

    def clear(self):
        if hasattr(self.c, "llama_memory_clear"):
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        else:
            self.c.llama_kv_cache_clear(self.context)

    def run(self, tokens, places, rows, wanted):
        batch = self.c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, places[i]
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, rows[i], int(wanted[i])
        if self.c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.c.llama_batch_free(batch)

    def row(self, index):
        import numpy as np

        return np.ctypeslib.as_array(
            self.c.llama_get_logits_ith(self.context, index), shape=(self.size,)
        )

    def feed(self, ids, at=0, all_logits=False):
        n = len(ids)
        wanted = [all_logits or i == n - 1 for i in range(n)]
        self.run(ids, range(at, at + n), [0] * n, wanted)

    def prefill(self, ids):
        self.clear()
        start = time.perf_counter()
        self.feed(ids)
        self.row(-1)
        return time.perf_counter() - start

    def decode(self, ids, count):
        self.clear()
        self.feed(ids)
        token = int(self.row(-1).argmax())
        start = time.perf_counter()
        for i in range(count):
            self.feed([token], len(ids) + i)
            token = int(self.row(-1).argmax())
        return time.perf_counter() - start

    def verify(self, ids, count):
        self.clear()
        self.feed(ids[:-count])
        start = time.perf_counter()
        self.feed(ids[-count:], len(ids) - count, True)
        for i in range(count):
            self.row(i)
        return time.perf_counter() - start

    def batch(self, ids, rows, count):
        self.clear()
        for row in range(rows):
            n = len(ids)
            self.run(ids, range(n), [row] * n, [False] * n)
        tokens = [5 + row for row in range(rows)]
        start = time.perf_counter()
        for i in range(count):
            self.run(tokens, [len(ids) + i] * rows, range(rows), [True] * rows)
            tokens = [int(self.row(row).argmax()) for row in range(rows)]
        return time.perf_counter() - start

    def logits(self, ids):
        self.clear()
        self.feed(ids)
        return _normalized(self.row(-1))

    def rows(self, ids, file):
        import numpy as np

        self.clear()
        self.feed(ids, 0, True)
        np.save(file, np.stack([self.row(i).copy() for i in range(len(ids))]))

    def greedy(self, ids, count):
        self.clear()
        self.feed(ids)
        found = [int(self.row(-1).argmax())]
        while len(found) < count:
            self.feed(found[-1:], len(ids) + len(found) - 1)
            found.append(int(self.row(-1).argmax()))
        return found


class OpenVino:
    """OpenVINO GenAI, which compiles a GGUF file for the CPU."""

    def __init__(self, path, threads):
        import openvino_genai

        self.g = openvino_genai
        self.pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, ids, count):
        import numpy as np
        import openvino

        tensor = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        config = self.g.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = count, False, True
        return self.pipe.generate(self.g.TokenizedInputs(tensor, mask), config)

    def prefill(self, ids):
        start = time.perf_counter()
        self.generate(ids, 1)
        return time.perf_counter() - start

    def decode(self, ids, count):
        metrics = self.generate(ids, count + 1).perf_metrics
        return metrics.get_tpot().mean / 1000 * count

    def greedy(self, ids, count):
        return [int(token) for token in self.generate(ids, count).tokens[0]]


class MistralRs:
    """mistral.rs through its Python package, which takes text only."""

    def __init__(self, path, threads):
        import os

        os.environ["RAYON_NUM_THREADS"] = str(threads)
        import mistralrs

        folder, _, name = path.rpartition("/")
        self.m = mistralrs
        which = mistralrs.Which.GGUF(quantized_model_id=folder, quantized_filename=name)
        self.runner = mistralrs.Runner(which=which)

    def timed(self, count, words):
        request = self.m.CompletionRequest(
            model="x", prompt="the " * words, max_tokens=count, temperature=0.0
        )
        start = time.perf_counter()
        usage = self.runner.send_completion_request(request).usage
        return time.perf_counter() - start, usage

    def prefill(self, ids):
        return self.timed(1, len(ids))[0]

    def decode(self, ids, count):
        usage = self.timed(count + 1, len(ids))[1]
        return count / usage.avg_compl_tok_per_sec


def _normalized(logits):
    import numpy as np

    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max()
    return (wide - np.log(np.exp(wide).sum())).round(6).tolist()


ENGINES = {
    "xinslm": Xinslm,
    "xinslm-int8-cache": XinslmInt8Cache,
    "pytorch": PyTorch,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "mistralrs": MistralRs,
}


MODULES = {
    "xinslm": "xinslm.inference.native_engine",
    "xinslm-int8-cache": "xinslm.inference.native_engine",
    "pytorch": "xinslm.inference.torch_engine",
    "llama.cpp": "llama_cpp",
    "openvino": "openvino_genai",
    "mistralrs": "mistralrs",
}
"""Imported before the clock starts."""


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    importlib.import_module(MODULES[name])
    start = time.perf_counter()
    engine = ENGINES[name](path, threads)
    out = sys.stdout
    print(json.dumps({"ready": time.perf_counter() - start}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("do")
        if what == "memory":
            result = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            function = getattr(engine, what, None)
            result = function(**command) if function else None
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
