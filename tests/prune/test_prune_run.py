"""`xinslm prune` from folder to folder: exact where nothing is lost, readable by transformers,
taken by distill.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)
from workshop import make_workshop

from small_models import (
    FAMILIES,
    make_config,
    save_dataset,
    save_random_model,
    save_tokenizer,
    tree_hash,
)
from xinslm.cli.main import main
from xinslm.errors import UsageError, XinslmError
from xinslm.model.files import load_model, open_model
from xinslm.prune.run import run
from xinslm.tokenizer import BPETokenizer
from xinslm.tokenizer.load import load_tokenizer

IDS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(ids))


def test_the_teachers_own_shape_gives_the_teacher(workshop, tmp_path) -> None:
    result = run(
        workshop.config(
            tmp_path / "s", num_layers=3, hidden_size=64, num_heads=4, intermediate_size=96
        )
    )
    assert torch.equal(logits(load_model(tmp_path / "s")), logits(workshop.model))
    assert [name for name, _, _ in result.losses] == ["teacher"]


def test_fewer_layers_uncompensated_are_the_transformers_model_without_the_others(
    workshop, tmp_path
) -> None:
    run(workshop.config(tmp_path / "s", num_layers=2, compensate=False))
    kept = json.loads((tmp_path / "s" / "manifest.json").read_text())["layers"]
    theirs = AutoModelForCausalLM.from_pretrained(workshop.teacher)
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[layer] for layer in kept)
    theirs.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = theirs(IDS, use_cache=False).logits
    torch.testing.assert_close(logits(load_model(tmp_path / "s")), expected, rtol=1e-4, atol=1e-4)


SHAPES = {
    "tied": {
        "num_layers": 2,
        "hidden_size": 48,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 64,
    },
    "made untied": {"hidden_size": 48, "tie_word_embeddings": False},
    "untied at full width": {"num_layers": 1, "tie_word_embeddings": False, "layers": "influence"},
    "heads merged": {"num_kv_heads": 1},
    "heads that divide the student's width alone": {
        "num_heads": 3,
        "num_kv_heads": 1,
        "hidden_size": 48,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_written_loads_in_transformers_with_the_same_logits(
    workshop, tmp_path, shape
) -> None:
    result = run(workshop.config(tmp_path / "s", **shape))
    ours, theirs = load_model(tmp_path / "s"), AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(ours), rtol=1e-4, atol=1e-4)
    config = ours.config
    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    for name, value in shape.items():
        if name != "layers":
            assert getattr(config, names.get(name, name)) == value
    assert (
        config.num_parameters == sum(p.numel() for p in theirs.parameters()) == result.losses[-1][1]
    )
    text = "Zwölf große Boxkämpfer"
    assert AutoTokenizer.from_pretrained(tmp_path / "s").encode(text) == load_tokenizer(
        workshop.teacher
    ).encode(text)


def test_mistral_teachers_keep_their_window(tmp_path) -> None:
    model = save_random_model(tmp_path / "teacher", sliding_window=8, num_hidden_layers=3)
    tokenizer = load_tokenizer(tmp_path / "teacher")
    tokenizer.save(save_dataset(tmp_path / "data", tokenizer.fingerprint()) / "tokenizer")
    line = (
        f"prune {tmp_path / 'teacher'} --data-path {tmp_path / 'data'} -o {tmp_path / 's'} "
        "--num-layers 2 --device cpu"
    )
    assert main([*line.split(), "--max-seq-length", "64", "--no-compensate"]) == 0
    student = load_model(tmp_path / "s")
    assert student.config.sliding_window == model.config.sliding_window == 8
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(student), rtol=1e-4, atol=1e-4)


def test_manifest_and_table_say_what_was_done(workshop, tmp_path) -> None:
    heard: list = []
    result = run(workshop.config(tmp_path / "s", **SHAPES["tied"]), heard.append)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (
        manifest["kind"] == "model"
        and manifest["inputs"]["teacher"] == open_model(workshop.teacher).fingerprint
    )
    assert len(manifest["influence"]) == 3 and len(manifest["layers"]) == 2
    assert [len(layer) for layer in manifest["neurons"]] == [64, 64]
    assert all(len(group[1]) == 2 for layer in manifest["heads"] for group in layer)
    assert manifest["losses"] == [list(row) for row in result.losses]
    names = [name for name, _, _ in result.losses]
    assert names[0] == "teacher" and names[-1] == "random weights of that shape" and len(names) >= 6
    assert [p for _, p, _ in result.losses] == sorted(
        (p for _, p, _ in result.losses), reverse=True
    )
    assert all(name in result.describe() for name in names) and {p.note for p in heard} >= set(
        names
    )


def test_the_same_seed_gives_the_same_student(workshop, tmp_path) -> None:
    for name in ("a", "b"):
        run(workshop.config(tmp_path / name, **SHAPES["tied"]))
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")


def test_losses_are_those_of_the_models(workshop, tmp_path) -> None:
    """The figures of teacher and student, computed anew from the folders, token by token, by
    transformers.
    """
    result = run(
        workshop.config(tmp_path / "s", num_layers=2, compensate=False, max_eval_samples=1000)
    )
    data = workshop.data / "validation"
    import numpy as np

    tokens = np.fromfile(data / "tokens.bin", "<u2").astype(np.int64)
    offsets = np.load(data / "documents.npy")
    for folder, row in ((workshop.teacher, 0), (tmp_path / "s", 1)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        total = count = 0
        for begin, end in itertools.pairwise(offsets):
            for at in range(begin, end - 1, 32):  # documents are cut at the row's length
                ids = torch.from_numpy(tokens[at : min(at + 33, end)])[None]
                with torch.no_grad():
                    out = model(ids[:, :-1]).logits[0].log_softmax(-1)
                total -= float(out.gather(1, ids[0, 1:, None]).sum())
                count += ids.shape[1] - 1
        assert result.losses[row][2] == pytest.approx(total / count, rel=1e-4)


def test_bfloat16_products_make_nearly_the_same_student(workshop, tmp_path) -> None:
    shape = {"num_layers": 2, "intermediate_size": 64, "layers": "influence"}
    exact = run(workshop.config(tmp_path / "exact", **shape))
    fast = run(workshop.config(tmp_path / "fast", compute_dtype="bfloat16", **shape))
    assert [name for name, _, _ in fast.losses] == [name for name, _, _ in exact.losses]
    pairs = list(zip(fast.losses, exact.losses, strict=True))
    assert all(abs(ours - theirs) < 0.02 for (_, _, ours), (_, _, theirs) in pairs)
    assert any(ours != theirs for (_, _, ours), (_, _, theirs) in pairs)
    weights = load_model(tmp_path / "fast").state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_a_nested_vocabulary_is_cut_out(workshop, tmp_path) -> None:
    teacher = load_tokenizer(workshop.teacher)
    student = BPETokenizer.prefix_of(teacher, 290)
    student.save(save_dataset(tmp_path / "data", student.fingerprint(), 290) / "tokenizer")
    result = run(workshop.config(tmp_path / "s", data_path=tmp_path / "data"))
    made = load_model(tmp_path / "s")
    assert made.config.vocab_size == 290 and made.config.eos_token_id == student.eos_id
    assert load_tokenizer(tmp_path / "s").fingerprint() == student.fingerprint()
    rows = [
        next(t for t in range(320) if teacher.token_bytes(t) == student.token_bytes(s))
        for s in range(285)
    ]
    weights = workshop.model.model.embed_tokens.weight
    assert torch.equal(made.model.embed_tokens.weight[:285], weights[rows])
    (note,) = result.notes
    assert "no better than token frequencies" in note, "the teacher is random"
    assert result.losses[0][0] == "teacher, vocabulary cut to 290"


def test_distill_starts_from_it(workshop, tmp_path) -> None:
    run(workshop.config(tmp_path / "s", **SHAPES["tied"]))
    line = (
        f"distill --data-path {workshop.data} --teacher {workshop.teacher} --init-from "
        f"{tmp_path / 's'} "
        f"-o {tmp_path / 'r'} --max-seq-length 32 --batch-size 2 --max-steps 1 --learning-rate "
        "1e-12 --device cpu"
    )
    assert main(line.split()) == 0
    trained = load_model(tmp_path / "r" / "checkpoints" / "last")
    torch.testing.assert_close(
        logits(trained), logits(load_model(tmp_path / "s")), rtol=1e-4, atol=1e-4
    )


def test_a_dataset_without_validation_is_reported_on_search_rows(workshop, tmp_path) -> None:
    import shutil

    data = Path(shutil.copytree(workshop.data, tmp_path / "data"))
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    result = run(workshop.config(tmp_path / "s", data_path=data, num_layers=2))
    assert "no validation split" in result.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"num_hidden_layers is 4, but the teacher has only 3"),
        ({"hidden_size": 96}, r"hidden_size is 96, but the teacher has only 64"),
        ({"intermediate_size": 97}, "cannot be larger"),
        ({"num_heads": 8}, "num_attention_heads is 8, but the teacher has only 4"),
        ({"num_heads": 3, "num_kv_heads": 2, "hidden_size": 48}, "must divide"),
        ({"hidden_size": 50}, "multiple of num_attention_heads"),
        ({"head_dim": 16}, r"head_dim is 16, but must stay the teacher's 32.*rotary"),
        ({"max_seq_length": 500}, "the teacher reads at most 128"),
        ({"num_layers": 0}, "num_layers is 0, but must be at least 1"),
        ({"teacher": "nowhere/at/all"}, "there is no model at"),
        ({"teacher": "model.gguf"}, "there is no file model.gguf"),
    ],
)
def test_what_cannot_be_cut_is_refused(workshop, tmp_path, changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        run(workshop.config(tmp_path / "s", **changes))
    assert not list(tmp_path.iterdir())


def test_an_untied_teacher_has_no_tied_student(untied, tmp_path) -> None:
    with pytest.raises(UsageError, match="one matrix cannot start as both"):
        run(untied.config(tmp_path / "s", tie_word_embeddings=True))


def test_other_architectures_are_refused_by_name(workshop, tmp_path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = Gemma3TextConfig(vocab_size=320, num_attention_heads=4, head_dim=16, **shape)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    save_tokenizer(tmp_path / "gemma")
    with pytest.raises(XinslmError, match=r"'gemma3_text'.*no counterpart for the parts of others"):
        run(workshop.config(tmp_path / "s", teacher=str(tmp_path / "gemma")))
    assert not (tmp_path / "s").exists()


FAMILY_SHAPES = {
    "qwen2": {"num_layers": 2, "hidden_size": 40, "num_heads": 3, "num_kv_heads": 1},
    "qwen3": {"num_layers": 2, "hidden_size": 40, "num_heads": 2, "num_kv_heads": 1},
    "llama with biases": {"num_layers": 2, "hidden_size": 48, "num_heads": 2, "num_kv_heads": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("compensate", [False, True])
def test_a_student_is_of_its_teachers_family(tmp_path, name, compensate) -> None:
    """Cut in every direction; what stock transformers reads gives the same logits."""
    made = make_workshop(tmp_path, num_hidden_layers=3, **FAMILIES[name])
    shape = {**FAMILY_SHAPES[name], "intermediate_size": 64, "compensate": compensate}
    result = run(made.config(tmp_path / "s", **shape))
    student = load_model(tmp_path / "s")
    assert student.config.model_type == made.model.config.model_type
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(student), rtol=1e-4, atol=1e-4)
    assert result.losses[-1][1] == sum(p.numel() for p in theirs.parameters())


def test_normalized_heads_are_not_merged(tmp_path) -> None:
    made = make_workshop(tmp_path, **FAMILIES["qwen3"])
    with pytest.raises(UsageError, match=r"norm does not commute.*at most 2 query heads"):
        run(made.config(tmp_path / "s", num_kv_heads=1))


def test_a_tokenizer_that_is_not_nested_is_refused(workshop, tmp_path) -> None:
    other = BPETokenizer(vocab_size=300)
    other.train(["an entirely different text of quite other words, once more and again"] * 3)
    other.save(save_dataset(tmp_path / "data", other.fingerprint(), 300) / "tokenizer")
    with pytest.raises(UsageError, match="neither the teacher's nor nested in it"):
        run(workshop.config(tmp_path / "s", data_path=tmp_path / "data"))


def test_a_teacher_with_broken_weights_is_refused(workshop, tmp_path) -> None:
    from xinslm.model.files import save_model
    from xinslm.model.transformer import Transformer

    broken = Transformer(make_config(num_hidden_layers=2))
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    save_model(broken, tmp_path / "t")
    save_tokenizer(tmp_path / "t")
    with pytest.raises(
        XinslmError, match=r"the loss of .* is nan on validation text: its weights are damaged"
    ):
        run(workshop.config(tmp_path / "s", teacher=str(tmp_path / "t"), num_layers=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]


def test_force_replaces_its_own_and_nothing_else(workshop, tmp_path) -> None:
    config = workshop.config(tmp_path / "s", num_layers=2, compensate=False)
    run(config)
    with pytest.raises(UsageError, match="already holds something"):
        run(config)
    run(workshop.config(tmp_path / "s", num_layers=1, compensate=False, force=True))
    assert load_model(tmp_path / "s").config.num_hidden_layers == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="no xinslm command made"):
        run(workshop.config(tmp_path / "mine", force=True))
    with pytest.raises(UsageError, match="which is read"):
        run(workshop.config(workshop.teacher, force=True))
    assert (workshop.teacher / "model.safetensors").is_file()


@pytest.mark.parametrize("asked", [(16, 4), (1_000, 1_000)])
def test_choices_are_made_on_rows_that_nothing_was_fitted_to(workshop, tmp_path, asked) -> None:
    from xinslm.data.dataset import open_dataset
    from xinslm.prune.run import _Text

    config = workshop.config(
        tmp_path / "s",
        num_calibration_samples=asked[0],
        num_search_samples=asked[1],
        max_eval_samples=1_000,
    )
    text = _Text.read(
        config, open_dataset(workshop.data), workshop.model.config, torch.device("cpu")
    )
    fitted, chosen, held_out = (
        {tuple(row) for passage in part for row in passage.ids.tolist()}
        for part in (text.calibration, text.search, text.validation)
    )
    assert fitted and chosen and held_out
    assert not fitted & chosen and not held_out & (fitted | chosen)


def test_a_fit_that_is_worse_is_dropped(workshop, tmp_path, monkeypatch) -> None:
    from xinslm.prune import run as stage

    def worse(teacher, cut, *rest):
        weights = {name: 3 * tensor for name, tensor in cut.plain.state_dict().items()}
        return stage.assemble(cut.plain.config, weights)

    monkeypatch.setattr(stage, "compensate", worse)
    result = run(workshop.config(tmp_path / "a", num_layers=2, layers="influence"))
    run(workshop.config(tmp_path / "b", num_layers=2, layers="influence", compensate=False))
    assert "the least-squares fit was dropped" in result.describe()
    assert torch.equal(logits(load_model(tmp_path / "a")), logits(load_model(tmp_path / "b")))


def test_a_real_teachers_student_has_part_of_its_skill(shared_data, tmp_path) -> None:
    """Half of stories5M: each figure far from a random model's, and the fit better than the plain
    cut.
    """
    import gzip

    from xinslm.data import prepare
    from xinslm.data.config import PrepareConfig
    from xinslm.prune.config import PruneConfig

    for name in ("train", "valid"):
        with gzip.open(shared_data / "text" / f"stories_{name}.jsonl.gz", "rt") as lines:
            (tmp_path / f"{name}.jsonl").write_text("".join(itertools.islice(lines, 60)))
    teacher = shared_data / "models" / "stories5M"
    prepare.run(
        PrepareConfig(
            data_path=(str(tmp_path / "train.jsonl"),),
            validation_path=(str(tmp_path / "valid.jsonl"),),
            tokenizer_path=teacher,
            output_dir=tmp_path / "data",
        )
    )
    result = run(
        PruneConfig(
            teacher=str(teacher),
            data_path=tmp_path / "data",
            output_dir=tmp_path / "s",
            max_seq_length=128,
            device="cpu",
            num_layers=4,
            hidden_size=192,
            num_kv_heads=2,
            intermediate_size=512,
            layers="influence",
            num_calibration_samples=30,
            num_search_samples=4,
            max_eval_samples=6,
        )
    )
    losses = {name.partition(" ")[0]: value for name, _, value in result.losses}
    assert losses["teacher"] < losses["fitted"] < losses["width"] - 0.05
    assert losses["width"] < 4.2 < 8 < losses["random"]


def test_cutting_layers_alone_measures_influence_on_a_part_of_the_text(
    workshop, tmp_path, monkeypatch
) -> None:
    from xinslm.prune import run as module

    read = []
    real = module.measure

    def counted(model, passages, *args, **kwargs):
        read.append(sum(passage.ids.numel() for passage in passages))
        return real(model, passages, *args, **kwargs)

    monkeypatch.setattr(module, "measure", counted)
    monkeypatch.setattr(module, "_TOKENS_FOR_INFLUENCE", 1)
    monkeypatch.setattr("xinslm.prune.measure._TOKENS_A_PASSAGE", 1)
    run(workshop.config(tmp_path / "layers", num_layers=1))
    run(workshop.config(tmp_path / "neurons", num_layers=1, intermediate_size=8))
    assert 0 < read[0] < read[1]
