"""Open the adapter that a teacher's name refers to.

http://host:8000/v1 is an OpenAI-compatible endpoint, a name that ends in .gguf a file for
llama.cpp, and any other name a Hugging Face causal language model: a folder, a run folder, or a
name on the Hub. LLaMA and Mistral run in our own transformer, which starts seconds sooner than
transformers and is a little faster; LoRA adapters need transformers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xinslm.errors import UsageError
from xinslm.model.files import is_own, model_fingerprint, resolve_model
from xinslm.teachers.encoder import find_encoder
from xinslm.teachers.endpoint import EndpointTeacher, is_endpoint
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.teachers.gguf import GgufTeacher, gguf_fingerprint, gguf_tokenizer
from xinslm.teachers.huggingface import HuggingFaceTeacher, local_folder, refuse_quantized
from xinslm.teachers.own import LlamaTeacher


@dataclass(frozen=True)
class TeacherOptions:
    """How to open a teacher."""

    dtype: str = "float32"
    device: torch.device | str = "cpu"
    revision: str | None = None
    """Revision on the Hub."""
    trust_remote_code: bool = False
    """Run model code from the folder or the Hub."""
    adapter: Path | None = None
    """LoRA adapter folder, for Hugging Face models."""
    tokenizer: str | None = None
    """Tokenizer of an endpoint or a GGUF file."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Settings of an endpoint; `top` and `api_key` also apply to endpoints only."""
    top: int = 8
    """Log-probabilities to keep for each token."""
    api_key: str | None = field(default=None, repr=False)


def open_teacher(
    name: str, options: TeacherOptions | None = None
) -> HuggingFaceTeacher | LlamaTeacher | GgufTeacher | EndpointTeacher:
    """Open the teacher that `name` means; UsageError for options that do not apply to it."""
    options = options or TeacherOptions()
    dtype, device, adapter, tokenizer = (
        options.dtype,
        options.device,
        options.adapter,
        options.tokenizer,
    )
    if adapter is not None and (is_endpoint(name) or name.endswith(".gguf")):
        raise UsageError(f"--adapter is for Hugging Face models, and {name} is none. Leave it out")
    if is_endpoint(name):
        return EndpointTeacher(name, options.endpoint, options.top, tokenizer, options.api_key)
    if name.endswith(".gguf"):
        return GgufTeacher(Path(name), dtype, device, tokenizer)
    if tokenizer is not None:
        raise UsageError(
            f"--teacher-tokenizer-path is for endpoints and GGUF files; {name} brings its own. "
            "Leave it out"
        )
    folder = local_folder(name, options.revision)
    refuse_quantized(folder)
    if adapter is None and not options.trust_remote_code and is_own(folder):
        return LlamaTeacher(name, folder, dtype, device)
    return HuggingFaceTeacher(
        name, dtype, device, options.revision, options.trust_remote_code, adapter
    )


def teacher_fingerprint(name: str) -> str:
    """Fingerprint that a cache of this teacher has, without loading the teacher."""
    if name.endswith(".gguf"):
        return gguf_fingerprint(Path(name))
    return model_fingerprint(find_encoder(name) or resolve_model(name))


def teacher_tokenizer(name: str) -> Any:
    """Tokenizer of a local teacher, without loading its weights."""
    from xinslm.tokenizer.load import load_tokenizer

    return (
        gguf_tokenizer(Path(name))
        if name.endswith(".gguf")
        else load_tokenizer(resolve_model(name))
    )
