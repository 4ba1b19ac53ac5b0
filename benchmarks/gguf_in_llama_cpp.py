"""Every 4-bit GGUF below a folder, held against its canonical folder by other people's readers.

    python benchmarks/gguf_in_llama_cpp.py --folder /tmp/real

For each `student-N.gguf` beside a `gptq-N/`: weights that differ after `gguf`'s own dequantization
(must be 0), ids of a multilingual text in llama.cpp (must be equal), and next-token
log-probabilities of llama.cpp against PyTorch on the same 4-bit weights, on real text: once as they
are, once with PyTorch's inputs rounded to int8 blocks as llama.cpp does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, quants
from machine import describe

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "export"))
from test_export_gguf import unpermute

from llama_cpp import LlamaCpp
from xinslm.data.dataset import open_dataset
from xinslm.model.files import load_config, load_model, read_tensors
from xinslm.tokenizer.load import load_tokenizer

TEXT = """The café's 1,234 guests weren't sure: "Is it 12345678 or 3.14159?" they'd asked -- twice!\r\n
Größe, naïve, Ærøskøbing. Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। 你好，世界。
こんにちは世界。안녕하세요 세계! สวัสดีชาวโลก 🙂👩‍👩‍👧‍👦🏳️‍🌈   tabs\tand   spaces  \n\n\n   def f(x):\n\treturn x**2  # code
it's IT'S we'Ve ſ'ſ 'tis \u00a0\u3000 e\u0301 \u200b end"""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def differing_weights(gguf: Path, folder: Path) -> tuple[int, int]:
    """Weights whose value differs between the two, and weights in all."""
    config = load_config(folder)
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    written = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(gguf).tensors}
    differing = total = 0
    for name, weight in read_tensors(folder):
        stem = name.removesuffix(".weight")
        if ".layers." in stem:
            _, _, layer, part = stem.split(".", 3)
            found = written.pop(f"blk.{layer}.{NAMES[part]}.weight")
            found = unpermute(found, heads[part]) if part in heads else found
        else:
            found = written.pop(f"{NAMES[stem]}.weight")
        differing += int((found != weight.numpy()).sum())
        total += weight.numel()
    assert not written, f"only in the GGUF: {sorted(written)}"
    return differing, total


def log_probabilities(gguf: Path, folder: Path, prompts: list[list[int]]) -> list[float]:
    """Mean KL and largest difference of log-probability: PyTorch as it is, then with int8
    inputs.
    """
    models = [load_model(folder), load_model(folder, activations="int8")]
    vocab_size = models[0].config.vocab_size
    divergence: list[list[float]] = [[], []]
    largest = [0.0, 0.0]
    with LlamaCpp(gguf) as llama:
        for ids in prompts:
            theirs = llama.next_logprobs(ids, vocab_size)
            for which, model in enumerate(models):
                with torch.no_grad():
                    ours = (
                        model.logits(model.hidden(torch.tensor([ids])))[0, -1]
                        .double()
                        .log_softmax(-1)
                        .numpy()
                    )
                divergence[which].append(float((np.exp(ours) * (ours - theirs)).sum()))
                largest[which] = max(
                    largest[which], float(np.abs(ours - theirs)[ours > np.log(1e-4)].max())
                )
    return [float(np.mean(divergence[0])), largest[0], float(np.mean(divergence[1])), largest[1]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args()
    print(f"{describe(('torch', 'gguf', 'xllamacpp'))}\n")
    print(
        "| GGUF | weights that differ | ids of the text | KL nats | largest | KL, int8 inputs | "
        "largest |"
    )
    print("|---|---|---|---|---|---|---|")
    for gguf in sorted(args.folder.rglob("student-*.gguf")):
        folder = gguf.parent / f"gptq-{gguf.stem.rpartition('-')[2]}"
        tokenizer = load_tokenizer(folder)
        with LlamaCpp(gguf) as llama:
            same = llama.tokenize(TEXT) == tokenizer.encode(TEXT)
        split = open_dataset(gguf.parent / "data").split("validation")
        prompts = []
        for number in range(min(args.prompts, len(split.documents) - 1)):
            start, end = (int(x) for x in split.documents[number : number + 2])
            prompts.append(
                split.tokens[start : min(end - 1, start + 20 + 7 * number)].astype(int).tolist()
            )
        differing, total = differing_weights(gguf, folder)
        figures = log_probabilities(gguf, folder, prompts)
        print(
            f"| {gguf.relative_to(args.folder)} | {differing} of {total:,} | "
            f"{'equal' if same else 'DIFFERENT'} | "
            + " | ".join(f"{figure:.1e}" for figure in figures)
            + " |",
            flush=True,
        )
        if differing or not same:
            sys.exit("the file does not hold what was quantized")


if __name__ == "__main__":
    main()
