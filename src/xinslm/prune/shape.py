"""Check that the teacher can be pruned, and derive the student's shape from it."""

import dataclasses
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.model.config import ModelConfig, UnsupportedModelError
from xinslm.model.files import open_model
from xinslm.model.source import ModelSource
from xinslm.prune.config import PruneConfig


def find_teacher(name: str) -> tuple[ModelSource, ModelConfig]:
    """Open the teacher and read its shape; raise if such a model cannot be pruned."""
    source = open_model(name)
    try:
        return source, source.config
    except UnsupportedModelError as error:
        raise XinslmError(
            f"{error}. Only LLaMA, Mistral, Qwen2 and Qwen3 models can be pruned: the student has "
            "no counterpart for the parts of others. The model can still be a teacher (`xinslm "
            "cache`)"
        ) from None


def student_shape(config: PruneConfig, teacher: ModelConfig, vocab_size: int) -> ModelConfig:
    """Return the teacher's shape with the sizes of `config` and the vocabulary; UsageError lists
    all sizes that cannot be cut.
    """
    given: dict[str, Any] = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if config.num_heads is not None and config.num_kv_heads is None:
        share = teacher.num_attention_heads // teacher.num_key_value_heads
        given["num_key_value_heads"] = max(1, config.num_heads // share)
    student = dataclasses.replace(teacher, vocab_size=vocab_size, **given)
    wrong = [
        f"{name} is {getattr(student, name)}, but the teacher has only {getattr(teacher, name)}: "
        "a pruned model cannot be larger than its teacher"
        for name in given
        if name != "tie_word_embeddings" and getattr(student, name) > getattr(teacher, name)
    ]
    if config.head_dim not in (None, teacher.head_dim):
        wrong.append(
            f"head_dim is {config.head_dim}, but must stay the teacher's {teacher.head_dim}: each "
            "pair of a head's channels has its own rotary frequency, and another width has other "
            "frequencies. Use fewer heads"
        )
    if student.tie_word_embeddings and not teacher.tie_word_embeddings:
        wrong.append(
            "tie_word_embeddings is true, but the teacher's output head is not its embedding, and "
            "one matrix cannot start as both"
        )
    if wrong:
        raise UsageError("\n".join(wrong))
    student.check()
    merged = merged_heads(teacher, student)
    if merged > 1 and student.qk_norm:
        most = student.num_key_value_heads * teacher.num_attention_heads
        raise UsageError(
            f"{student.num_attention_heads} query heads on {student.num_key_value_heads} "
            f"key-value heads would merge key-value heads of the teacher, but its heads are "
            "normalized (Qwen3), and a norm does not commute with the merging. Use at most "
            f"{most // teacher.num_key_value_heads} query heads, or more key-value heads"
        )
    if merged * student.num_key_value_heads > teacher.num_key_value_heads:
        raise UsageError(
            f"{student.num_attention_heads} query heads on {student.num_key_value_heads} "
            "key-value heads cannot be cut from "
            f"{teacher.num_attention_heads} on {teacher.num_key_value_heads}: {merged} of "
            "the teacher's key-value heads would be merged into one, and there are not enough. "
            "Use a num_kv_heads that divides "
            f"{teacher.num_key_value_heads}, or fewer num_heads"
        )
    return student


def merged_heads(teacher: ModelConfig, student: ModelConfig) -> int:
    """How many of the teacher's key-value heads are merged into each of the student's."""
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    return -(-student.num_attention_heads // (student.num_key_value_heads * group))
