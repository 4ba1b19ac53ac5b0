"""One exercise at a time: a question or task, and its answer, which is always right."""

import random
from collections.abc import Callable

from xinslm.demo import words
from xinslm.demo.scene import Scene, Thing, a

Exercise = Callable[[Scene], tuple[str, str]]


def instruction(rng: random.Random) -> tuple[str, str]:
    """Draw an exercise: prompt and response."""
    scene = Scene(rng)
    return scene.pick(EXERCISES)(scene)


def _sum(s: Scene) -> tuple[str, str]:
    x, y = s.number(1, 60), s.number(1, 39)
    ask = s.pick(
        (
            "What is {} plus {}?",
            "Add {} and {}.",
            "How much is {} plus {}?",
            "Please compute {} + {}.",
        )
    )
    return ask.format(x, y), s.pick(("{} plus {} is {}.", "{} + {} = {}.")).format(x, y, x + y)


def _difference(s: Scene) -> tuple[str, str]:
    y, left = s.number(1, 39), s.number(0, 60)
    ask = s.pick(("What is {} minus {}?", "How much is {} minus {}?", "Please compute {} - {}."))
    return ask.format(y + left, y), s.pick(("{} minus {} is {}.", "{} - {} = {}.")).format(
        y + left, y, left
    )


def _word_problem(s: Scene) -> tuple[str, str]:
    hero, other, food = s.child(), s.child(), s.pick(words.FOODS)
    x, y = s.number(2, 20), s.number(2, 20)
    if s.random() < 0.5:
        story = f"{hero.name} has {x} {food} and gets {y} more from {other.name}."
        total = x + y
    else:
        x, total = x + y, x
        story = f"{hero.name} has {x} {food} and gives {y} of them to {other.name}."
    return (
        f"{story} How many {food} does {hero.name} have now?",
        f"{hero.name} has {total} {food} now.",
    )


def _bigger(s: Scene) -> tuple[str, str]:
    x, y = s.several(range(100), 2)
    if s.random() < 0.5:
        return f"Which number is bigger, {x} or {y}?", f"{max(x, y)} is bigger than {min(x, y)}."
    return f"Which number is smaller, {x} or {y}?", f"{min(x, y)} is smaller than {max(x, y)}."


def _calendar(s: Scene) -> tuple[str, str]:
    names = s.pick((words.DAYS, words.MONTHS))
    what, at = ("day" if names is words.DAYS else "month"), s.number(0, len(names) - 1)
    step, word = s.pick(((1, "after"), (-1, "before")))
    answer = names[(at + step) % len(names)]
    return f"Which {what} comes {word} {names[at]}?", f"{answer} comes {word} {names[at]}."


def _days_later(s: Scene) -> tuple[str, str]:
    hero, at, wait = s.child(), s.number(0, 6), s.number(2, 6)
    today = words.DAYS[at]
    return (
        f"Today is {today}. {hero.name} has a birthday in {words.NUMBERS[wait]} days. Which day "
        "is that?",
        f"The birthday is on {words.DAYS[(at + wait) % 7]}.",
    )


def _opposite(s: Scene) -> tuple[str, str]:
    one, two = s.pick(words.OPPOSITES)
    if s.random() < 0.5:
        one, two = two, one
    ask = s.pick(
        (
            "What is the opposite of {}?",
            "Give me the opposite of {}.",
            "Name the opposite of the word {}.",
        )
    )
    return ask.format(one), f"The opposite of {one} is {two}."


def _animal(s: Scene) -> tuple[str, str]:
    animal = s.pick(words.ANIMALS)
    name = animal.name
    return s.pick(
        (
            (
                f"Which sound does {a(name)} make?",
                f"{a(name).capitalize()} makes the sound {animal.sound}.",
            ),
            (f"What is a young {name} called?", f"A young {name} is called {a(animal.baby)}."),
            (
                f"What does {a(name)} like to eat?",
                f"{a(name).capitalize()} likes to eat {animal.food}.",
            ),
            (f"Where does {a(name)} live?", f"{a(name).capitalize()} lives in {a(animal.home)}."),
        )
    )


def _colour(s: Scene) -> tuple[str, str]:
    if s.random() < 0.5:
        thing, colour = s.pick(words.THING_COLOURS)
        return f"What colour is {thing}?", f"{thing.capitalize()} is {colour}."
    one, two, mixed = s.pick(words.MIXTURES)
    if s.random() < 0.5:
        one, two = two, one
    return f"What colour do {one} and {two} make?", f"{one.capitalize()} and {two} make {mixed}."


def _far_land(s: Scene) -> tuple[str, str]:
    land, capital, river = (
        s.invented(words.LAND_ENDS),
        s.invented(words.TOWN_ENDS),
        s.invented(("a", "o", "is")),
    )
    ruler, animal = s.child(), s.pick(words.ANIMALS).name
    title = "queen" if ruler.kind == "girl" else "king"
    text = (
        f"The capital of {land} is {capital}. It lies on the river {river}. The {title} of {land} "
        "is called "
        f"{ruler.name} and keeps {a(animal)}."
    )
    question, answer = s.pick(
        (
            (f"What is the capital of {land}?", f"The capital of {land} is {capital}."),
            (f"On which river does {capital} lie?", f"{capital} lies on the river {river}."),
            (f"Who is the {title} of {land}?", f"The {title} of {land} is {ruler.name}."),
            (f"Which animal does the {title} keep?", f"The {title} keeps {a(animal)}."),
        )
    )
    return f"{text} {question}", answer


def _who_has_what(s: Scene) -> tuple[str, str]:
    people = [s.child(), s.child(), s.child()]
    things: list[Thing] = []
    while len(things) < 3:
        thing = s.thing()
        if all(thing.noun != other.noun for other in things):
            things.append(thing)
    has = [
        f"{person.name} has {a(thing.full)}." for person, thing in zip(people, things, strict=True)
    ]
    at = s.number(0, 2)
    text = " ".join(has)
    if s.random() < 0.5:
        return (
            f"{text} Who has the {things[at].noun}?",
            f"{people[at].name} has the {things[at].noun}.",
        )
    return f"{text} What does {people[at].name} have?", f"{has[at]}"


def _words(s: Scene) -> tuple[str, str]:
    chosen = s.several(words.TOYS, s.number(3, 5))
    given = ", ".join(chosen)
    return s.pick(
        (
            (f"Put these words in alphabetical order: {given}.", f"{', '.join(sorted(chosen))}."),
            (f"Repeat these words backwards: {given}.", f"{', '.join(reversed(chosen))}."),
            (
                f"How many words are these: {given}?",
                f"These are {words.NUMBERS[len(chosen)]} words.",
            ),
            (f"What is the last of these words: {given}?", f"The last word is {chosen[-1]}."),
            (
                f"What is the first letter of {chosen[0]}?",
                f"The first letter of {chosen[0]} is {chosen[0][0]}.",
            ),
        )
    )


def _write(s: Scene) -> tuple[str, str]:
    hero, place, thing = s.child(), s.pick(words.PLACES), s.thing()
    animal, trait = s.pick(words.ANIMALS).name, s.pick(words.TRAITS)
    ask = s.pick(
        (
            "Write a short story about",
            "Tell me a little story about",
            "Make up two or three sentences about",
        )
    )
    beginning = s.opening(hero, place)
    end = s.pick(
        (
            "They became friends at once.",
            f"It took the {thing.noun} and ran away.",
            "Together they played all day.",
            f"It gave {hero.him} the {thing.noun} as a present.",
        )
    )
    return (
        f"{ask} {hero.name}, {a(animal)} and {a(thing.full)}.",
        f"{beginning} There {hero.he} met {a(trait)} {animal} with {a(thing.full)}. {end}",
    )


def _describe(s: Scene) -> tuple[str, str]:
    thing = s.thing()
    hero = s.child()
    ask = s.pick(
        (
            f"Which word says what the {thing.noun} is like?",
            f"What is the {thing.noun} of {hero.name} like?",
        )
    )
    return f"{hero.name} bought {a(thing.full)}. {ask}", f"The {thing.noun} is {thing.look}."


EXERCISES: tuple[Exercise, ...] = (
    _sum,
    _difference,
    _word_problem,
    _bigger,
    _calendar,
    _days_later,
    _opposite,
    _animal,
    _colour,
    _far_land,
    _who_has_what,
    _words,
    _write,
    _describe,
)
