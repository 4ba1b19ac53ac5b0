"""Open any model, write model folders in Hugging Face's layout.

model = load_model("runs/student")              # or a GGUF file, a 4-bit folder, OWNER/NAME
source = open_model("SmolLM2.Q4_1.gguf")        # shape, weights, fingerprint; nothing is loaded
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from xinslm.errors import UsageError
from xinslm.files import new_file
from xinslm.gguf_file import is_gguf
from xinslm.model.config import ModelConfig
from xinslm.model.gguf import GgufSource
from xinslm.model.names import CONFIG, WEIGHTS
from xinslm.model.packed_source import PackedSource, packed_format
from xinslm.model.quantized import QuantizedSource, is_quantized
from xinslm.model.source import FolderSource, ModelSource, write_config
from xinslm.model.transformer import Transformer
from xinslm.places import find
from xinslm.ranges import Activations

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def open_model(name: Path | str, revision: str | None = None) -> ModelSource:
    """Open the model that `name` refers to: a Hugging Face, run or quantized folder, a GGUF file,
    or a Hub name (at `revision`).

    No other code asks what kind of model a name is, except `inference/raw_weights.py`, which opens
    without PyTorch what the native engine reads. Weights are not read yet.
    """
    path = Path(name)
    if is_gguf(path):
        return GgufSource(str(name), path)
    path = find(name, "model", lambda place: (place / CONFIG).is_file(), HUB_FILES, revision)
    if is_quantized(path):
        return QuantizedSource(str(name), path)
    packed = packed_format(path)
    return PackedSource(str(name), path, *packed) if packed else FolderSource(str(name), path)


def load_model(
    name: Path | str,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    activations: Activations = "float",
) -> Transformer:
    """Load a LLaMA, Mistral, Qwen2 or Qwen3 of any kind as a `Transformer`, dequantized to `dtype`;
    its linear layers round their inputs to int8 on request.
    """
    return open_model(name).transformer(dtype, gradient_checkpointing, activations)


def read_tensors(name: Path | str) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor of each weight of a model of any kind."""
    return open_model(name).tensors()


def require_context(max_seq_length: int, context: int, who: str) -> None:
    """Raise UsageError if the context of `who` ("teacher X") is less than `max_seq_length`."""
    if max_seq_length > context:
        raise UsageError(
            f"max_seq_length is {max_seq_length}, but {who} has a context of {context} tokens: "
            f"pass --max-seq-length {context}"
        )


def save_model(model: Transformer, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` into `folder`; a tied head is written once.

    `dtype` is the type on disk, by default that of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    kinds = {tensor.dtype for tensor in tensors.values()}
    write_config(model.config.to_hf(), folder, kinds.pop() if len(kinds) == 1 else torch.float32)
    with new_file(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_config(name: Path | str) -> ModelConfig:
    """Read the shape of a LLaMA, Mistral, Qwen2 or Qwen3 of any kind."""
    return open_model(name).config
