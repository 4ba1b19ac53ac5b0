"""Open the adapter that a teacher's name refers to.

http://host:8000/v1 is an OpenAI-compatible endpoint, and any other name a model of any kind that
`open_model` knows. LLaMA, Mistral, Qwen2 and Qwen3 run in our own transformer, which starts seconds
sooner than transformers and is a little faster; LoRA adapters and other architectures need
transformers.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from xinslm.errors import UsageError
from xinslm.model.files import open_model
from xinslm.teachers.encoder import find_encoder
from xinslm.teachers.endpoint import EndpointTeacher, is_endpoint
from xinslm.teachers.endpoint_config import EndpointConfig
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.own import OwnTeacher


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
    """LoRA adapter folder, for models."""
    tokenizer: str | None = None
    """Tokenizer of an endpoint; for a model, what replaces its own."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Settings of an endpoint; `top` and `api_key` also apply to endpoints only."""
    top: int = 8
    """Log-probabilities to keep for each token."""
    api_key: str | None = field(default=None, repr=False)


def open_teacher(
    name: str, options: TeacherOptions | None = None
) -> HuggingFaceTeacher | OwnTeacher | EndpointTeacher:
    """Open the teacher that `name` means; UsageError for options that do not apply to it."""
    options = options or TeacherOptions()
    dtype, device, adapter, tokenizer = (
        options.dtype,
        options.device,
        options.adapter,
        options.tokenizer,
    )
    if is_endpoint(name):
        if adapter is not None:
            raise UsageError(f"--adapter is for models, and {name} is an endpoint. Leave it out")
        return EndpointTeacher(name, options.endpoint, options.top, tokenizer, options.api_key)
    source = open_model(name, options.revision)
    if adapter is None and not options.trust_remote_code and source.is_own:
        return OwnTeacher(source, dtype, device, tokenizer)
    return HuggingFaceTeacher(source, dtype, device, options.trust_remote_code, adapter, tokenizer)


def teacher_fingerprint(name: str) -> str:
    """Fingerprint that a cache of this teacher has, without loading the teacher."""
    return open_model(find_encoder(name) or name).fingerprint
