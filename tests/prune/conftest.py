"""Random teachers that several files of tests share."""

import pytest
from workshop import Workshop, make_workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Tied, three layers, 4 query heads on 2, neither width nor heads equal to anything else."""
    return make_workshop(tmp_path_factory.mktemp("tied"), num_hidden_layers=3)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Workshop:
    """Untied, every query head with a key-value head of its own."""
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": False}
    return make_workshop(tmp_path_factory.mktemp("untied"), **shape)
