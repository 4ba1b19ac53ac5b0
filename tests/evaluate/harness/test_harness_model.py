"""Our model in lm-evaluation-harness against its own `HFLM`, in float64, on tasks made here."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_models import save_random_model
from xinslm.errors import UsageError, XinslmError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from xinslm.evaluate.harness.encoder import Encoder  # noqa: E402
from xinslm.evaluate.harness.local_data import local_datasets  # noqa: E402
from xinslm.evaluate.harness.model import XinslmLM  # noqa: E402
from xinslm.evaluate.harness.run import score_tasks  # noqa: E402
from xinslm.evaluate.harness.tasks import load_tasks  # noqa: E402
from xinslm.tokenizer.load import load_tokenizer  # noqa: E402

TEXT = "the quick brown fox naïve café 3.14 reasons jumps over lazy dogs while we learn"
WORDS = TEXT.split()
TASKS = ["hellaswag", "mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2"]


def sentence(seed: int, count: int = 6) -> str:
    return " ".join(WORDS[(seed * 7 + 3 * i + i * i) % len(WORDS)] for i in range(count))


def write(folder, name, rows) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(
        folder,
        "hellaswag_val.jsonl",
        [
            {
                "ind": i,
                "activity_label": "Cooking" if i % 2 else "How to",
                "ctx_a": sentence(i) + ".",
                "ctx_b": "he Then",
                "endings": [sentence(i + j, 3 + j) + " [x] é." for j in range(4)],
                "label": str(i % 4),
            }
            for i in range(12)
        ],
    )
    for split, count in (("test", 7), ("dev", 5)):
        rows = [
            {
                "subject": subject,
                "question": sentence(i, 9) + "?",
                "choices": [sentence(i + j, 2) for j in range(4)],
                "answer": i % 4,
            }
            for i in range(count)
            for subject in ("anatomy", "astronomy")
        ]
        write(folder, f"mmlu_{split}.jsonl", rows)
    questions = [
        {
            "question": sentence(i) + "?",
            "mc1_targets": {sentence(i + j, 4): int(j == 0) for j in range(3)},
            "mc2_targets": {sentence(i + j, 4): int(j < 2) for j in range(4)},
        }
        for i in range(5)
    ]
    (folder / "truthfulqa_mc_817.json").write_text(json.dumps(questions))
    write(
        folder,
        "gsm8k_test.jsonl",
        [{"question": sentence(i), "answer": f"so\n#### {i}"} for i in range(4)],
    )
    answers = {
        "best_answer": "we learn",
        "correct_answers": ["we learn", "lazy dogs"],
        "incorrect_answers": ["the fox", "quick"],
    }
    write(
        folder,
        "truthfulqa_generation_validation.jsonl",
        [{"question": f"{sentence(i)}?"} | answers for i in range(3)],
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, max_position_embeddings=512)
    return path


@pytest.fixture(scope="module")
def hf(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=3)


@pytest.fixture(scope="module")
def ours(folder):
    return XinslmLM(str(folder), device="cpu", dtype="float64")


def reference(hf, names, data, **options):
    """`lm_eval.simple_evaluate` with its own model on the same files."""
    with local_datasets(data):
        return lm_eval.simple_evaluate(
            model=hf,
            tasks=list(names),
            bootstrap_iters=0,
            task_manager=lm_eval.tasks.TaskManager(
                include_defaults=False, include_path=task_folders()
            ),
            **options,
        )


def task_folders() -> list[str]:
    root = lm_eval.__path__[0] + "/tasks/"
    return [root + name for name in ("hellaswag", "mmlu/default", "truthfulqa", "gsm8k")]


def test_items_and_metrics_equal_the_harness(hf, ours, data):
    expected = reference(hf, TASKS, data)
    scores = {s.name: s for s in score_tasks(ours, load_tasks(TASKS, data))}
    for name in TASKS:
        score = scores[name]
        rows = sorted(expected["samples"][name], key=lambda row: row["doc_id"])
        assert [item.index for item in score.items] == [row["doc_id"] for row in rows]
        for item, row in zip(score.items, rows, strict=True):
            values = [float(response[0][0]) for response in row["resps"]]
            assert item.log_likelihoods == pytest.approx(values, abs=1e-9)
        for metric, value in score.metrics.items():
            assert value == pytest.approx(expected["results"][name][f"{metric},none"], abs=1e-12)


def test_examples_equal_the_harness(hf, ours, data):
    expected = reference(hf, ["mmlu_anatomy"], data, num_fewshot=3)["samples"]["mmlu_anatomy"]
    loaded = load_tasks(["mmlu_anatomy:3", "truthfulqa_mc1:3"], data)
    score, other = score_tasks(ours, loaded)
    assert (score.num_fewshot, other.num_fewshot) == (3, 0)  # truthfulqa fixes its examples
    for item, row in zip(score.items, expected, strict=True):
        values = [float(response[0][0]) for response in row["resps"]]
        assert item.log_likelihoods == pytest.approx(values, abs=1e-9)


def test_generated_answers_equal_the_harness(hf, ours, data):
    expected = reference(hf, ["gsm8k"], data, num_fewshot=0)
    (score,) = score_tasks(ours, load_tasks(["gsm8k:0"], data))
    rows = sorted(expected["samples"]["gsm8k"], key=lambda row: (row["filter"], row["doc_id"]))
    texts = [row["resps"][0][0] for row in rows][: len(score.items)]
    assert [item.answers[0] for item in score.items] == texts
    assert set(score.metrics) == {
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
    }


def test_truthfulqa_gen_equals_the_harness(hf, ours, data):
    expected = reference(hf, ["truthfulqa_gen"], data)
    (score,) = score_tasks(ours, load_tasks(["truthfulqa_gen"], data))
    rows = sorted(expected["samples"]["truthfulqa_gen"], key=lambda row: row["doc_id"])
    assert [item.answers[0] for item in score.items] == [row["resps"][0][0] for row in rows]
    values = expected["results"]["truthfulqa_gen"]
    assert score.metrics == {
        name: pytest.approx(values[f"{name},none"], abs=1e-12) for name in score.metrics
    }
    assert len(score.metrics) == 12


def test_a_prompt_is_the_same_in_a_part_and_for_a_second_model(ours, data, tmp_path):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    examples = [{"question": sentence(i), "answer": f"so\n#### {i}"} for i in range(9, 29)]
    write(tmp_path, "gsm8k_train.jsonl", examples)
    names = ["hellaswag", "mmlu_anatomy:3", "gsm8k:2"]  # gsm8k draws its examples at random
    loaded = load_tasks(names, tmp_path)

    def prompts(loaded, chosen=None):
        return {
            (score.name, item.index): (item.prompt, item.choices)
            for score in score_tasks(ours, loaded, chosen=chosen)
            for item in score.items
        }

    everything = prompts(loaded)
    assert everything == prompts(loaded)
    keys = {name: [(name, 3), (name, 1)] for name in loaded.tasks}
    part = prompts(load_tasks(names, tmp_path), keys)
    assert sorted(part) == sorted(key for found in keys.values() for key in found)
    assert part == {key: everything[key] for key in part}


def test_tasks_that_are_named_alone_stay_apart(ours, data):
    loaded = load_tasks(["mmlu_anatomy:5", "mmlu_astronomy:5"], data)
    apart = score_tasks(ours, loaded)
    assert [len(score.items) for score in apart] == [7, 7]
    assert [score.strata for score in apart] == [{"mmlu_anatomy": 7}, {"mmlu_astronomy": 7}]


def test_a_time_limit_leaves_a_stratified_sample(ours, data):
    loaded = load_tasks(["hellaswag"], data)
    (score,) = score_tasks(ours, loaded, seconds=1e-3)
    assert 0 < len(score.items) < score.total == 12
    chosen = [item.index for item in score.items]
    assert chosen != list(range(len(chosen))), "not the first ones"
    assert chosen == [i.index for i in score_tasks(ours, loaded, seconds=1e-3)[0].items]
    assert chosen != [i.index for i in score_tasks(ours, loaded, 1e-3, seed=1)[0].items]
    (all_items,) = score_tasks(ours, loaded, seconds=600.0)
    assert len(all_items.items) == 12
    (everything,) = score_tasks(ours, loaded)
    assert all_items.metrics == pytest.approx(everything.metrics)


def test_rolling_text_begins_with_one_bos(hf, ours):
    text = "The quick brown fox doesn't jump over the lazy dog."
    requests = [SimpleNamespace(args=(text,)), SimpleNamespace(args=("a",))]
    hf.add_bos_token = False
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    hf.add_bos_token = None
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-9)


def test_an_empty_context_is_predicted_from_the_prefix(hf, ours):
    requests = [SimpleNamespace(args=("", " word")), SimpleNamespace(args=("a  ", "b"))]
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (reference_value, flag) in zip(
        ours.loglikelihood(requests), expected, strict=True
    ):
        assert value == pytest.approx(reference_value, abs=1e-9)
        assert greedy == flag


def test_a_model_with_nan_is_refused(folder, data, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = XinslmLM(str(tmp_path), device="cpu")
    with pytest.raises(XinslmError, match=r"truthfulqa_mc1 item \d+: the log-likelihood is nan"):
        score_tasks(model, load_tasks(["truthfulqa_mc1"], data))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["hellaswagg"], "no task 'hellaswagg' .* did you mean hellaswag"),
        (["hellaswag:3"], "needs 3 examples .* has 0"),
        (["winogrande"], "has no data of"),
        (["mine.yaml"], "there is no such file"),
        (["mmlu:five"], "number of examples after the colon"),
    ],
)
def test_what_cannot_be_loaded_is_named(data, names, message):
    with pytest.raises(UsageError, match=message):
        load_tasks(names, data)


def test_cut_prompts_are_counted(folder, data):
    model = XinslmLM(str(folder), device="cpu", max_length=64)
    (score,) = score_tasks(model, load_tasks(["mmlu_anatomy:5"], data))
    assert score.truncated == 28


def test_a_tokenizer_that_cuts_texts_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(XinslmError, match='"truncation" is set'):
        XinslmLM(str(tmp_path), device="cpu")


def test_the_tokenizer_is_that_of_auto_tokenizer(ours, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = ["The fox <|endoftext|> and", " two  spaces\n", "é漢", ""]
    require_equal(ours.tokenizer, theirs, texts)
    chat = [{"role": "user", "content": "the fox"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    written = ours.tokenizer.apply_chat_template(chat, **options)
    assert written == theirs.apply_chat_template(chat, **options)


def require_equal(ours, theirs, texts) -> None:
    """The same ids and texts from our encoder and transformers' tokenizer."""
    for option in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        found = ours(texts, **option)["input_ids"]
        assert found == theirs(texts, **option)["input_ids"]
        assert ours.encode(texts[0], **option) == found[0]
    for ids in found:
        for skip in (False, True):
            text = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == text
    assert ours.decode(3) == theirs.decode(3)
    names = ("bos_token_id", "eos_token_id", "chat_template")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]


def test_named_tokens_are_added_as_transformers_does(folder, tmp_path):
    """Tokens with a role that tokenizer.json does not list: one of the vocabulary, two new."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    known = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    config |= {"pad_token": "<new>", "unk_token": "<other>", "bos_token": known}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["the <other> fox<new>", f"<new><|endoftext|>{known}<other>"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    require_equal(Encoder(load_tokenizer(tmp_path)), theirs, texts)
