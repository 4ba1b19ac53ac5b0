"""Calibration text that the model writes: its distribution, its documents, the whole command."""

import json

import numpy as np
import pytest
import torch
from test_quantize_run import divergence
from transformers import AutoTokenizer

from small_models import TEMPLATE, save_random_model, save_tokenizer, tree_hash
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_model, open_model, save_model
from xinslm.quantize.author import Author, Document, find_opening
from xinslm.quantize.calibration import RowShape
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run
from xinslm.quantize.self_generated import find_faults, write_rows
from xinslm.tokenizer.load import load_tokenizer

SHAPE = RowShape(6, 48)
END = 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights with and without a chat template."""
    root = tmp_path_factory.mktemp("self-generated")
    for name, template in (("chat", TEMPLATE), ("plain", None)):
        save_random_model(root / name)
        for file in root.glob(f"{name}/*template*"):
            file.unlink()
        save_tokenizer(root / name, template=template)
    return root


def rows_of(folder, seed=0, shape=SHAPE, listener=lambda progress: None):
    return write_rows(open_model(folder), load_tokenizer(folder), shape, seed, listener)


def ids_of(rows):
    return np.concatenate([batch.input_ids for batch in rows.batches])


def documents_of(folder, count, length, seed=3):
    tokenizer = load_tokenizer(folder)
    opening, notes = find_opening(tokenizer, length)
    assert notes == []
    author = Author(open_model(folder), tokenizer, opening, length, seed)
    return author.write(0, count, lambda tokens: None)


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_the_seed_determines_the_rows(models, name):
    first, again, other = (rows_of(models / name, seed) for seed in (0, 0, 1))
    for a, b in zip(first.batches, again.batches, strict=True):
        for key, array in vars(a).items():
            assert np.array_equal(array, getattr(b, key)), key
    assert ids_of(first).shape == ids_of(other).shape == (6, 48)
    rows = [tuple(row) for row in np.concatenate([ids_of(first), ids_of(other)]).tolist()]
    assert len(set(rows)) == 12
    assert first.facts["form"] == {"chat": "chat", "plain": "text"}[name]
    assert first.notes == [] and first.texts == [] and first.dataset is None


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_targets_are_what_the_model_wrote_and_never_padding(models, name):
    rows = rows_of(models / name)
    for batch in rows.batches:
        assert (batch.labels[batch.segments < 0] == -100).all()
        inside = batch.segments[:, 1:] == batch.segments[:, :-1]
        follows = inside & (batch.segments[:, 1:] >= 0) & (batch.labels[:, :-1] >= 0)
        assert np.array_equal(batch.labels[:, :-1][follows], batch.input_ids[:, 1:][follows])
        assert (batch.labels >= 0).sum() > 0.5 * batch.labels.size
        assert (batch.positions[:, 0] == 0).all()


def test_chats_are_those_of_the_template(models):
    """The beginning, and what lies between a turn's end and the answer, are what transformers'
    template renders; only other tokens are targets."""
    reference = AutoTokenizer.from_pretrained(models / "chat")
    user = reference.encode("<|user|>\n")
    answer = reference.encode("\n<|assistant|>\n")
    documents = documents_of(models / "chat", 200, 64)
    answered = 0
    for document in documents:
        tokens, mask = document.tokens.tolist(), document.mask.tolist()
        assert tokens[: len(user)] == user and len(tokens) <= 65
        turn = tokens.index(END) if END in tokens else len(tokens) - 1
        assert mask[: turn + 1] == [0] * len(user) + [1] * (turn + 1 - len(user))
        rest = tokens[turn + 1 :]
        if rest:
            answered += 1
            assert rest[: len(answer)] == answer
            assert mask[turn + 1 :] == [0] * len(answer) + [1] * (len(rest) - len(answer))
            assert len(rest) > len(answer)
    assert answered > 5
    answers = {tuple(d.tokens[-3:].tolist()) for d in documents}
    assert len(answers) > 150


def chi_square(drawn, probabilities):
    """Pearson's statistic in standard deviations over its mean; rare ids share a cell."""
    counts = np.bincount(drawn, minlength=len(probabilities)).astype(float)
    expected = len(drawn) * probabilities
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_tokens_have_the_models_distribution(models, name):
    """First tokens against the softmax, and second ones after the most frequent first one."""
    prompt = AutoTokenizer.from_pretrained(models / name).encode("<|user|>\n")
    start, prompt = (len(prompt), prompt) if name == "chat" else (0, [0])
    length = 2 + 2 * 4 + len(prompt)  # room for the template
    documents = [d.tokens[start:] for d in documents_of(models / name, 4000, length)]
    model = load_model(models / name)
    first = np.array([tokens[0] for tokens in documents])
    common = int(np.bincount(np.where(first == END, 0, first)).argmax())
    second = np.array([tokens[1] for tokens in documents if tokens[0] == common])
    assert len(second) > 100
    for drawn, ids in ((first, prompt), (second, [*prompt, common])):
        with torch.no_grad():
            logits = model.logits(model.hidden(torch.tensor([ids])))[0, -1]
        expected = logits.double().softmax(-1).numpy()
        assert len(set(drawn.tolist())) > 3
        assert abs(chi_square(drawn, expected)) < 4
        assert chi_square(drawn, np.sqrt(expected) / np.sqrt(expected).sum()) > 8


def test_documents_begin_as_prepared_ones(world):
    """A tokenizer with a start token has it in each document."""
    tokenizer = load_tokenizer(world.teacher)
    assert len(tokenizer.start_ids) == 1
    rows = rows_of(world.teacher, shape=RowShape(4, 64))
    for batch in rows.batches:
        begins = (batch.positions == 0) & (batch.segments >= 0)
        assert (batch.input_ids[begins] == tokenizer.start_ids[0]).all()
    assert ids_of(rows).shape == (4, 64)


def test_progress_moves_and_ends(models):
    seen = []
    rows_of(models / "chat", listener=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done) and done[-1] == seen[-1].total == 6 * 48
    assert len({progress.stage for progress in seen}) == 1 and 0 < done[0] < 150


@pytest.mark.parametrize(
    ("template", "length", "note"),
    [
        (
            "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
            64,
            "does not end",
        ),
        ("{{ raise_exception('system first') }}", 64, "does not end"),
        (TEMPLATE, 9, "more than half"),
        (None, 64, None),
    ],
)
def test_templates_of_no_use_give_plain_text(tmp_path, template, length, note):
    save_tokenizer(tmp_path, template=template)
    opening, notes = find_opening(load_tokenizer(tmp_path), length)
    assert (opening.prompt, opening.num_kept, opening.turn_end) == ([0], 0, None)
    assert [note in text for text in notes] == ([] if note is None else [True])


def save_stubborn_model(folder, template, token):
    """A model whose every prediction is `token`."""
    model = save_random_model(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[token, 0] = 50
        model.model.norm.weight.zero_()[0] = 1000
        for block in model.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
    save_model(model, folder)
    for file in folder.glob("*template*"):
        file.unlink()
    save_tokenizer(folder, template=template)
    return folder


def test_text_that_ends_at_once_is_named(tmp_path):
    rows = rows_of(save_stubborn_model(tmp_path / "chat", TEMPLATE, END))
    assert "ended 36 of its 36 calibration texts at once" in rows.notes[0]
    assert "of the 6 asked for" in rows.notes[1]
    assert 0 < rows.facts["rows"] < 6
    with pytest.raises(XinslmError, match=r"ends its texts before the second token.*--data-path"):
        rows_of(save_stubborn_model(tmp_path / "plain", None, END))


def test_text_that_repeats_itself_is_named(tmp_path):
    rows = rows_of(save_stubborn_model(tmp_path / "same", None, 200))
    assert set(ids_of(rows).ravel()) == {200} and rows.facts["rows"] == 6
    (note,) = rows.notes
    assert "repeat themselves" in note
    result = run(
        QuantizeConfig(
            tmp_path / "same",
            tmp_path / "out",
            self_generate=True,
            num_calibration_samples=6,
            max_seq_length=48,
        )
    )
    assert note in result.notes and f"note   {note}" in result.describe()
    assert note in json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]


def test_different_text_is_not_called_repetitive():
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(0, 300, 50), np.ones(50, np.uint8), index < 10) for index in range(20)
    ]
    assert find_faults(documents, 4, RowShape(4, 64)) == []


@pytest.fixture(scope="module")
def plain_run(models):
    config = QuantizeConfig(
        models / "chat",
        models / "gptaq",
        self_generate=True,
        num_calibration_samples=12,
        max_seq_length=96,
    )
    return config, run(config)


def test_the_command_calibrates_without_a_dataset(models, plain_run, tmp_path):
    """The model's own text brings the quantized model nearer to it, on other text of its own."""
    config, result = plain_run
    run(QuantizeConfig(models / "chat", tmp_path / "rtn", method="rtn"))
    manifest = json.loads((config.output_dir / "manifest.json").read_text())
    facts = manifest["calibration_rows"]
    assert facts["texts"] >= 12 and facts["written_tokens"] > 6 * 96
    assert facts == {
        "method": "self-generated",
        "rows": 12,
        "max_seq_length": 96,
        "seed": 0,
        "form": "chat",
        "texts": facts["texts"],
        "written_tokens": facts["written_tokens"],
    }
    assert manifest["inputs"].keys() == {"model"} and manifest["calibration"] == []
    assert manifest["method"] == "gptaq" and result.loss_ratio < 0.9
    others = rows_of(models / "chat", seed=9, shape=RowShape(12, 96)).batches
    original = load_model(models / "chat")
    losses = [
        divergence(original, load_model(folder), others)
        for folder in (config.output_dir, tmp_path / "rtn")
    ]
    assert losses[0] < 0.8 * losses[1]


def test_the_command_is_reproducible(models, plain_run, tmp_path):
    config, _ = plain_run
    for seed, is_same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        run(
            QuantizeConfig(
                config.model,
                folder,
                self_generate=True,
                num_calibration_samples=12,
                max_seq_length=96,
                seed=seed,
            )
        )
        assert (tree_hash(folder) == tree_hash(config.output_dir)) == is_same


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"target_size": "70KB"}, "bits   8 for"),
        ({"scale_steps": 3, "method": "gptq"}, "scales KL to the original"),
        ({"target_size": "70KB", "method": "rtn"}, "bits   8 for"),
        ({"scale_steps": 3, "method": "absmax"}, "scales KL to the original"),
    ],
)
def test_what_follows_the_codes_takes_the_text_too(models, tmp_path, changes, line):
    result = run(
        QuantizeConfig(
            models / "plain",
            tmp_path / "out",
            self_generate=True,
            num_calibration_samples=9,
            max_seq_length=64,
            **changes,
        )
    )
    assert line in result.describe()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration_rows"]["form"] == "text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "data"}, "--data-path and --self-generate both give text .*: choose one"),
        ({"method": "rtn"}, "which --method rtn does not use: leave it out"),
        ({"bits": 8, "method": "gptq"}, "which --bits 8 does not use: leave it out"),
        ({"self_generate": False}, "let the model write it with --self-generate"),
        ({"max_seq_length": 4096}, "reads at most 128"),
    ],
)
def test_bad_requests(models, tmp_path, changes, message):
    values = {"self_generate": True, "num_calibration_samples": 2, "max_seq_length": 64} | changes
    with pytest.raises(UsageError, match=message):
        run(QuantizeConfig(models / "chat", tmp_path / "out", **values))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_a_first_token(models, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(models / "plain")
    for name in ("bos_id", "eos_id"):
        monkeypatch.setattr(tokenizer, name, None)
    with pytest.raises(UsageError, match=r"could begin from.*--data-path"):
        find_opening(tokenizer, 64)
