"""Who and what a demo story is about, and the sentences that all plots share.

A scene keeps a story consistent: no two persons share a name, everybody has the right pronouns, and
a thing keeps its look from the first sentence to the last. All chance comes from one
`random.Random`.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from xinslm.demo import words

Item = TypeVar("Item")


class Person(NamedTuple):
    """Somebody in a story; `name` is what the text calls them ('Nora', 'her mom')."""

    name: str
    kind: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:
        """The pronoun at the head of a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:
        """The possessive at the head of a sentence."""
        return self.his.capitalize()

    @property
    def Name(self) -> str:
        """The name at the head of a sentence."""
        return self.name[0].upper() + self.name[1:]


class Thing(NamedTuple):
    """An object with its look."""

    look: str
    noun: str

    @property
    def full(self) -> str:
        """For instance 'red kite'."""
        return f"{self.look} {self.noun}"


_PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
_KIN = (
    ("mom", "girl"),
    ("dad", "boy"),
    ("grandma", "girl"),
    ("grandpa", "boy"),
    ("aunt", "girl"),
    ("uncle", "boy"),
    ("sister", "girl"),
    ("brother", "boy"),
)


def a(words_after: str) -> str:
    """Put 'a' or 'an' before a phrase."""
    vowel = words_after[0] in "aeiou" or words_after.startswith("honest")
    return f"{'an' if vowel else 'a'} {words_after}"


class Scene:
    """Draws the parts of one story, and remembers whom it introduced."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng.random
        self.cast: list[Person] = []
        self.weather, self.sky = self.pick(words.WEATHER)

    def pick(self, options: Sequence[Item]) -> Item:
        """Choose one of the options."""
        return options[int(self.random() * len(options))]

    def several(self, options: Sequence[Item], count: int) -> list[Item]:
        """Choose `count` different options."""
        chosen: list[Item] = []
        while len(chosen) < count:
            item = self.pick(options)
            if item not in chosen:
                chosen.append(item)
        return chosen

    def number(self, low: int, high: int) -> int:
        """Choose a whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def child(self) -> Person:
        """Introduce a child whose name nobody else in the story has."""
        kind = self.pick(("girl", "boy"))
        taken = [other.name for other in self.cast]
        name = self.pick(words.GIRLS if kind == "girl" else words.BOYS)
        while name in taken:
            name = self.pick(words.GIRLS if kind == "girl" else words.BOYS)
        return self._add(Person(name, kind, *_PRONOUNS[kind]))

    def relative(self, of: Person, grown_up: bool = True) -> Person:
        """Introduce a relative, 'her grandpa'."""
        word, kind = self.pick(_KIN[:6] if grown_up else _KIN[6:])
        return self._add(Person(f"{of.his} {word}", word, *_PRONOUNS[kind]))

    def worker(self) -> Person:
        """Introduce somebody by trade, 'the baker'."""
        taken = [other.kind for other in self.cast]
        job, kind = (
            self.pick([job for job in words.JOBS if job not in taken]),
            self.pick(("girl", "boy")),
        )
        return self._add(Person(f"the {job}", job, *_PRONOUNS[kind]))

    def _add(self, person: Person) -> Person:
        self.cast.append(person)
        return person

    def thing(self) -> Thing:
        """Draw an object with a look."""
        return Thing(
            self.pick(words.COLOURS if self.random() < 0.6 else words.LOOKS), self.pick(words.TOYS)
        )

    def invented(self, ends: Sequence[str]) -> str:
        """Make up the name of a town or a land."""
        middle = self.pick(words.SYLLABLES) if self.random() < 0.4 else ""
        return (self.pick(words.SYLLABLES) + middle + self.pick(ends)).capitalize()

    def say(self, who: Person, text: str) -> str:
        """Let somebody say a sentence (it ends in . ? or !), with the speaker before or after
        it.
        """
        verb = "asked" if text[-1] == "?" else self.pick(("said", "said", "said", "called"))
        if self.random() < 0.5:
            return f'{who.Name} {"said" if verb != "asked" else verb}, "{text}"'
        text = text[:-1] + "," if text[-1] == "." else text
        return f'"{text}" {verb} {who.name}.'

    def opening(self, hero: Person, place: words.Place) -> str:
        """Introduce the hero at a place, most often with the weather or a habit."""
        trait, part = self.pick(words.TRAITS), self.pick(("morning", "afternoon", "evening", "day"))
        first = self.pick(
            (
                f"Once upon a time there was {a(trait)} {hero.kind} named {hero.name}. One "
                f"{self.weather} {part} "
                f"{hero.he} was {place.at}.",
                f"One {self.weather} {part}, {a(trait)} {hero.kind} called {hero.name} was "
                f"{place.at}.",
                f"{hero.name} was {a(trait)} {hero.kind}. On {a(self.weather)} "
                f"{self.pick(words.DAYS)}, {hero.he} went "
                f"out and stopped {place.at}.",
                f"It was {a(self.weather)} {part} in {self.pick(words.MONTHS)}. {hero.name}, "
                f"{a(trait)} {hero.kind}, "
                f"was {place.at}.",
            )
        )
        chance = self.random()
        if chance < 0.4:
            return f"{first} {self.sky}"
        if chance < 0.8:
            return f"{first} {hero.He} liked {self.pick(words.HOBBIES)}."
        return first

    def moral(self, *lessons: str) -> str:
        """Close a story with one of its lessons, a plain ending, or both."""
        plain = self.pick(
            (
                "They talked about it for a long time.",
                "It was a day to remember.",
                "That night everybody slept well.",
                "And that was that.",
                "From then on, things were better.",
                "The next morning they laughed about it.",
                "Then it was time to go home.",
                "What a day that was!",
                "In the evening they told everybody about it.",
            )
        )
        chance = self.random()
        if chance < 0.35:
            return plain
        return self.pick(lessons) if chance < 0.75 else f"{plain} {self.pick(lessons)}"
