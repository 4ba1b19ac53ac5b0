"""Shared by local teachers: padded batches, hidden states by hooks, strict loading of weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xinslm.errors import UsageError, XinslmError
from xinslm.model.source import ModelSource
from xinslm.precision import weight_dtype
from xinslm.sampling import Sampling
from xinslm.teachers.base import Generation, Prompt
from xinslm.teachers.generate import (
    Decoder,
    Limits,
    Tell,
    generate_batch,
    prompt_ids,
    to_generation,
)
from xinslm.tokenizer.chat import end_ids


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences, longest first, in batches whose padded size stays within
    `batch_tokens`.
    """
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        rows = max(1, batch_tokens // max(int(lengths[order[at]]), 1))
        yield order[at : at + rows]
        at += rows


@contextmanager
def capture_hidden_states(
    model: Any, num_layers: int, depths: Sequence[int], name: str
) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of blocks `depths` (from 1) in the forward passes inside; other layers
    are not kept.
    """
    lists = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num_layers
    ]
    if not lists:
        raise XinslmError(
            f"teacher {name}: its {num_layers} blocks were not found, so it gives no hidden states"
        )
    outputs: dict[int, Tensor] = {}

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            outputs[depth] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [lists[0][depth - 1].register_forward_hook(keep(depth)) for depth in depths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def load_pretrained(cls: Any, source: ModelSource, dtype: str, who: str, **options: Any) -> Any:
    """Load a model with a class of transformers; XinslmError, naming `who`, if it fails or a weight
    is missing.
    """
    import transformers
    from transformers.utils import logging

    source.require()
    source.require_tied()
    logging.disable_progress_bar()
    arguments = source.pretrained_arguments()
    if "config" in arguments:  # an Auto class needs a folder to choose from
        cls = getattr(transformers, source.settings["architectures"][0])
        options = {}
    try:
        model, report = cls.from_pretrained(
            dtype=weight_dtype(dtype, "cpu"), output_loading_info=True, **arguments, **options
        )
    # transformers, safetensors and huggingface_hub raise a dozen kinds for bad folders
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise XinslmError(f"transformers cannot load {who}: {first}") from error
    lacking = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if lacking:  # transformers would draw them at random
        raise XinslmError(
            f"{who}: {len(lacking)} weights are missing or misshapen, such as '{lacking[0]}'"
        )
    return model


class LocalWriter:
    """Base of what answers prompts here; a subclass sets the fields and has `open_decoder`."""

    name: str
    tokenizer: Any
    max_length: int
    open_decoder: Callable[[int, int], Decoder]
    cache_bytes_per_token: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int = 256,
        rows: int | None = None,
        tell: Tell = lambda texts, tokens: None,
    ) -> list[Generation]:
        """Answer prompts, `rows` at a time; different `keys` give a prompt different answers.

        The answers depend on prompts, keys and settings alone, up to rounding. UsageError for a
        prompt that does not fit the context.
        """
        limits = Limits(
            max_new_tokens,
            self.max_length,
            end_ids(self.tokenizer),
            rows,
            self.cache_bytes_per_token,
            name=f"teacher {self.name}",
        )
        ids = [np.array(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        written = generate_batch(self.open_decoder, ids, keys, sampling, limits, tell)
        return [
            to_generation(self.tokenizer, prompt, text)
            for prompt, text in zip(prompts, written.texts, strict=True)
        ]


class LocalTeacher(LocalWriter):
    """Base of teachers in memory; a subclass sets the fields and has `states`, `logits`,
    `open_decoder` and `cache_bytes_per_token`.
    """

    device: torch.device
    model: Any
    num_layers: int
    states: Callable[[list[np.ndarray]], Tensor]

    def check_lengths(self, sequences: list[np.ndarray]) -> int:
        """Length of the longest sequence; UsageError if it exceeds the context."""
        longest = max(len(s) for s in sequences)
        if longest > self.max_length:
            raise UsageError(
                f"teacher {self.name} has a context of {self.max_length} tokens, "
                f"{longest} are asked for"
            )
        return longest

    def padded(self, sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Right-pad sequences of ids into one batch: ids (B, T) int64 and which of them are real,
        (B, T) bool.

        Causal attention makes right pads harmless. Raises UsageError for a sequence longer than the
        context.
        """
        longest = self.check_lengths(sequences)
        batch = np.zeros((len(sequences), longest), dtype=np.int64)
        real = np.zeros((len(sequences), longest), dtype=bool)
        for row, ids in enumerate(sequences):
            batch[row, : len(ids)], real[row, : len(ids)] = ids, True
        return torch.from_numpy(batch).to(self.device), torch.from_numpy(real).to(self.device)

    def states_and_hidden(
        self, sequences: list[np.ndarray], depths: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`states`, and the outputs of blocks `depths` (from 1), each (total tokens, hidden)."""
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        with capture_hidden_states(self.model, self.num_layers, depths, self.name) as outputs:
            states = self.states(sequences)
        real = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        return states, [outputs[depth][real] for depth in depths]
