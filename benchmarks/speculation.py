"""Speculative decoding: tokens a second with and without drafts, on texts that repeat and that do not.

    python benchmarks/speculation.py student-4bit --text README.md

The model copies and corrects a passage of `--text` (drafts by lookup help), and continues it (they do
not help). The tokens are compared first. Sides take turns, and each round's ratio is one
sample. A drafter model can be given with --draft.
"""

import argparse
import statistics
import time
from pathlib import Path

from machine import describe

from xinslm.inference.config import EngineConfig
from xinslm.inference.generate import generate
from xinslm.inference.load import load_engine
from xinslm.sampling import Sampling

TOKENS = 96


def prompts(engine, text: str) -> dict[str, list[int]]:
    """Ids of each prompt."""
    passage = text[:700]
    tokenizer = engine.tokenizer
    found = {"continue a text": tokenizer.encode(passage)}
    if tokenizer.chat_template is not None:
        for name, task in (
            ("repeat a text", "Repeat this text word for word:\n\n"),
            ("correct a text", "Correct the spelling of this text and leave the rest:\n\n"),
        ):
            messages = [{"role": "user", "content": task + passage}]
            found[name] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--draft", help="a smaller model, beside lookup")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    print(describe(("numpy",)), flush=True)
    drafts = ["none", "lookup"] + ([options.draft] if options.draft else [])
    engines = {
        draft: load_engine(EngineConfig(model=options.model, engine="native", draft=draft))
        for draft in drafts
    }
    text = options.text.read_text(encoding="utf-8")
    print("| text | draft | tokens/s alone | with drafts | ratio | guesses that were right |")
    print("|---|---|---|---|---|---|")
    for name, ids in prompts(engines["none"], text).items():
        for draft in drafts[1:]:
            print(row(name, ids, draft, engines, options), flush=True)


def row(name: str, ids: list[int], draft: str, engines: dict, options) -> str:
    """One line of the table."""
    times: dict = {"none": [], draft: []}
    tokens: dict = {}
    engine = engines[draft]
    for number in range(options.rounds + 1):
        for side in ("none", draft) if number % 2 else (draft, "none"):
            engine.guessed = engine.accepted = 0
            took, tokens[side] = timed(engines[side], ids, options.temperature)
            if number:
                times[side].append(took)
    assert tokens["none"] == tokens[draft], "the texts differ"
    count = len(tokens["none"])
    ratios = sorted(a / b for a, b in zip(times["none"], times[draft], strict=True))
    alone, drafted = (count / statistics.median(times[side]) for side in ("none", draft))
    timed(engine, ids, options.temperature)
    share = f"{engine.accepted} of {engine.guessed}"
    spread = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {name} | {draft} | {alone:.0f} | {drafted:.0f} | {spread} | {share} |"


def timed(engine, ids: list[int], temperature: float) -> tuple[float, list[int]]:
    """Seconds for the tokens after the first, and all tokens."""
    pieces = generate(engine, ids, Sampling(temperature=temperature, seed=0), TOKENS)
    found = [next(pieces).token]
    start = time.perf_counter()
    found += [piece.token for piece in pieces]
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main()
