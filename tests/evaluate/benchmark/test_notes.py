"""What a reader is told about scores: equal choices, cut prompts, items in the training text."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from small_models import save_random_model, save_tokenizer
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.evaluate.benchmark.config import BenchmarkConfig
from xinslm.evaluate.benchmark.notes import notes
from xinslm.evaluate.benchmark.overlap import training_folders
from xinslm.evaluate.benchmark.run import run
from xinslm.evaluate.benchmark.written import Written, write_and_score
from xinslm.evaluate.harness.run import Item, TaskScore
from xinslm.files import write_manifest

pytest.importorskip("lm_eval")

CONFIG = BenchmarkConfig(model=Path("absent"), tasks=("own",))


def score(*items: Item, **changes) -> TaskScore:
    whole = TaskScore("own", "", 0, len(items), {}, list(items), 1.0, 0, {"own": len(items)})
    return replace(whole, **changes)


def choice(log_likelihoods: list[float], right: int, **changes) -> Item:
    acc = float(log_likelihoods.index(max(log_likelihoods)) == right)
    return Item("own", 0, {"acc": acc} | changes, log_likelihoods, right, 1, choices=list("abc"))


def test_only_ties_of_the_right_choice_are_told():
    plain = [choice([-1.0, -2.0, -2.0], 0), choice([-1.0, -1.0, -2.0], 2)]
    assert notes(CONFIG, {"own": score(*plain)}) == []
    shares = choice([-1.0, -1.0, -2.0], 0, acc=0.4)  # such as TruthfulQA mc2
    tied = [choice([-1.0, -1.0, -2.0], 0), choice([-3.0, -1.0, -1.0], 2)]
    (note,) = notes(CONFIG, {"own": score(*plain, shares, *tied)})
    assert "own: in 2 of 5 items another choice is exactly as likely" in note


def test_a_model_without_an_opinion(tmp_path):
    """All tokens are equally likely: mc1 is 1 by the order of the choices, which is told; mc2 is
    the share of true choices, though the probability of each is below the smallest number.
    """
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    save_random_model(model, max_position_embeddings=1024)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data").mkdir()
    texts = [letter * 150 for letter in "bcdf"]  # as many tokens: exp(-150 log 320) is 0
    row = {
        "question": "Why?",
        "mc1_targets": {text: int(text == texts[0]) for text in texts},
        "mc2_targets": {text: int(text in texts[:2]) for text in texts},
    }
    (tmp_path / "data" / "truthfulqa_mc_817.json").write_text(json.dumps([row]))
    config = BenchmarkConfig(
        model=model,
        tasks=("truthfulqa_mc1", "truthfulqa_mc2"),
        data=tmp_path / "data",
        device="cpu",
    )
    result = run(config)
    first, second = result.tasks
    assert first["value"] == 1.0 and second["value"] == pytest.approx(0.5)
    assert [note for note in result.notes if "truthfulqa_mc1: in 1 of 1 items another" in note]
    assert not [note for note in result.notes if "mc2" in note]


def test_prompts_that_were_cut_are_told_of_both_models():
    whole, cut = {"own": score(choice([-1.0, -2.0], 0))}, {}
    cut["own"] = replace(whole["own"], truncated=3)
    assert notes(CONFIG, whole, whole) == []
    assert "own: 3 requests lost their beginning" in notes(CONFIG, cut, whole)[0]
    (note,) = notes(CONFIG, whole, cut)
    assert "3 requests" in note and "the other model's context" in note


def test_prompts_of_written_answers_that_were_cut_are_counted(tmp_path):
    from xinslm.evaluate.harness.model import XinslmLM

    save_random_model(tmp_path)
    model = XinslmLM(str(tmp_path), device="cpu", max_length=40)
    prompts = ["x " * 100, "short", "y " * 90]
    task = Written("own", prompts, lambda numbers, answers: [{"score": 1.0}] * len(numbers))
    assert write_and_score(model, task, 4, seed=0).truncated == 2


def test_written_answers_within_a_time_limit_are_not_the_first_ones():
    model = SimpleNamespace(generate_until=lambda requests: [""] * len(requests), truncated=[])
    task = Written("own", ["?"] * 40, lambda numbers, _: [{"score": 1.0}] * len(numbers))
    found = [
        [item.index for item in write_and_score(model, task, 4, seed, 1e-9).items]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert 0 < len(found[0]) < 40
    assert found[0] != list(range(len(found[0])))


def test_items_in_the_raw_text_of_a_run_are_told(tmp_path):
    """Raw text is prepared into the run folder, and config.yaml names the text."""
    question = " ".join(f"word{i}" for i in range(14))
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(f"Before. {question} and after.")
    other = tmp_path / "other.txt"
    other.write_text("Something else.")
    save_tokenizer(tmp_path / "tokenizer")
    prepare.run(
        PrepareConfig(
            data_path=(str(text),),
            validation_path=(str(other),),
            tokenizer_path=tmp_path / "tokenizer",
            output_dir=folder / "data",
        )
    )
    (folder / "config.yaml").write_text(yaml.safe_dump({"data_path": str(text)}))
    items = [Item("own", n, {}, prompt=f"Examples.\n\n{q}") for n, q in enumerate(["?", question])]
    (note,) = notes(replace(CONFIG, model=folder), {"own": score(*items)})
    assert "own: 1 of 2 items share 13 words in a row" in note and "may be memory" in note


def test_datasets_of_all_models_that_a_model_was_made_from(tmp_path):
    def dataset(name):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, "dataset", 1, {}, {})
        return tmp_path / name

    def made(name, config, inputs):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, "model", 1, config, inputs)
        return str(tmp_path / name)

    def trained(name, **settings):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    names = ("first", "cut on", "second", "mixed", "prompts")
    first, cut_on, second, mixed, prompts = map(dataset, names)
    teacher = trained("teacher", data_path=str(first))
    pruned = made("pruned", {"teacher": teacher, "data_path": str(cut_on)}, {"dataset": "x"})
    student = trained("student", data_path=str(second), init_from=pruned)
    last = trained("last", student=student, prompts=str(prompts), mix_data=str(mixed))
    exported = made("exported", {"model": last}, {})
    assert training_folders(Path(exported)) == [mixed, prompts, second, cut_on, first]
    assert training_folders(tmp_path / "teacher" / "checkpoints" / "best") == [first]
