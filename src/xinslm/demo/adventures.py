"""Plots of the demo's stories, out of doors.

Each plot takes a scene and gives the paragraphs of one story, causes before effects. What is lost
is what is found, what is counted adds up, who asks gets the answer; which words, persons, places
and turns it takes are the scene's choices.
"""

from xinslm.demo import words
from xinslm.demo.scene import Scene, a


def lost_and_found(s: Scene) -> list[str]:
    """Something is lost, looked for, and found."""
    hero, place, thing = s.child(), s.pick(words.PLACES), s.thing()
    helper = s.child() if s.random() < 0.6 else s.relative(hero)
    first, second, last = s.several(place.spots, 3)
    search = [
        f"They looked {first}, but "
        f"{s.pick(('there was nothing there', 'there was no trace of it'))}."
    ]
    arrives = s.pick(("came along", "was passing by", "saw it", "came running"))
    if s.random() < 0.6:
        search.append(
            f"Then they looked {second}. "
            f"{s.pick(('Nothing.', 'It was not there either.', 'No luck.'))}"
        )
    finder = s.pick((hero, helper))
    return [
        f"{s.opening(hero, place)} {hero.He} had {hero.his} {thing.full} with {hero.him}, but "
        "suddenly it was gone. "
        f"{hero.name} was {s.pick(words.SAD)}.",
        f"{helper.Name} {arrives}. "
        f"{s.say(helper, s.pick(('What is wrong?', 'Why are you looking around like that?', 'Can I help you?')))} "
        f"{s.say(hero, f'I have lost my {thing.full}.')} "
        + s.say(
            helper,
            s.pick(
                (
                    "Let us look for it together.",
                    "Two pairs of eyes see more than one.",
                    "It cannot be far away.",
                )
            ),
        ),
        f"{' '.join(search)} At last {finder.name} looked {last}, and there was the {thing.full}! "
        f"{s.pick(('The wind had carried it there.', 'It must have fallen down.', 'Nobody knew how.'))}",
        f"{hero.name} was {s.pick(words.GLAD)}. "
        f"{s.say(hero, f'Thank you, I will take better care of my {thing.noun}.')} "
        + s.moral(
            "A friend makes every search shorter.",
            "It is good to have help.",
            "Patience finds what haste lost.",
        ),
    ]


def race(s: Scene) -> list[str]:
    """Three run, one stumbles, and the order at the end follows from it."""
    one, two, three = s.child(), s.child(), s.child()
    place, prize, goal = (
        s.pick(words.OUTDOORS),
        s.thing(),
        s.pick(("the old gate", "the mill", "the big oak", "the well")),
    )
    kind = s.pick(("ran", "rode their bicycles", "hopped on one leg", "skipped"))
    helped = s.random() < 0.5
    trouble = s.pick(
        ("slipped on wet leaves", "got a cramp", "stumbled over a root", "lost a shoe")
    )
    if helped:
        end = (
            f"{two.name} saw it, stopped and helped {one.him} up. So {three.name} came in first. "
            "But "
            f"{three.name} gave the "
            f"{prize.noun} to {two.name}. {s.say(three, 'You are the real winner.')}"
        )
    else:
        end = (
            f"{two.name} passed {one.him} and came in first, {three.name} was second, and "
            f"{one.name} came third. "
            f"{two.name} got the {prize.full}. "
            f"{s.say(one, s.pick(('Well done.', 'Next time I will win.')))}"
        )
    return [
        f"One {s.weather} day {one.name}, {two.name} and {three.name} met {place.at}. "
        f"{s.say(one, f'Let us race to {goal}.')} The prize was {a(prize.full)}.",
        f"They {kind} as fast as they could. {one.name} was first, then came {two.name}, and "
        f"{three.name} "
        f"was last. But just before {goal}, {one.name} {trouble}. {end}",
        s.moral(
            "Winning is nice, being kind is nicer."
            if helped
            else "Who is first in the middle need not be first at the end.",
            f"All three drank lemonade at {goal}.",
            "Then they raced back, only for fun.",
        ),
    ]


def rescue(s: Scene) -> list[str]:
    """An animal is stuck, and a tool gets it out."""
    hero, friend, place = s.child(), s.child(), s.pick(words.OUTDOORS)
    animal = s.pick(("kitten", "puppy", "lamb", "duckling", "owlet", "foal", "goat", "squirrel"))
    trap, tool, how = s.pick(
        (
            ("on a high roof", "a ladder", "climbed up"),
            ("in a deep hole", "a long rope", "climbed down"),
            ("in the mud", "a wooden plank", "crawled over"),
            ("in a thorn bush", "a pair of shears", "cut a way"),
            ("on a rock in the water", "a small boat", "rowed over"),
            ("in a tall tree", "a ladder", "climbed up"),
        )
    )
    wait, hold = (hero, friend) if s.random() < 0.5 else (friend, hero)
    return [
        f"{s.opening(hero, place)} Then {hero.he} met {friend.name}, who was out of breath. "
        f"{s.say(friend, f'{a(animal).capitalize()} is stuck {trap}!')} They ran there at once, "
        f"and the {animal} "
        f"looked at them with big eyes.",
        f"{s.say(hero, s.pick(('What can we do?', 'We need a tool.', 'How do we get there?')))} "
        f"{s.say(friend, f'Let us fetch {tool}.')} "
        f"{s.pick(('Soon', 'After a while', 'In no time'))} they "
        f"were back with {tool}. {hold.name} held on tight while {wait.name} {how}. "
        f"{s.say(wait, s.pick(('I have got it!', 'Come here, little one.')))}",
        f"The {animal} was {s.pick(('cold', 'dirty', 'frightened', 'hungry'))} but safe. They "
        "brought it "
        "to its mother, who "
        f"{s.pick(('licked it', 'called loudly', 'would not leave it any more'))}. "
        + s.moral(
            "Two can do what one cannot.",
            f"{hero.name} and {friend.name} were the heroes of the day.",
            "Who helps the small is great.",
        ),
    ]


def trade(s: Scene) -> list[str]:
    """A chain of trades: what is held is what was got last."""
    hero, place = s.child(), s.pick(words.PLACES)
    start = s.thing()
    held, parts = start, []
    for number in range(s.number(2, 4)):
        partner = s.child() if s.random() < 0.6 else s.worker()
        new = s.thing()
        while new.noun == held.noun or new.noun == start.noun:
            new = s.thing()
        offer = f"I will give you my {new.full} for your {held.noun}."
        when = s.pick(
            ("Then", "After that", "A little later")
            if number
            else ("First", "At the corner", "On the way")
        )
        parts.append(
            f"{when} {hero.he} met {partner.name}. {s.say(partner, offer)} So {hero.name} gave "
            "away the "
            f"{held.full} and got the {new.full}."
        )
        held = new
    return [
        f"{s.opening(hero, place)} {hero.He} had {a(start.full)}, but {hero.he} was tired of it.",
        " ".join(parts),
        f"In the evening {hero.name} came home with the {held.full}. "
        + s.moral(
            f"The {start.noun} was forgotten, and {hero.he} was {s.pick(words.GLAD)}.",
            f"But secretly {hero.he} missed the {start.full} a little.",
            "Everybody had got what they wanted.",
        ),
    ]


def key_and_chest(s: Scene) -> list[str]:
    """One of three keys opens the chest."""
    hero, friend, place = s.child(), s.child(), s.pick(words.OUTDOORS)
    keys = s.several(words.COLOURS, 3)
    right, inside = s.number(0, 2), s.thing()
    ways = s.several(("north", "south", "east", "west"), 2)
    steps = [s.number(2, 20) for _ in ways]
    tries = [
        f"{s.pick((hero, friend)).name} tried the {keys[i]} key, but the chest stayed shut."
        for i in range(right)
    ]
    return [
        f"{s.opening(hero, place)} {s.pick(place.spots).capitalize()} {hero.he} found an old map. "
        f"{s.say(hero, 'Look, a map!')} {hero.His} friend {friend.name} read it aloud: go "
        f"{words.NUMBERS[steps[0]]} steps {ways[0]}, then {words.NUMBERS[steps[1]]} steps "
        f"{ways[1]}, and dig.",
        f"They went {words.NUMBERS[steps[0]]} steps {ways[0]} and {words.NUMBERS[steps[1]]} steps "
        f"{ways[1]}, and dug. Soon they hit a chest. Beside it lay three keys: {keys[0]}, "
        f"{keys[1]} and {keys[2]}.",
        " ".join(
            [
                *tries,
                f"{'At last' if tries else 'At once'} the {keys[right]} key turned, and the "
                f"chest sprang open. Inside lay {a(inside.full)}.",
            ]
        ),
        s.say(
            friend,
            s.pick(
                (
                    "Who may have hidden it?",
                    f"Let us put the {inside.noun} back for others to find.",
                    "We will share it.",
                )
            ),
        )
        + " "
        + s.moral(
            "The real treasure was the hunt.",
            f"They kept the {keys[right]} key forever.",
            f"The {inside.noun} still stands on a shelf today.",
        ),
    ]


def far_land(s: Scene) -> list[str]:
    """A traveller comes to an invented land and answers for it at home."""
    hero, land = s.child(), s.invented(words.LAND_ENDS)
    capital, river = s.invented(words.TOWN_ENDS), s.invented(("a", "o", "el", "is"))
    guide, animal, colour = s.worker(), s.pick(words.ANIMALS), s.pick(words.COLOURS)
    asker, sights = s.relative(hero), s.several(words.PLACES, 2)
    asked = s.pick(
        (
            (f"What is the capital of {land}?", f"The capital is {capital}."),
            ("Which river did you see?", f"I saw the {river}."),
            ("What colour is the flag?", f"The flag is {colour}."),
            ("Which animal is on the flag?", f"There is {a(animal.name)} on it."),
        )
    )
    return [
        f"{hero.name} travelled to a far land called {land}. The capital of {land} was {capital}, "
        "a town "
        f"on the river {river}. The flag of {land} was {colour} with {a(animal.name)} on it.",
        f"In {capital} {hero.he} met {guide.name}. {s.say(guide, f'Welcome to {capital}!')} "
        f"{guide.He} "
        f"showed {hero.him} "
        f"{sights[0].name} and {sights[1].name}, and they ate {s.pick(words.CAKES)} by the "
        f"{river}.",
        f"After {words.NUMBERS[s.number(2, 20)]} days {hero.name} went home. "
        f"{s.say(asker, asked[0])} "
        f"{s.say(hero, asked[1])} "
        + s.moral(
            f"{hero.name} never forgot {land}.",
            "The world is large, and every land has its songs.",
            f"One day {hero.he} would go back to {capital}.",
        ),
    ]


def night_sound(s: Scene) -> list[str]:
    """A noise at night is explained by the animal that makes it."""
    hero, animal = s.child(), s.pick([animal for animal in words.ANIMALS if animal.name != "bee"])
    other = s.relative(hero, s.random() < 0.6)
    guess = s.pick(("a ghost", "a thief", "a monster", "a dragon", "a giant", "the wind"))
    return [
        f"It was night, and {hero.name} lay in bed. Then {hero.he} heard it: {animal.sound}, "
        f"{animal.sound}! "
        f"{s.say(hero, f'Is that {guess}?')} {hero.He} pulled the blanket over {hero.his} head.",
        f"The sound came again. {hero.name} woke {other.name}. "
        f"{s.say(other, s.pick(('Let us look.', 'Take the lamp.')))} They went "
        f"{s.pick(('down the stairs', 'to the door', 'into the yard', 'along the hall'))} on "
        "tiptoe.",
        f"In the light of the lamp stood {a(animal.name)}. It was looking for {animal.food}. "
        f"{s.say(hero, f'It was only {a(animal.name)}!')} They gave it some {animal.food}, and it "
        "went "
        f"back to its {animal.home}. "
        + s.moral(
            "What we know does not frighten us.",
            f"{hero.name} slept until noon.",
            f"Since then {hero.name} has liked the sound of {animal.name}s."
            if animal.name not in ("goose", "sheep", "mouse", "wolf")
            else "Most ghosts have feathers or fur.",
        ),
    ]


def picnic(s: Scene) -> list[str]:
    """The weather changes the plan."""
    hero, friend, place = s.child(), s.child(), s.pick(words.OUTDOORS)
    cake, day = s.pick(words.CAKES), s.pick(words.DAYS)
    turn, shelter = s.pick(
        (
            ("it began to rain", "dry"),
            ("a storm came up", "safe"),
            ("hail fell", "dry"),
            ("the wind blew the plates away", "out of the wind"),
        )
    )
    where = s.pick(
        ("under a big tree", "in an old hut", "in the tent", "on the porch", "inside the barn")
    )
    toy = s.thing()
    return [
        f"{hero.name} and {friend.name} had planned a picnic for {day}. {hero.name} brought "
        f"{a(cake)}, and "
        f"{friend.name} brought {s.pick(words.FOODS)} and {a(toy.full)}. They met {place.at}.",
        f"But as soon as they sat down, {turn}. "
        f"{s.say(friend, s.pick(('Oh no, our picnic!', 'What now?', 'Run!')))} "
        f"They took the {cake} and ran. {s.pick(('Soon', 'A minute later', 'Out of breath,'))} "
        "they sat "
        f"{where}. There it was {shelter}.",
        s.say(
            hero,
            s.pick(
                (
                    f"The {cake} is still good.",
                    "We can eat here just as well.",
                    "This is even better.",
                )
            ),
        )
        + f" They ate, played with the {toy.noun} and told each other stories about "
        f"{s.pick(words.PLACES).name}. "
        + s.moral(
            "Not every plan works, but a good friend makes the best of it.",
            "Bad weather, good day.",
            f"Later they called it the best {day} of the year.",
        ),
    ]


def new_pet(s: Scene) -> list[str]:
    """A child meets a hungry animal and keeps it."""
    hero, place, kind = s.child(), s.pick(words.OUTDOORS), s.pick(words.PETS)
    grown_up, name, look = s.relative(hero), s.pick(words.ANIMAL_NAMES), s.pick(words.COLOURS)
    spot, food = (
        s.pick(place.spots),
        s.pick(("bread", "seeds", "milk", "a piece of apple", "some oats", "water")),
    )
    days = s.number(2, 6)
    return [
        f"{s.opening(hero, place)} {hero.He} heard a {s.pick(('tiny', 'strange', 'sad', 'soft'))} "
        "sound. "
        f"{spot[0].upper() + spot[1:]} sat a {s.pick(('little', 'thin', 'wet', 'young'))} {look} "
        f"{kind}.",
        f"{s.say(hero, s.pick(('Are you lost?', 'Do not be afraid.', 'You look hungry.')))} "
        f"{hero.He} put "
        f"down {food}, and after a while the {kind} came closer and ate.",
        f'{hero.He} asked {grown_up.name}, "May I keep the {kind}?" '
        + s.say(
            grown_up,
            s.pick(
                (
                    "Yes, but first we must ask if somebody misses it.",
                    "Only if you feed it every day.",
                    "We can try it for a week.",
                )
            ),
        )
        + f" They waited {words.NUMBERS[days]} days, and nobody came for it.",
        f"So the {look} {kind} stayed. {hero.name} called it {name}, "
        + s.pick(
            (
                f"because it was as {look} as it could be",
                "because that was the first word that came to mind",
                f"after {a(kind)} in a book",
            )
        )
        + f". Every {s.pick(('morning', 'evening'))} {name} waited at the door for {hero.name}. "
        + s.moral("Love needs a little time.", f"A hungry {kind} had found a home."),
    ]
