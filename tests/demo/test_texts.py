import hashlib
import json
import random
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from xinslm.demo import adventures, everyday, words
from xinslm.demo.scene import Scene
from xinslm.demo.texts import PLOTS, instructions, stories, write_sample

NUMBER = {word: number for number, word in enumerate(words.NUMBERS)}
COUNT = "(" + "|".join(sorted(NUMBER, key=len, reverse=True)) + ")"


@pytest.fixture(scope="module")
def two_megabytes():
    return list(stories(2_000_000, seed=3))


def many(plot, count=200):
    """Scenes of a plot with their text."""
    for seed in range(count):
        scene = Scene(random.Random(seed))
        yield scene, "\n\n".join(plot(scene))


def test_the_same_seed_tells_the_same_in_every_process(two_megabytes):
    first = next(stories(1, seed=0))
    assert next(stories(1, seed=0)) == first and next(stories(1, seed=1)) != first
    code = "from xinslm.demo.texts import *; print(next(stories(1, 0)), list(instructions(50, 0)))"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and first.encode() in runs[0]
    # Golden: changes whenever the grammar does; then take the new value over.
    assert hashlib.sha256(first.encode()).hexdigest()[:16] == "98e8cb74483d09a7"


def test_amount_variety_and_vocabulary(two_megabytes):
    size = sum(len(text.encode()) for text in two_megabytes)
    assert 2_000_000 <= size < 2_003_000
    assert len(set(two_megabytes)) > 0.99 * len(two_megabytes)
    distinct = set(re.findall(r"[a-z]+", " ".join(two_megabytes).lower()))
    assert len(distinct) > 600
    assert len(PLOTS) >= 12 and len(set(PLOTS)) == len(PLOTS)
    text = "\n".join(two_megabytes)
    assert text.isascii() and not re.search(r"[{}]|  |\.\.|None", text)


def test_other_seeds_share_almost_nothing(two_megabytes):
    other = set(stories(500_000, seed=4))
    assert len(other & set(two_megabytes)) < 0.01 * len(other)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_pronouns_fit_the_cast(plot):
    """A story's pronouns belong to somebody in it; where all are girls, there is no 'he', and the
    reverse.
    """
    of_one_kind = 0
    for scene, text in many(plot):
        used = set(re.findall(r"\b(?:he|him|his|she|her|hers)\b", text.lower()))
        cast = {person.he for person in scene.cast}
        assert cast <= {"he", "she"}
        if "he" not in cast:
            assert not used & {"he", "him", "his"}, text
        if "she" not in cast:
            assert not used & {"she", "her", "hers"}, text
        of_one_kind += len(cast) == 1
        names = [person.name for person in scene.cast]
        assert len(set(names)) == len(names)
        for person in scene.cast:
            assert person.he == "she" or person.name not in words.GIRLS
            assert person.he == "he" or person.name not in words.BOYS
    assert of_one_kind > 20


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_articles_and_quotes(plot):
    for _, text in many(plot):
        assert not re.search(
            r"\ba [aeiou]|\ba honest|\ban (?!honest)[^aeiou]", text, re.IGNORECASE
        ), text
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n")), text
        assert all(re.search(r'[.!?]"?$', paragraph) for paragraph in text.split("\n\n")), text
        assert all(re.match(r'[A-Z"]', paragraph) for paragraph in text.split("\n\n")), text


def test_what_is_lost_is_found():
    for _, text in many(adventures.lost_and_found):
        lost = re.search(r"had (?:his|her) (.+) with (?:him|her), but suddenly it was gone", text)
        found = re.search(r"and there was the (.+)!", text)
        said = re.search(r"I have lost my ([a-z ]+)", text)
        assert lost and found and said and lost[1] == found[1] == said[1]


def test_shared_food_adds_up():
    for _, text in many(everyday.sharing):
        total = re.search(rf"(?:he|she) had {COUNT} ", text)
        rest = re.search(rf"gave {COUNT} to \w+ and had {COUNT} ", text)
        assert total and rest and NUMBER[total[1]] == NUMBER[rest[1]] + NUMBER[rest[2]]


def test_money_adds_up():
    for _, text in many(everyday.shopping):
        have, price, after, second, left = (
            NUMBER[re.search(pattern, text)[1]]
            for pattern in (
                rf"gave \w+ {COUNT} coins",
                rf"cost {COUNT} coin",
                rf"so \w+ had {COUNT} coins left",
                rf"It costs {COUNT} coin",
                rf"now there (?:was|were) {COUNT} coin",
            )
        )
        assert have - price == after and after - second == left > 0


def test_the_thing_brought_home_is_the_last_one_got():
    for _, text in many(adventures.trade):
        got = re.findall(r"gave away the (.+) and got the (.+)\.", text.replace(". ", ".\n"))
        assert len(got) >= 2 and all(one[1] == two[0] for one, two in pairwise(got))
        assert f"came home with the {got[-1][1]}." in text
        assert re.search(r"had an? (.+), but", text)[1] == got[0][0]


def test_days_go_on():
    for _, text in many(everyday.garden):
        start = words.DAYS.index(re.match(r"On (\w+)", text)[1])
        later, day = re.search(r"But (.+?), on (\w+), a green tip", text).groups()
        wait = 1 if later == "the next day" else NUMBER[later.split()[0]]
        assert words.DAYS[(start + wait) % 7] == day


def test_the_capital_is_the_capital():
    for _, text in many(adventures.far_land):
        told = re.search(r"The capital of (\w+) was (\w+)", text)
        if "What is the capital" in text:
            assert (
                f"What is the capital of {told[1]}?" in text and f"The capital is {told[2]}" in text
            )


def solve(prompt):
    """Answer by an independent calculation, or None where there is none."""
    if match := re.fullmatch(r"\D*(\d+) (plus|minus|\+|-|and) (\d+)[?.]", prompt):
        x, y = int(match[1]), int(match[3])
        return x - y if match[2] in ("minus", "-") else x + y
    if match := re.match(r"\w+ has (\d+) \w+ and (gets|gives) (\d+)", prompt):
        return int(match[1]) + int(match[3]) * (1 if match[2] == "gets" else -1)
    if match := re.match(r"Which number is (bigger|smaller), (\d+) or (\d+)", prompt):
        return (max if match[1] == "bigger" else min)(int(match[2]), int(match[3]))
    return None


def test_instructions_are_right_and_different():
    pairs = list(instructions(5000, seed=1))
    assert len({json.dumps(pair) for pair in pairs}) == 5000
    solved = 0
    for pair in pairs:
        expected = solve(pair["prompt"])
        if expected is not None:
            solved += 1
            numbers = [int(number) for number in re.findall(r"\d+", pair["response"])]
            answer = numbers[0] if pair["prompt"].startswith("Which number") else numbers[-1]
            assert answer == expected, pair
        if pair["prompt"].startswith("Put these words"):
            given = pair["prompt"].split(": ")[1].rstrip(".").split(", ")
            assert pair["response"].rstrip(".").split(", ") == sorted(given)
        if match := re.match(r"(.+) Who has the (\w+)\?", pair["prompt"]):
            owner = re.search(rf"(\w+) has an? \w+ {match[2]}\.", match[1])
            assert pair["response"] == f"{owner[1]} has the {match[2]}."
    assert solved > 1000


def test_opposites_are_unambiguous():
    all_words = [word for pair in words.OPPOSITES for word in pair]
    assert len(set(all_words)) == len(all_words)


def test_write_sample(tmp_path):
    paths = write_sample(tmp_path / "new", 200_000, seed=5)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "instructions.jsonl",
        "stories.jsonl",
    ]
    texts = [json.loads(line)["text"] for line in paths[0].read_text().splitlines()]
    assert texts == list(stories(200_000, seed=5))
    pairs = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert len(pairs) == 200 and all(set(pair) == {"prompt", "response"} for pair in pairs)
