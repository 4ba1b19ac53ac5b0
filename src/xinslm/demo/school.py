"""Plots of the demo's stories, at school and about work; see `everyday`."""

from xinslm.demo import words
from xinslm.demo.scene import Scene, a


def lesson(s: Scene) -> list[str]:
    """A teacher asks; somebody errs and is put right."""
    teacher = s.worker()._replace(name="the teacher", kind="teacher")
    s.cast[-1] = teacher
    one, two = s.child(), s.child()
    rounds = []
    for pupil in s.several((one, two), 2):
        question, answer, wrong = _school_question(s)
        if s.random() < 0.35:
            other = two if pupil is one else one
            rounds.append(
                f"{s.say(teacher, question)} {s.say(pupil, wrong)} The teacher shook "
                f"{teacher.his} head. "
                f"{s.say(other, answer)} {s.say(teacher, 'That is right.')}"
            )
        else:
            rounds.append(
                f"{s.say(teacher, question)} {s.say(pupil, answer)} "
                f"{s.say(teacher, s.pick(('Correct.', 'Very good.')))}"
            )
    return [
        f"It was {a(s.weather)} {s.pick(words.DAYS[:5])} in {s.pick(words.MONTHS)}, and "
        f"{one.name} and "
        f"{two.name} sat in school. {s.sky}",
        *rounds,
        s.pick(
            ("Then the bell rang.", "Then it was time for lunch.", "At noon they all went outside.")
        )
        + " "
        + s.moral(
            "Asking is how learning starts.",
            "A mistake is a good teacher, too.",
            f"{one.name} and {two.name} walked home together.",
        ),
    ]


def _school_question(s: Scene) -> tuple[str, str, str]:
    """Give a question, the right answer and a wrong one."""
    kind = s.number(0, 5)
    if kind == 0:
        x, y = s.number(1, 10), s.number(1, 9)
        n = words.NUMBERS
        other_sum = x + y + s.pick((-1, 1))
        return f"What is {n[x]} plus {n[y]}?", f"It is {n[x + y]}.", f"It is {n[other_sum]}."
    if kind == 1:
        day = s.number(0, 6)
        d = words.DAYS
        return (
            f"Which day comes after {d[day]}?",
            f"It is {d[(day + 1) % 7]}.",
            f"It is {d[(day + 3) % 7]}.",
        )
    if kind == 2:
        one, two = s.pick(words.OPPOSITES)
        wrong = s.pick([pair[0] for pair in words.OPPOSITES if one not in pair])
        return (
            f"What is the opposite of {one}?",
            f"The opposite of {one} is {two}.",
            f"Is it {wrong}?",
        )
    if kind == 3:
        animal, other = s.several([animal for animal in words.ANIMALS if animal.name != "snake"], 2)
        ask = f"Which sound does {a(animal.name)} make?"
        return (
            ask,
            f"{animal.sound.capitalize()}!",
            f"Maybe {other.sound if other.sound != animal.sound else 'beep'}?",
        )
    if kind == 4:
        thing, colour = s.pick(words.THING_COLOURS)
        wrong = s.pick([c for c in words.COLOURS if c != colour])
        return f"What colour is {thing}?", f"It is {colour}.", f"It is {wrong}."
    one, two, mixed = s.pick(words.MIXTURES)
    wrong = s.pick([c for c in words.COLOURS if c != mixed])
    return f"What do you get from {one} and {two}?", f"They make {mixed}.", f"They make {wrong}."


def towers(s: Scene) -> list[str]:
    """Something is built, falls, and is built better."""
    hero, friend, place = s.child(), s.child(), s.pick(words.OUTDOORS)
    work = s.pick(("tower", "bridge", "castle", "hut", "wall", "dam", "fort"))
    stuff, was = s.pick(
        (
            ("sticks", "were"),
            ("sand", "was"),
            ("stones", "were"),
            ("blocks", "were"),
            ("planks", "were"),
            ("boxes", "were"),
            ("mud", "was"),
            ("snow", "was"),
            ("straw", "was"),
            ("cards", "were"),
        )
    )
    better = s.pick([other for other in ("stones", "bricks", "logs", "clay") if other != stuff])
    cause = s.pick(
        (
            "A gust of wind came",
            "A dog ran into it",
            "A ball hit it",
            "Somebody sneezed",
            "It was too high",
        )
    )
    days = s.number(2, 5)
    return [
        f"{s.opening(hero, place)} {friend.name} was there, too. "
        f"{s.say(hero, f'Let us build a {work} out of {stuff}.')} They worked for "
        f"{words.NUMBERS[days]} hours.",
        f"{cause}, and the {work} fell down. "
        f"{s.say(friend, s.pick(('All that work!', 'I do not want to play any more.')))} "
        f"{hero.name} "
        f"{s.pick(('sat down and thought', 'looked at the pieces', 'drew a plan in the sand'))}. "
        f"{s.say(hero, f'The {stuff} {was} too weak, we should take {better}.')}",
        f"So they carried {better} and began again. This time the {work} stood firm. "
        + s.say(friend, s.pick((f"What a {work}!", "Now it may storm.", "You were right.")))
        + " "
        + s.moral(
            "Falling down is part of building.",
            "The second try knows more than the first.",
            f"The {work} of {better} is still there.",
        ),
    ]


def chores(s: Scene) -> list[str]:
    """Three chores in order, and the reward that was promised."""
    hero, reward = s.child(), s.pick(words.REWARDS)
    giver, other = s.relative(hero), s.relative(hero, grown_up=False)
    done = s.several(words.CHORES, 3)
    lazy = s.random() < 0.5
    return [
        f"{s.sky} {s.say(giver, f'Who helps today gets {reward}.')} {hero.name} jumped up"
        + (
            f", but {other.name} stayed on the sofa." if lazy else f", and {other.name} came along."
        ),
        f"First {hero.name} {done[0]}. Then {hero.he} {done[1]}. "
        + (
            f"{s.say(other, 'I will help tomorrow.')} So {hero.name} {done[2]}, too."
            if lazy
            else f"Meanwhile {other.name} {done[2]}."
        ),
        (
            f"In the evening {hero.name} got {reward}. {other.Name} got nothing and was "
            f"{s.pick(words.SAD)}. "
            f"But {hero.name} shared it. {s.say(other, 'Tomorrow I will really help.')}"
            if lazy
            else f"In the evening both of them got {reward}. {s.say(giver, 'You have earned it.')}"
        )
        + " "
        + s.moral(
            "Work first, then play.",
            "Many hands make the work light.",
            f"{giver.Name} was {s.pick(words.GLAD)}.",
        ),
    ]
