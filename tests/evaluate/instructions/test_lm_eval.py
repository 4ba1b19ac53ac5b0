"""Equal to lm-evaluation-harness 0.4.13, instruction by instruction, strict and loose.

Its sentence tokenizer is a trained model that is downloaded; ours takes its place in it. langdetect
is optional for it and for us: without it, stand-ins let its module be imported, and the three types
that detect a language are left out of the comparison.
"""

import importlib
import importlib.util
import itertools
import json
import random
import sys
import types

import pytest

from ifeval_examples import EXAMPLES, LANGUAGE_EXAMPLES
from xinslm.evaluate.instructions.checks import NEEDS_LANGUAGE
from xinslm.evaluate.instructions.ifeval import read_items, score
from xinslm.evaluate.instructions.sentences import split_sentences

SENTENCES = [
    "Mr. Brown, my neighbour, sold his U.S. stamps!", "Why not?", "I DON'T KNOW (NASA knows).",
    "My answer is yes.", "It has 3.5 points, e.g. In Rome...", "the rocket and the rock",
    "Is there anything else I can help with?", "der Hund schläft heute unter dem Tisch.",
    "P.S. Milk", "p. p. s. tea",
]  # fmt: skip
LINES = [
    "* one", "- two", "** bold ** and *thin*", "***", "******", "<<A title>>", "<< >>", "Section 1",
    "SECTION 2:", "Day 3", "[name] and [place]", "", "", '"', "```json", '{"a": [1, 2]}', "```",
    "# Heading", "1. First", "Sure, here it is:",
]  # fmt: skip


@pytest.fixture(scope="module")
def harness():
    """lm-eval's IFEval module with our sentence splitter; `has_language` tells of langdetect."""
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    names = ("lm_eval.tasks.ifeval", "langdetect", "immutabledict")
    before = {name: module for name, module in sys.modules.items() if name.startswith(names)}
    has_language = importlib.util.find_spec("langdetect") is not None
    stand_ins = {
        "langdetect": types.SimpleNamespace(LangDetectException=ValueError, detect=str),
        "immutabledict": types.SimpleNamespace(immutabledict=dict),
    }
    stand_ins = {n: module for n, module in stand_ins.items() if not importlib.util.find_spec(n)}
    sys.modules.update(stand_ins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: True)
        patch.setattr("nltk.tokenize.sent_tokenize", lambda text, *_: split_sentences(text))
        utils = importlib.import_module("lm_eval.tasks.ifeval.utils")
        util = importlib.import_module("lm_eval.tasks.ifeval.instructions_util")
        # the module has its stand-ins; nobody else shall find them
        for name in stand_ins:
            del sys.modules[name]
        splitter = types.SimpleNamespace(tokenize=split_sentences)
        patch.setattr(util, "_get_sentence_tokenizer", lambda: splitter)
        if has_language:
            # as ours: equal texts are in equal languages
            patch.setattr("langdetect.DetectorFactory.seed", 0)
        yield types.SimpleNamespace(process=utils.process_results, has_language=has_language)
    for name in [name for name in sys.modules if name.startswith(names)]:
        if name in before:
            sys.modules[name] = before[name]
        else:
            del sys.modules[name]


def responses(count: int, seed: int) -> list[str]:
    """Varied texts: lists, sections, titles, several languages and cases, blank parts."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        pieces = rng.choices([*SENTENCES, *LINES], k=rng.randint(1, 14))
        text = "".join(piece + rng.choice(["\n", "\n\n", " ", " "]) for piece in pieces)
        texts.append(rng.choice([str, str, str.lower, str.upper])(text))
    return ["", " \n ", *texts]


def same(harness, record: dict, item, text: str) -> int:
    """Compare one response; return the number of compared instructions that were followed."""
    theirs = harness.process({**record}, [text])
    (ours,) = score([item], [text]).items
    followed = 0
    for place, name in enumerate(record["instruction_id_list"]):
        if name in NEEDS_LANGUAGE and not harness.has_language:
            continue
        if record["kwargs"][place].get("letter") in ("#", "!"):
            continue  # the harness draws a random letter instead
        expected = theirs["inst_level_strict_acc"][place], theirs["inst_level_loose_acc"][place]
        assert (ours.strict[place], ours.loose[place]) == expected, (name, record, text)
        followed += expected[1]
    return followed


def test_on_all_kwargs_of_the_official_file(harness, shared_data):
    path = shared_data / "bench" / "ifeval.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = responses(300, seed=3)
    stream = itertools.cycle(texts)
    followed = total = 0
    for record, item in zip(records, read_items(path), strict=True):
        prompt = record["prompt"]
        own = [prompt + "\n" + next(stream), next(stream), next(stream)]
        for text in own:
            followed += same(harness, record, item, text)
            total += len(record["instruction_id_list"])
    # the texts decide: neither all pass nor all fail
    assert 0.1 < followed / total < 0.9


def test_on_small_arguments_and_every_response(harness, tmp_path):
    """Arguments near what the responses have, so that counts fall on both sides."""
    examples = EXAMPLES | LANGUAGE_EXAMPLES
    records = [
        {"key": 0, "prompt": "p", "instruction_id_list": [name], "kwargs": [arguments]}
        for name, (arguments, _, _) in examples.items()
        if name not in NEEDS_LANGUAGE or harness.has_language
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    own = [text for _, *pair in examples.values() for text in pair]
    for record, item in zip(records, read_items(path), strict=True):
        texts = [
            *own,
            *responses(20 if record["instruction_id_list"][0] in NEEDS_LANGUAGE else 150, 4),
        ]
        followed = [same(harness, record, item, text) for text in texts]
        assert 0 < sum(followed) < len(texts), record["instruction_id_list"]
