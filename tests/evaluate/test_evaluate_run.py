"""The stage: raw files and datasets, the model's tokenizer and another's, chats, other
architectures, bad requests.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from small_models import save_random_model, save_tokenizer
from xinslm.cli.main import main
from xinslm.data.config import PrepareConfig
from xinslm.data.prepare import run as prepare
from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate import scorers
from xinslm.evaluate.config import EvaluateConfig
from xinslm.evaluate.run import Result, run
from xinslm.machine import OtherLoad
from xinslm.model.files import load_model
from xinslm.progress import Progress
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize

TEXTS = [
    "The quick brown fox.",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 😀" * 2,
    "a  b\n\n c",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def make_dataset(folder: Path, text: Path, tokenizer: Path, **changes) -> Path:
    """All documents in the validation split, in order."""
    train = folder.parent / f"{folder.name}.txt"
    train.write_text("other text")
    prepare(
        PrepareConfig(
            data_path=(str(train),),
            validation_path=(str(text),),
            tokenizer_path=tokenizer,
            output_dir=folder,
            **changes,
        )
    )
    return folder


def evaluate(model: Path, data: Path, **changes):
    return run(EvaluateConfig(model=model, data_path=(str(data),), device="cpu", **changes))


def figures(result: Result) -> Result:
    """Without what belongs to the folder, the time and the machine."""
    return replace(
        result, data="", tokens_per_second=0, other_load=None, unigram_bits_per_byte=None, date=""
    )


def test_figures_equal_transformers(model: Path, text: Path) -> None:
    reference, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    nats, tokens = 0.0, 0
    for document in TEXTS:
        ids = torch.tensor([[0, *tokenizer(document, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            nats += reference(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    result = evaluate(model, text)
    num_bytes = sum(len(document.encode()) for document in TEXTS)
    assert (result.documents, result.tokens, result.bytes) == (3, tokens, num_bytes)
    assert result.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result.parameters == sum(weight.numel() for weight in reference.parameters())
    assert result.file_bytes == (model / "model.safetensors").stat().st_size
    assert f"{result.bits_per_byte:.4f}" in result.describe()


@pytest.mark.parametrize("document_end", ["eos", "bos", "none"])
def test_a_dataset_gives_the_figures_of_its_text(
    model: Path, text: Path, tmp_path: Path, document_end
) -> None:
    dataset = make_dataset(tmp_path / "data", text, model, document_end=document_end)
    expected, found = evaluate(model, text), evaluate(model, dataset)
    assert figures(found) == figures(expected)


def test_another_tokenizers_dataset_is_turned_back_into_text(
    model: Path, text: Path, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "tokenizer", vocab_size=290)
    dataset = make_dataset(tmp_path / "data", text, tmp_path / "tokenizer")
    expected, found = evaluate(model, text), evaluate(model, dataset)
    assert figures(found) == figures(expected)


def test_of_chats_the_answers_alone_count(model: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    answers = ["blue", "I like the dog"]
    rows = [
        {"prompt": f"question {i} about foxes", "response": answer}
        for i, answer in enumerate(answers)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = make_dataset(tmp_path / "data", chats, model)
    raw, stored = evaluate(model, chats), evaluate(model, dataset)
    assert figures(raw) == figures(stored)
    assert raw.bytes == sum(map(len, answers))
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model),
    )
    nats, tokens = 0.0, 0
    for row, answer in zip(rows, answers, strict=True):
        prompt = f"<|user|>\n{row['prompt']}<|end|>\n<|assistant|>\n"
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        after = tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = reference(torch.tensor([before + after])).logits[0].log_softmax(-1)
        nats -= sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after))
        tokens += len(after)
    assert raw.tokens == tokens
    assert raw.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    save_random_model(tmp_path / "other", vocabulary=290, vocab_size=290)
    with pytest.raises(UsageError, match="is a chat that was encoded with another tokenizer"):
        evaluate(tmp_path / "other", dataset)


def test_any_causal_model_of_transformers(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=320, n_positions=40)
    )
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3)
    other.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text(TEXTS[0])
    ids = torch.tensor([[0, *tokenizer(TEXTS[0], add_special_tokens=False).input_ids]])
    result = evaluate(tmp_path, short)
    assert result.nats_per_token == pytest.approx(
        other.eval()(ids, labels=ids).loss.item(), rel=1e-5
    )
    assert result.parameters == sum(weight.numel() for weight in other.parameters())
    assert evaluate(tmp_path, text).tokens > 40, "longer documents are windowed"


def test_a_quantized_folder_says_so(model: Path, text: Path, tmp_path: Path) -> None:
    from xinslm.quantize.config import QuantizeConfig
    from xinslm.quantize.run import run as quantize

    quantize(QuantizeConfig(model=model, output_dir=tmp_path / "q", method="rtn"))
    exact, found = evaluate(model, text), evaluate(tmp_path / "q", text)
    assert found.kind == "quantized" and exact.kind == "model"
    assert found.file_bytes < 0.5 * exact.file_bytes and found.parameters == exact.parameters
    assert found.bits_per_byte != exact.bits_per_byte
    assert found.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=0.5)


def test_the_row_goes_into_the_run_folder_once_a_name(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    for name, count in (("student", 1), ("student", 2), ("teacher", 3)):
        result = evaluate(model, text, run=tmp_path, name=name, max_documents=count)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["name"], row["documents"]) for row in rows] == [("student", 2), ("teacher", 3)]
    assert rows[1] == result.row()
    (tmp_path / "evaluation.json").write_text('{"rows": [')
    with pytest.raises(XinslmError, match=r"evaluation\.json:1: not valid JSON"):
        evaluate(model, text, run=tmp_path)


def test_progress_reaches_its_total(model: Path, text: Path) -> None:
    seen: list[Progress] = []
    run(
        EvaluateConfig(
            model=model, data_path=(str(text),), device="cpu", batch_tokens=50, max_seq_length=20
        ),
        seen.append,
    )
    last = seen[-1]
    assert last.done == last.total and last.values["tokens/s"] > 0


def test_more_documents_than_there_are(model: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=r"--max-documents 4: .* has only 3 documents"):
        evaluate(model, text, max_documents=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_documents": 0}, "max_documents is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"max_seq_length": 1000}, "--max-seq-length 1000: .* reads at most 128"),
        ({"run": Path("absent")}, "--run absent is not a run folder: it does not exist"),
    ],
)
def test_bad_requests(model: Path, text: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(model, text, **changes)


def test_missing_things_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at"):
        evaluate(tmp_path / "a" / "b" / "c", text)
    with pytest.raises(UsageError, match="does not exist"):
        evaluate(model, tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="give one dataset folder"):
        dataset = make_dataset(tmp_path / "data", text, model)
        run(EvaluateConfig(model=model, data_path=(str(dataset), str(text)), device="cpu"))


@pytest.mark.parametrize("value", ["64", None, True, 64.0])
def test_a_config_with_a_value_of_another_type_is_named(
    model: Path, text: Path, tmp_path: Path, value
) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": value}))
    with pytest.raises(
        XinslmError, match=r"config\.json: hidden_size is .*, but must be an integer"
    ):
        evaluate(tmp_path, text)
    path.write_text("[]")
    with pytest.raises(XinslmError, match=r"config\.json: must hold an object"):
        evaluate(tmp_path, text)


@pytest.mark.parametrize("load", [None, 0.02, 0.4])
def test_the_speed_on_a_shared_machine_is_marked(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, load: float | None
) -> None:
    monkeypatch.setattr(OtherLoad, "share", lambda self: load)
    result = evaluate(model, text)
    assert result.row()["other_load"] == load
    assert ("while other processes took 40% of the CPU time" in result.describe()) == (load == 0.4)


def test_the_row_says_what_trained_the_model(world, text: Path) -> None:
    run_folder = world.teacher.parent.parent
    for folder in (world.teacher, run_folder):
        row = evaluate(folder, world.data).row()
        assert row["trained_by"] == "pretrain"
        assert "torch" in row["machine"] and row["date"].startswith("20")
        assert row["unigram_bits_per_byte"] > 0


def test_raw_files_have_no_token_frequencies(model: Path, text: Path) -> None:
    row = evaluate(model, text).row()
    assert row["unigram_bits_per_byte"] is None and row["trained_by"] is None


def test_the_load_is_measured_from_loading_the_model_on(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring a small model takes less time than the system's CPU clock can tell."""
    calls = []
    start, load = OtherLoad.__init__, scorers.load_scorer
    monkeypatch.setattr(OtherLoad, "__init__", lambda self: (calls.append("start"), start(self))[1])
    monkeypatch.setattr(
        scorers, "load_scorer", lambda *a, **k: (calls.append("load"), load(*a, **k))[1]
    )
    evaluate(model, text)
    assert calls == ["start", "load"]


def test_int8_activations_are_measured_under_a_name_of_their_own(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the rolling log-likelihood of the model that `load_model` rounds the inputs of."""
    quantize(QuantizeConfig(model, tmp_path / "q4", method="rtn"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    words = ["evaluate", str(tmp_path / "q4"), "--data-path", str(text), "--device", "cpu"]
    words += ["--run", str(tmp_path / "run")]
    assert main(words) == 0 and main([*words, "--activations", "int8"]) == 0
    assert "int8 in 15 of 15 linear layers" in capsys.readouterr().out
    table = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    plain, rounded = table["rows"]
    assert (plain["name"], rounded["name"]) == ("q4", "q4, int8 activations")
    assert plain["activations"] == "float"
    reference = load_model(tmp_path / "q4", activations="int8")
    tokenizer, nats = AutoTokenizer.from_pretrained(model), 0.0
    for document in TEXTS:
        ids = torch.tensor([[0, *tokenizer(document, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            log_probs = reference.logits(reference.hidden(ids[:, :-1]))[0].log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
    assert rounded["nats_per_token"] == pytest.approx(nats / rounded["tokens"], rel=1e-4)
    assert abs(rounded["nats_per_token"] - plain["nats_per_token"]) > 1e-3
    assert main(["evaluate", str(model), *words[2:6], "--activations", "int8"]) == 2
    assert "xinslm quantize" in capsys.readouterr().err
    assert main([*words, "--activations", "int8", "--dtype", "bfloat16"]) == 2
    assert "pass --dtype float32" in capsys.readouterr().err


def test_int8_activations_of_another_architecture_are_refused(text: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(XinslmError, match="gpt2"):
        evaluate(tmp_path, text, activations="int8")
