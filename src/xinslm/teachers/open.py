"""Which adapter a teacher's name means.

http://host:8000/v1 is an OpenAI-compatible endpoint, what ends in .gguf a file of llama.cpp's, and
any other name a Hugging Face causal language model: a folder, a run folder, a name on the Hub. What
our transformer can express, LLaMA and Mistral, runs there: it starts seconds sooner than
transformers and is a little faster. An adapter needs the latter.
"""

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


def open_teacher(
    name: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
    endpoint: EndpointConfig | None = None,
    top: int = 8,
    api_key: str | None = None,
    adapter: Path | None = None,
) -> HuggingFaceTeacher | LlamaTeacher | GgufTeacher | EndpointTeacher:
    """Open a teacher; `tokenizer` is for those that bring none, `endpoint`, `top` and `api_key` for
    URLs.
    """
    if adapter is not None and (is_endpoint(name) or name.endswith(".gguf")):
        raise UsageError(f"--adapter is for Hugging Face models, and {name} is none. Leave it out")
    if is_endpoint(name):
        return EndpointTeacher(name, endpoint or EndpointConfig(), top, tokenizer, api_key)
    if name.endswith(".gguf"):
        return GgufTeacher(Path(name), dtype, device, tokenizer)
    if tokenizer is not None:
        raise UsageError(
            f"--teacher-tokenizer-path is for endpoints and GGUF files; {name} brings its own. "
            "Leave it out"
        )
    folder = local_folder(name, revision)
    refuse_quantized(folder)
    if adapter is None and not trust_remote_code and is_own(folder):
        return LlamaTeacher(name, folder, dtype, device)
    return HuggingFaceTeacher(name, dtype, device, revision, trust_remote_code, adapter)


def teacher_fingerprint(name: str) -> str:
    """Fingerprint that a cache of this teacher would carry, without loading it."""
    if name.endswith(".gguf"):
        return gguf_fingerprint(Path(name))
    return model_fingerprint(find_encoder(name) or resolve_model(name))


def teacher_tokenizer(name: str) -> Any:
    """Tokenizer of a teacher whose files are here, without loading its weights."""
    from xinslm.tokenizer.load import load_tokenizer

    return (
        gguf_tokenizer(Path(name))
        if name.endswith(".gguf")
        else load_tokenizer(resolve_model(name))
    )
