"""How a teacher's tokenizer maps to the dataset's: what `auto` takes, what is refused and why."""

import numpy as np
import pytest

import training as train
from other_tokenizers import characters, metaspace
from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.distill.config import DistillConfig
from xinslm.errors import UsageError
from xinslm.losses.config import LossConfig
from xinslm.model.config import ModelConfig
from xinslm.model.files import save_model
from xinslm.model.transformer import Transformer
from xinslm.tokenizer.bpe import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer


def dataset(world, folder, tokenizer):
    tokenizer.save(folder / "tokenizer")
    data = folder / "data"
    prepare.run(
        PrepareConfig(
            data_path=(str(world.text),), tokenizer_path=folder / "tokenizer", output_dir=data
        )
    )
    return data


def cached(world, data, folder, **changes):
    settings = {
        "max_seq_length": 64,
        "shard_positions": 3000,
        "batch_tokens": 512,
        "device": "cpu",
        **changes,
    }
    return score.run(
        CacheConfig(settings.pop("teacher", str(world.teacher)), data, folder, **settings)
    )


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """A dataset whose tokenizer is neither the teacher's nor nested in it, and its cache."""
    folder = tmp_path_factory.mktemp("other")
    data = dataset(world, folder, metaspace(300))
    result = cached(world, data, folder / "cache")
    return data, folder / "cache", result


def test_students_learn_from_another_tokenizers_teacher(world, other, tmp_path):
    data, folder, _ = other
    config = DistillConfig(
        data_path=data,
        output_dir=tmp_path / "run",
        cache=folder,
        max_steps=40,
        learning_rate=5e-3,
        eval_steps=20,
        loss=LossConfig(alpha=0.2, beta=0.8),
        **world.settings,
    )
    result = train.run(config)
    assert result.validation is not None and result.validation.ce < 0.9 * np.log(556)


@pytest.mark.parametrize("wish", ["same", "nested"])
def test_ways_that_do_not_lead_are_refused_with_reasons(world, other, tmp_path, wish):
    data, _, _ = other
    with pytest.raises(
        UsageError, match=r"(?s)cannot be mapped to .*same: the tokenizers differ.*--prefix-of"
    ) as caught:
        cached(world, data, tmp_path / "c", alignment=wish)
    assert ("nested: the dataset's tokenizer is not a merge prefix" in str(caught.value)) == (
        wish == "nested"
    )
    assert not (tmp_path / "c").exists()


def test_auto_takes_the_first_possible_alignment(world, tmp_path):
    nested = dataset(world, tmp_path, BPETokenizer.prefix_of(load_tokenizer(world.teacher), 300))
    assert cached(world, nested, tmp_path / "nested").alignment == "nested"
    assert Cache(world.cache).manifest["alignment"]["kind"] == "same"


def test_teachers_of_characters_know_the_tokens_of_their_text(world, tmp_path):
    save_model(
        Transformer(ModelConfig(characters().vocab_size, 32, 64, 1, 2, 2, 16)), tmp_path / "teacher"
    )
    characters().save(tmp_path / "teacher")
    result = cached(world, world.data, tmp_path / "p", teacher=str(tmp_path / "teacher"))
    assert result.alignment == "byte_prefix" and result.share > 0.9, "what auto takes"


def test_hidden_states_need_the_teachers_tokenizer_or_a_nested_one(world, other, tmp_path):
    data, _, _ = other
    with pytest.raises(UsageError, match="hidden states and on-policy rounds need the teacher's"):
        cached(world, data, tmp_path / "c", hidden_state_depths=(1.0,))
    assert not (tmp_path / "c").exists()
