"""Layers, neurons and vocabulary rows: what stays is untouched, and what goes is what matters
least.
"""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from small_models import save_tokenizer
from xinslm.errors import UsageError
from xinslm.prune import choose, cuts, measure
from xinslm.prune.cuts import assemble, keep_layers
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model) -> torch.Tensor:
    return model.logits(model.hidden(IDS))


def test_fewer_layers_are_the_transformers_model_with_those_removed(workshop) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(workshop.teacher)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[0], theirs.model.layers[2]])
    for index, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = index
    theirs.config.num_hidden_layers = 2
    ours = keep_layers(workshop.model.config, workshop.model.state_dict(), [0, 2])
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours), theirs(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


def test_layers_are_chosen_by_the_loss_without_them(workshop) -> None:
    def score(model) -> float:
        return measure.loss(model, workshop.passages[:1])

    weights, config = workshop.model.state_dict(), workshop.model.config
    by_force = min(
        itertools.combinations(range(3), 2),
        key=lambda kept: score(keep_layers(config, weights, kept)),
    )
    assert choose.choose_by_loss(
        workshop.model, 2, workshop.passages[:1], lambda done: None
    ) == list(by_force)
    one = choose.choose_by_loss(workshop.model, 1, workshop.passages[:1], lambda done: None)
    assert len(one) == 1 and one[0] in by_force


def test_influence_is_one_minus_the_cosine_of_input_and_output(workshop) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(workshop.teacher)
    passage = workshop.passages[0]
    row = passage.ids[:1, : int((passage.segments[0] == 0).sum())]  # its first document
    with torch.no_grad():
        states = theirs(row, output_hidden_states=True).hidden_states
    one = measure.Passage(row, row, torch.arange(row.shape[1])[None], torch.zeros_like(row))
    found = measure.measure(workshop.model, [one], lambda layer: None)
    for layer in (0, 1):  # the last of transformers' states is normed
        expected = (
            (1 - torch.cosine_similarity(states[layer], states[layer + 1], dim=-1)).mean().item()
        )
        assert found.layers[layer].influence == pytest.approx(expected, rel=1e-4)
    assert choose.choose_by_influence([0.9, 0.1, 0.5, 0.1], 2) == [0, 2]
    assert choose.choose_by_influence([0.5, 0.5, 0.1], 1) == [0]


def test_neurons_that_add_nothing_go_first(workshop) -> None:
    weights = {name: tensor.clone() for name, tensor in workshop.model.state_dict().items()}
    dead = torch.arange(0, 96, 3)
    for layer in range(3):
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, dead] = 0
    teacher = assemble(workshop.model.config, weights)
    found = measure.measure(teacher, workshop.passages[:1], lambda layer: None)
    cut = dict(weights)
    for layer in range(3):
        own = {
            name.split(".", 3)[3]: t
            for name, t in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        kept = cuts.choose_neurons(found.layers[layer].neurons, own["mlp.down_proj.weight"], 64)
        assert not set(kept.tolist()) & set(dead.tolist())
        cut |= {
            f"model.layers.{layer}.{name}": t for name, t in cuts.keep_neurons(own, kept).items()
        }
    from dataclasses import replace

    thin = assemble(replace(teacher.config, intermediate_size=64), cut)
    torch.testing.assert_close(logits(thin), logits(teacher), rtol=1e-4, atol=1e-4)


def test_a_nested_vocabulary_keeps_rows_by_identity(workshop) -> None:
    teacher = load_tokenizer(workshop.teacher)
    student = BPETokenizer.prefix_of(teacher, 290)
    rows = cuts.vocabulary_rows(student, teacher, "data")
    assert len(set(rows)) == 290
    for token, row in enumerate(rows):
        assert student.token_bytes(token) == teacher.token_bytes(row)
    specials = {name: rows[token] for name, token in student.special_tokens.items()}
    assert (
        specials == {name: teacher.special_tokens[name] for name in specials} and len(specials) == 5
    )
    sliced = cuts.keep_vocabulary(workshop.model, rows, {"bos_token_id": student.bos_id})
    ids = torch.randint(0, 290, (2, 24), generator=torch.Generator().manual_seed(5))
    whole = workshop.model.logits(workshop.model.hidden(torch.tensor(rows)[ids]))
    torch.testing.assert_close(
        sliced.logits(sliced.hidden(ids)), whole[:, :, rows], rtol=0, atol=1e-5
    )
    assert sliced.config.bos_token_id == student.bos_id != workshop.model.config.bos_token_id


def test_special_tokens_of_another_name_are_found_by_role(workshop) -> None:
    teacher = load_tokenizer(workshop.teacher)
    definition = BPETokenizer.prefix_of(teacher, 290, special_tokens=["<|end|>", "<|pad|>"])
    rows = cuts.vocabulary_rows(definition, teacher, "data")
    assert rows[definition.eos_id] == teacher.eos_id and rows[definition.pad_id] == teacher.pad_id


def test_foreign_tokenizers_are_refused(workshop, tmp_path) -> None:
    teacher = load_tokenizer(workshop.teacher)
    other = BPETokenizer(vocab_size=300)
    other.train(["an entirely different text of quite other words, once more and again"] * 3)
    with pytest.raises(UsageError, match=r"neither the teacher's nor nested in it.*--prefix-of"):
        cuts.vocabulary_rows(other, teacher, "data")
    strange = BPETokenizer.prefix_of(teacher, 290, special_tokens=["<|end|>", "<|tool|>"])
    with pytest.raises(
        UsageError, match=r"has the token <\|tool\|>, which the teacher's does not have"
    ):
        cuts.vocabulary_rows(strange, teacher, "data")
    save_tokenizer(tmp_path, 300)
    # the same text, fewer merges: nested, though made apart
    assert load_tokenizer(tmp_path).vocab_size == 300
    assert len(cuts.vocabulary_rows(load_tokenizer(tmp_path), teacher, "data")) == 300
