"""What goes with a GGUF: Modelfile, LM Studio's folder, model cards."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from chat_templates import DEFAULT_SYSTEM, MISTRAL, OWN, TEMPLATES, UNKNOWN
from huggingface_hub import ModelCard

from llama_cpp import LlamaCpp
from small_models import make_config, save_random_model
from xinslm.errors import UsageError
from xinslm.export import lmstudio
from xinslm.export.all import run as run_all
from xinslm.export.config import AllConfig, GgufConfig, HfConfig, MlxConfig
from xinslm.export.gguf import run
from xinslm.export.go_template import execute
from xinslm.export.modelfile import make_modelfile
from xinslm.export.ollama_template import collate
from xinslm.export.packed_folder import run_hf, run_mlx
from xinslm.files import write_manifest
from xinslm.model.files import open_model
from xinslm.model.source import ModelSource
from xinslm.quantize.config import QuantizeConfig
from xinslm.quantize.run import run as quantize
from xinslm.tokenizer.load import load_tokenizer

CHAT = [
    {"role": "user", "content": "The quick brown fox"},
    {"role": "assistant", "content": "doesn't jump"},
    {"role": "user", "content": "over 123 dogs."},
]


def read_modelfile(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Commands and parameters of a Modelfile, by the description in Ollama's documentation."""
    text = path.read_text(encoding="utf-8")
    assert all(c.isprintable() or c in "\n\t" for c in text), "Ollama drops other characters"
    commands = re.findall(
        r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:"""(.*?)"""|"([^"\n]*)"|(.*?))$',
        text,
        re.M | re.S,
    )
    found = [(name, a or b or c) for name, a, b, c in commands]
    single = {name: value for name, value in found if not name.startswith("PARAMETER")}
    return single, [(n.split()[1], v) for n, v in found if n.startswith("PARAMETER")]


@pytest.fixture
def model(tmp_path):
    save_random_model(tmp_path / "model")
    return tmp_path / "model"


def give(model: Path, template: str | None = None, **generation: object) -> None:
    """Put a chat template and settings of sampling into a model folder."""
    if template is not None:
        (model / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    (model / "generation_config.json").write_text(json.dumps(generation))


def add_start(model: Path) -> None:
    """Let the tokenizer begin each text with BOS."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("starts", [False, True])
def test_ollama_feeds_the_ids_of_the_chat_template(model, tmp_path, starts):
    """Ollama gives llama.cpp the text, which adds BOS if the GGUF says so."""
    give(model, "{{ bos_token }}" + OWN.replace("<|im_end|>", "<|end|>"))
    if starts:
        add_start(model)
    result = run(GgufConfig(model, tmp_path / "m.gguf", ollama=True))
    assert result.written == (tmp_path / "Modelfile",) and not result.notes
    commands, _ = read_modelfile(tmp_path / "Modelfile")
    assert commands["FROM"] == "./m.gguf"
    text = execute(commands["TEMPLATE"], collate(CHAT))
    ids, _ = load_tokenizer(model).apply_chat_template(CHAT, add_generation_prompt=True)
    with LlamaCpp(tmp_path / "m.gguf") as llama:
        assert llama.tokenize(text, add_special=True, parse_special=True) == ids
    assert ids[0] == 0 and ids.count(0) == 1 and text.startswith("<|begin|>") != starts


def test_sampling_stop_words_and_the_default_system_message(model, tmp_path):
    give(
        model,
        DEFAULT_SYSTEM.replace("<|im_end|>", "<|end|>"),
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        repetition_penalty=1.1,
        max_length=5,
    )
    run(GgufConfig(model, tmp_path / "m.gguf", ollama=True))
    commands, parameters = read_modelfile(tmp_path / "Modelfile")
    assert commands["SYSTEM"] == "You are a {{test}} robot."
    assert [p for p in parameters if p[0] != "stop"] == [
        ("num_ctx", "128"),
        ("temperature", "0.6"),
        ("top_k", "20"),
        ("top_p", "0.9"),
        ("repeat_penalty", "1.1"),
    ]
    stops = [value for name, value in parameters if name == "stop"]
    assert stops[0] == "<|end|>" and len(set(stops)) == len(stops)
    assert "<|im_start|>user" in stops


def test_greedy_models_stay_greedy(model, tmp_path):
    give(model, do_sample=False, temperature=0.9, top_k=5)
    run(GgufConfig(model, tmp_path / "m.gguf", ollama=True))
    _, parameters = read_modelfile(tmp_path / "Modelfile")
    assert ("temperature", "0") in parameters and ("temperature", "0.9") not in parameters


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_survive_the_modelfile(name, model, tmp_path):
    give(model, TEMPLATES[name])
    tokenizer, source = load_tokenizer(model), open_model(model)
    made = make_modelfile(tmp_path / "m.gguf", source, tokenizer, 128, False)
    assert made.has_template
    (tmp_path / "Modelfile").write_text(made.text, encoding="utf-8")
    commands, parameters = read_modelfile(tmp_path / "Modelfile")
    merged = [{"role": m["Role"], "content": m["Content"]} for m in collate(CHAT)["Messages"]]
    expected, _ = tokenizer.apply_chat_template(merged, add_generation_prompt=True)
    text = execute(commands["TEMPLATE"], collate(CHAT))
    assert tokenizer.encode(text, allowed_special=True) == expected
    assert all(value for _, value in parameters)


def test_what_has_no_go_form_gets_no_template_and_a_note(model, tmp_path):
    give(model, UNKNOWN["today's date"][0])
    result = run(GgufConfig(model, tmp_path / "m.gguf", ollama=True))
    commands, parameters = read_modelfile(tmp_path / "Modelfile")
    assert commands.keys() == {"FROM"} and ("stop", "<|end|>") in parameters
    assert "no TEMPLATE: " in result.describe() and "today's date" in result.describe()
    assert "# no TEMPLATE: " in (tmp_path / "Modelfile").read_text()


def test_notes_on_tools_and_system_messages(model, tmp_path):
    give(model, "{% if tools %}{{ tools | tojson }}{% endif %}" + MISTRAL)
    notes = " ".join(run(GgufConfig(model, tmp_path / "m.gguf", ollama=True)).notes)
    assert "no tools" in notes and "refuses system messages" in notes


def test_a_long_context_is_not_reserved_at_once(model):
    source = open_model(model)
    huge = make_config(max_position_embeddings=1 << 20, num_hidden_layers=64, head_dim=128)

    class Large(ModelSource):
        config, settings, path = huge, {}, source.path

        def __init__(self):
            pass

    made = make_modelfile(Path("m.gguf"), Large(), load_tokenizer(model), 1 << 20, False)
    length = int(re.search(r"num_ctx (\d+)", made.text)[1])
    cache = 2 * 64 * 2 * 128 * 2 * length  # keys and values, layers, heads, head_dim, float16
    assert 2**30 < cache <= 2**31 and "of the model's 1,048,576 tokens" in made.notes[-1]


def test_a_modelfile_is_replaced_only_if_it_is_ours(model, tmp_path):
    config = GgufConfig(model, tmp_path / "m.gguf", ollama=True)
    (tmp_path / "Modelfile").write_text("FROM llama3\n")
    for force in (False, True):
        with pytest.raises(UsageError, match="is not xinslm's"):
            run(GgufConfig(model, tmp_path / "m.gguf", ollama=True, force=force))
    assert not (tmp_path / "m.gguf").exists()
    (tmp_path / "Modelfile").unlink()
    run(config)
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(UsageError, match="add --force to replace it"):
        run(config)
    run(GgufConfig(model, tmp_path / "m.gguf", ollama=True, force=True))


def test_lm_studio_gets_a_link(model, tmp_path):
    models = tmp_path / "models"
    config = GgufConfig(model, tmp_path / "m.gguf", lmstudio="me/student", lmstudio_dir=models)
    result = run(config)
    there = models / "me" / "student" / "m.gguf"
    assert result.written == (there,) and os.path.samefile(there, tmp_path / "m.gguf")
    content = there.read_bytes()
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(UsageError, match="LM Studio already has"):
        run(config)
    assert there.read_bytes() == content and not (tmp_path / "m.gguf").exists()


def test_an_option_without_effect_is_an_error(model, tmp_path):
    with pytest.raises(UsageError, match="no effect without --lmstudio"):
        run(GgufConfig(model, tmp_path / "m.gguf", lmstudio_dir=tmp_path))


def test_lm_studio_gets_a_copy_on_another_disk(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    lmstudio.place(tmp_path / "m.gguf", tmp_path / "a" / "b" / "m.gguf")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", ["student", "a/b/c", "../x/y", "a/..", "/a/b", "a/ b"])
def test_names_that_lm_studio_does_not_have_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match="give PUBLISHER/NAME"):
        lmstudio.destination(tmp_path / "m.gguf", name, tmp_path)
    with pytest.raises(UsageError, match=r"end in \.gguf"):
        lmstudio.destination(tmp_path / "m.bin", "a/b", tmp_path)


def test_where_lm_studio_has_its_models(tmp_path):
    assert lmstudio.models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"
    old = tmp_path / ".cache" / "lm-studio"
    old.mkdir(parents=True)
    assert lmstudio.models_folder(tmp_path) == old / "models"
    (tmp_path / ".lmstudio").mkdir()
    assert lmstudio.models_folder(tmp_path) == tmp_path / ".lmstudio" / "models"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'elsewhere'}\n")
    assert lmstudio.models_folder(tmp_path) == tmp_path / "elsewhere" / "models"
    settings = tmp_path / "elsewhere" / "settings.json"
    settings.write_text("{broken")
    assert lmstudio.models_folder(tmp_path) == tmp_path / "elsewhere" / "models"
    settings.write_text(json.dumps({"downloadsFolder": str(tmp_path / "big")}))
    assert lmstudio.models_folder(tmp_path) == tmp_path / "big"


@pytest.fixture
def measured(tmp_path):
    """A run folder with a student of a known base, its 4-bit folder, and what was measured."""
    base, student = tmp_path / "base", tmp_path / "student"
    save_random_model(base, seed=1)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# Base\n")
    save_random_model(student)
    record = {
        "command": "distill",
        "settings": {"init_from": str(base), "data_path": "/home/me/data"},
        "inputs": {"init_from": open_model(base).fingerprint, "dataset": "ab" * 32},
        "total_steps": 1234,
        "date": "2026-11-28",
    }
    (student / "run.json").write_text(json.dumps(record))
    (student / "config.yaml").write_text("")
    row = {"name": "student, 4-bit", "data": "/home/me/held-out", "bits_per_byte": 0.65783}
    rows = [row | {"perplexity": 4.5678}]
    (student / "evaluation.json").write_text(json.dumps({"rows": rows}))
    task = {"task": "arc_easy", "num_fewshot": 0, "metric": "acc", "value": 0.43219, "items": 99}
    rows = [{"name": "4-bit", "tasks": [task]}]
    (student / "benchmark.json").write_text(json.dumps({"rows": rows}))
    quantize(QuantizeConfig(student, tmp_path / "q", method="rtn"))
    return tmp_path


def test_cards_say_what_the_files_say(measured):
    run_all(AllConfig(measured / "q", measured / "out", run=measured / "student"))
    for part in ("", "hf", "mlx"):
        text = (measured / "out" / part / "README.md").read_text(encoding="utf-8")
        card = ModelCard(text)
        assert card.data.license == "apache-2.0" and card.data.base_model == "org/base"
        assert "`distill`; from `base`; 1,234 steps" in text and f"dataset `{'ab' * 8}`" in text
        assert "`quantize`; of `student`; 4 and 8 bits, method rtn" in text
        assert "| student, 4-bit | held-out | 0.6578 | 4.568 |" in text
        assert "| 4-bit | arc_easy (0-shot) | acc | 0.4322 | 99 |" in text
        assert "/home/me" not in text and str(measured) not in text
        weights = "model.safetensors" if part else "model.gguf"
        size = (measured / "out" / part / weights).stat().st_size
        assert f"| {weights} | {size / 1e6:,.1f} MB, " in text


def test_a_card_names_only_what_is_known(measured):
    """The base at the recorded path is another model by now; nothing was measured."""
    save_random_model(measured / "base", seed=2)
    (measured / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    run_hf(HfConfig(measured / "q", measured / "hf"))
    card = ModelCard.load(measured / "hf" / "README.md")
    assert card.data.license is None and card.data.base_model is None
    assert "Measured" not in card.text and "perplexity" not in card.text


def test_a_path_that_is_gone_is_no_name_on_the_hub(measured, monkeypatch):
    shutil.copytree(measured / "student", measured / "other")
    record = json.loads((measured / "other" / "run.json").read_text())
    record["settings"]["init_from"] = "runs/base"
    (measured / "other" / "run.json").write_text(json.dumps(record))
    run_mlx(MlxConfig(measured / "other", measured / "mlx"))
    card = ModelCard.load(measured / "mlx" / "README.md")
    assert card.data.base_model is None and "`base`" in card.text
    assert "0.6578" in card.text, "a run folder holds what was measured"


def test_a_foreign_card_is_not_replaced(measured):
    (measured / "out").mkdir()
    (measured / "out" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"README\.md is not xinslm's"):
        run_all(AllConfig(measured / "q", measured / "out", force=True))
    assert (measured / "out" / "README.md").read_text() == "mine"


def test_export_all_leaves_other_files_alone(model, tmp_path):
    """They would be in the manifest, and be uploaded with it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".env").write_text("SECRET=1")
    with pytest.raises(UsageError, match=r"holds \.env, which is not part of such an export"):
        run_all(AllConfig(model, out, force=True))
    assert [path.name for path in out.iterdir()] == [".env"]


def test_a_folder_that_lm_studio_cannot_have_is_refused_before_the_export(model, tmp_path):
    (tmp_path / "file").write_text("")
    config = GgufConfig(
        model, tmp_path / "m.gguf", lmstudio="me/student", lmstudio_dir=tmp_path / "file"
    )
    with pytest.raises(UsageError, match="is a file"):
        run(config)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("command", ["distill", "prune"])
def test_a_student_has_its_teachers_license_only_if_it_was_cut_out_of_it(tmp_path, command):
    """A distilled one has none of the teacher's weights."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_random_model(teacher, seed=1)
    (teacher / "README.md").write_text("---\nlicense: llama3.2\nbase_model: org/base\n---\n")
    save_random_model(student)
    settings, inputs = {"teacher": str(teacher)}, {"teacher": open_model(teacher).fingerprint}
    if command == "prune":
        write_manifest(student, "model", 1, settings, inputs, losses={})
    else:
        record = {"command": command, "settings": settings, "inputs": inputs}
        (student / "run.json").write_text(json.dumps(record))
        (student / "config.yaml").write_text("")
    run_hf(HfConfig(student, tmp_path / "out"))
    card = ModelCard((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    known = ("llama3.2", "org/base") if command == "prune" else (None, None)
    assert (card.data.license, card.data.base_model) == known
    assert f"`{command}`; teacher `teacher`" in card.text
