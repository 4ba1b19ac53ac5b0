r"""Write a GGUF file of a preset's shape with random 4-bit weights, to measure speed and memory with.

    python benchmarks/random_gguf.py 1b --like student.gguf -o /tmp/1b.gguf

The tokenizer is that of `--like`, whose vocabulary the model gets.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from xinslm.gguf_file import GgufFile
from xinslm.model.config import PRESETS


def blocks(rng: np.random.Generator, rows: int, columns: int, size: int) -> np.ndarray:
    """Random blocks of Q4_0 (18 bytes) or Q8_0 (34), with scales that keep outputs near 1."""
    out = rng.integers(0, 256, (rows, columns // 32, size), np.uint8)
    scale = np.float16((1 if size == 18 else 0.06) / (4.6 * columns**0.5))
    out[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return out.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--like", type=Path, required=True, help="GGUF file with the tokenizer")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    p, keys = PRESETS[options.preset], GgufFile(options.like).keys
    vocabulary = len(keys["tokenizer.ggml.tokens"])
    writer = GGUFWriter(options.output, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(p.hidden_size)
    writer.add_feed_forward_length(p.intermediate_size)
    writer.add_block_count(p.num_hidden_layers)
    writer.add_head_count(p.num_attention_heads)
    writer.add_head_count_kv(p.num_key_value_heads)
    writer.add_key_length(p.head_dim)
    writer.add_value_length(p.head_dim)
    writer.add_rope_dimension_count(p.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model(keys["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(keys["tokenizer.ggml.pre"])
    writer.add_token_list(keys["tokenizer.ggml.tokens"])
    writer.add_token_types(keys["tokenizer.ggml.token_type"])
    writer.add_token_merges(keys["tokenizer.ggml.merges"])
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for role in ("bos", "eos", "unknown", "padding"):
        if f"tokenizer.ggml.{role}_token_id" in keys:
            writer.add_uint32(
                f"tokenizer.ggml.{role}_token_id", keys[f"tokenizer.ggml.{role}_token_id"]
            )
    rng = np.random.default_rng(0)
    hidden, heads = p.hidden_size, p.num_attention_heads * p.head_dim
    shared = p.num_key_value_heads * p.head_dim
    matrices = {
        "attn_q": (heads, hidden),
        "attn_k": (shared, hidden),
        "attn_v": (shared, hidden),
        "attn_output": (hidden, heads),
        "ffn_gate": (p.intermediate_size, hidden),
        "ffn_up": (p.intermediate_size, hidden),
        "ffn_down": (hidden, p.intermediate_size),
    }
    kinds = {18: GGMLQuantizationType.Q4_0, 34: GGMLQuantizationType.Q8_0}

    def add(name: str, shape: tuple[int, int], size: int) -> None:
        writer.add_tensor(name, blocks(rng, *shape, size), raw_dtype=kinds[size])

    add("token_embd.weight", (vocabulary, hidden), 34)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(p.num_hidden_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, shape in matrices.items():
            add(f"blk.{layer}.{name}.weight", shape, 18)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{options.output}: {options.output.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
