"""Plots of the demo's stories, at home.

Each plot takes a scene and gives the paragraphs of one story, causes before effects. What is lost
is what is found, what is counted adds up, who asks gets the answer; which words, persons, places
and turns it takes are the scene's choices.
"""

from xinslm.demo import words
from xinslm.demo.scene import Scene, Thing, a


def sharing(s: Scene) -> list[str]:
    """One has many, the other none; they share, and the numbers are right."""
    hero, friend, place = s.child(), s.child(), s.pick(words.PLACES)
    food, total = s.pick(words.FOODS), s.number(3, 14)
    given = s.number(1, total - 1)
    left = total - given
    left_words = f"{words.NUMBERS[left]} {food}" if left > 1 else f"one of the {food}"
    wish = s.pick(
        (
            "I forgot my lunch.",
            "I am so hungry.",
            "I have nothing to eat today.",
            f"Those {food} smell good.",
        )
    )
    return [
        f"{s.opening(hero, place)} In {hero.his} {s.pick(('bag', 'basket', 'box', 'pocket'))} "
        f"{hero.he} had "
        f"{words.NUMBERS[total]} {food}.",
        f"{friend.name} came by and looked {s.pick(words.SAD)}. {s.say(friend, wish)} "
        + s.pick(
            (
                f"{hero.name} thought for a moment.",
                f"At first {hero.name} wanted to keep everything.",
                f"{hero.name} did not wait a second.",
            )
        ),
        f"{s.say(hero, f'Here, take {words.NUMBERS[given]}.')} So {hero.name} gave "
        f"{words.NUMBERS[given]} "
        f"to {friend.name} and had {left_words} left. {friend.name} was {s.pick(words.GLAD)}.",
        s.moral(
            "Food tastes better when it is shared.",
            f"Since that day {hero.name} and {friend.name} have been friends.",
            "Half of something can make two people happy.",
        ),
    ]


def baking(s: Scene) -> list[str]:
    """Something is baked, goes wrong or right, and is given away."""
    hero, cake = s.child(), s.pick(words.CAKES)
    cook, neighbour = s.relative(hero), s.worker()
    one, two, three = s.several(words.INGREDIENTS, 3)
    minutes = s.number(2, 6) * 10
    if s.random() < 0.5:
        middle = (
            f"{hero.name} read a book and forgot the time. A black cloud came out of the oven. The "
            f"{cake} was burnt! "
            f"{s.say(cook, 'Never mind, we will try again.')} The second time {hero.name} sat in "
            f"front of the oven until it was done, and it was perfect."
        )
    else:
        middle = (
            f"{hero.name} watched the clock. After {minutes} minutes the whole house smelled "
            f"wonderful, and the {cake} "
            f"was {s.pick(('golden', 'just right', 'as soft as a cloud'))}."
        )
    return [
        f"{s.pick(('Today was', 'It was'))} the birthday of {neighbour.name}. {hero.name} wanted "
        "to bake "
        f"{a(cake)}, and "
        f"{cook.name} helped. "
        f"{s.say(cook, f'First we need {one}, then {two}, and last of all {three}.')}",
        f"{hero.name} mixed the {one} with the {two}. Then {hero.he} added the {three}, and they "
        "put it "
        f"into the oven for {minutes} minutes. {middle}",
        f"They carried the {cake} to {neighbour.name}. "
        f"{s.say(neighbour, s.pick(('For me?', 'What a surprise!')))} "
        f"{neighbour.He} cut it into {words.NUMBERS[s.number(4, 12)]} pieces. "
        + s.moral(
            "Giving is half of the joy.",
            f"{neighbour.Name} was {s.pick(words.GLAD)}.",
            "Who tries twice may win.",
        ),
    ]


def garden(s: Scene) -> list[str]:
    """A seed grows, and days are counted."""
    hero, plant, day = s.child(), s.pick(words.PLANTS), s.number(0, 6)
    teacher = s.relative(hero)
    wait = s.number(1, 6)
    came = words.DAYS[(day + wait) % 7]
    many = s.number(2, 20)
    return [
        f"On {words.DAYS[day]}, {teacher.name} gave {hero.name} a {plant} seed. "
        + s.say(
            teacher,
            s.pick(
                (
                    "Put it into the earth and give it water.",
                    "Small things need time.",
                    "It needs sun, water and patience.",
                )
            ),
        )
        + f" {hero.name} {s.pick(('dug a hole', 'took a pot'))} "
        f"{s.pick(('by the fence', 'behind the house', 'near the well'))}"
        f" and planted it.",
        f"Every day {hero.he} came to look. "
        + s.pick(("Nothing happened.", "There was only brown earth.", "A bird looked on, too."))
        + " "
        f"{s.say(hero, s.pick(('Is it asleep?', 'Maybe it is broken.', 'I will wait one more day.')))} But "
        + (f"{words.NUMBERS[wait]} days later" if wait > 1 else "the next day")
        + f", on {came}, a green tip came out.",
        f"By {s.pick(('summer', 'autumn', 'harvest time'))} the {plant} was "
        + s.pick(
            ("as tall as the door", "the pride of the street", f"bigger than {hero.name} had hoped")
        )
        + f". {hero.name} counted {words.NUMBERS[many]} new seeds and kept them "
        + s.pick(("in a jar", "in an envelope", "in a matchbox"))
        + ". "
        + s.moral(
            "Good things take time.",
            f"Next spring {hero.he} would share them with {hero.his} class.",
        ),
    ]


def broken(s: Scene) -> list[str]:
    """Something breaks; the truth is told."""
    hero, noun = s.child(), s.pick(("vase", "cup", "plate", "lamp", "jar", "bowl", "teapot"))
    thing = Thing(s.pick(words.COLOURS), noun)
    owner = s.relative(hero, s.random() < 0.7)
    doing = s.pick(
        (
            "playing with a ball",
            "dancing",
            "chasing the cat",
            "running through the room",
            "juggling spoons",
        )
    )
    fix = s.pick(
        (
            "glued the pieces together",
            "saved coins and bought a new one",
            "made a new one out of clay",
        )
    )
    hide = s.random() < 0.5
    return [
        f"{hero.name} was {doing} when it happened. Crash! The {thing.full} of {owner.name} lay "
        "on the floor in "
        f"{words.NUMBERS[s.number(3, 20)]} pieces. {hero.name} was {s.pick(words.SAD)}.",
        (
            f"First {hero.he} hid the pieces "
            f"{s.pick(('under the rug', 'in a drawer', 'behind the sofa'))}. "
            f"But {hero.he} could "
            f"not {s.pick(('sleep', 'eat', 'look anybody in the eye'))}. So {hero.he} went to "
            f"{owner.name}. "
            f""
            if hide
            else f"{hero.name} did not run away. {hero.He} went straight to {owner.name}. "
        )
        + s.say(hero, f"I broke your {thing.full}, and I am sorry."),
        s.say(
            owner,
            s.pick(("Thank you for telling me.", "It was only a thing.", "That took courage.")),
        )
        + f" Together they {fix}. "
        + s.moral(
            "The truth is lighter than a secret.",
            "A thing can be mended, and so can trust.",
            f"The {thing.noun} was never quite the same, but everybody liked it more.",
        ),
    ]


def birthday(s: Scene) -> list[str]:
    """A present is guessed and opened; ages add up."""
    hero, guest, age = s.child(), s.child(), s.number(4, 12)
    thing, box = s.thing(), s.pick(words.COLOURS)
    wrong = s.pick([toy for toy in words.TOYS[:12] if toy != thing.noun])
    return [
        f"{hero.name} woke up early, for today {hero.he} turned {words.NUMBERS[age]}. Last year "
        f"{hero.he} had been "
        f"{words.NUMBERS[age - 1]}. {s.sky} "
        f"{s.pick(('In the kitchen', 'On the table', 'At the window'))} "
        f"stood a cake with {words.NUMBERS[age]} candles.",
        f"{guest.name} came with {a(box)} box. {s.say(hero, 'What is in it?')} "
        f"{s.say(guest, 'Guess!')} "
        f"{hero.name} shook the box. {s.say(hero, f'Is it {a(wrong)}?')} "
        f"{s.say(guest, 'No, try again.')} "
        + (
            f"{s.say(hero, f'Then it must be {a(thing.noun)}.')} {s.say(guest, 'Yes, open it.')}"
            if s.random() < 0.4
            else s.say(hero, s.pick(("I give up.", "I have no idea.", "I cannot wait any longer.")))
        )
        + f" In the {box} box lay {a(thing.full)}.",
        f"{hero.name} was {s.pick(words.GLAD)}. "
        f"{s.say(hero, f'Next year I will be {words.NUMBERS[age + 1]}, and I will still have it.')} "
        + s.moral(
            f"They played with the {thing.noun} until the {s.pick(('moon', 'evening star'))} came "
            "out.",
            "The best part of a present is the friend who brings it.",
        ),
    ]


def brave(s: Scene) -> list[str]:
    """A fear is overcome step by step."""
    hero, place = s.child(), s.pick(words.PLACES)
    friend, fear, day = (
        s.child() if s.random() < 0.5 else s.relative(hero),
        s.pick(words.FEARS),
        s.number(0, 4),
    )
    trick = s.pick(
        (
            "Count to ten and breathe slowly.",
            "Hold my hand.",
            "Sing a song, it helps.",
            "Think of something funny.",
            "Be afraid and do it anyway.",
        )
    )
    return [
        f"{s.opening(hero, place)} But there was one thing: {hero.name} was afraid of {fear}. "
        + s.pick(
            (
                f"{hero.He} told nobody about it.",
                "Everybody knew it.",
                f"It had been so since {hero.he} was two.",
            )
        )
        + f" One day {friend.name} noticed. "
        f"{s.say(friend, s.pick(('Why do you look so pale?', f'Are you afraid of {fear}?')))}",
        f"{s.say(hero, 'A little.')} {s.say(friend, trick)} On {words.DAYS[day]} {hero.he} tried "
        "it for "
        f"one minute. On {words.DAYS[day + 1]} it was {words.NUMBERS[s.number(2, 9)]} minutes, "
        "and on "
        f"{words.DAYS[day + 2]} {hero.name} "
        f"{s.pick(('forgot to count', 'laughed', 'was not afraid any more'))}.",
        s.say(
            hero,
            s.pick(("I did it!", f"I am not afraid of {fear} any more.", "It was not so bad.")),
        )
        + " "
        + s.moral(
            "Courage grows when you use it.",
            f"{friend.Name} was {s.pick(words.GLAD)}.",
            "Even brave people are afraid sometimes.",
        ),
    ]


def shopping(s: Scene) -> list[str]:
    """Coins are spent, and what is left is right."""
    hero, seller, coins = s.child(), s.worker(), s.number(8, 20)
    sender, thing, food = s.relative(hero), s.thing(), s.pick(words.FOODS)
    price = s.number(1, 4)
    second = s.number(1, coins - price - 1)
    left = coins - price - second
    n = words.NUMBERS
    coin = "coin" if left == 1 else "coins"
    end = s.pick(
        (
            f"brought the {n[left]} {coin} back home",
            f"put the {n[left]} {coin} into a jar",
            f"gave the {n[left]} {coin} to a street singer",
        )
    )
    return [
        f"{sender.Name} gave {hero.name} {n[coins]} coins. "
        f"{s.say(sender, f'Please buy some {food} at the market.')} {s.sky} "
        f"{hero.name} {s.pick(('skipped', 'walked', 'ran', 'hurried'))} down the road.",
        f"The {food} cost {n[price]} {'coin' if price == 1 else 'coins'}, so {hero.name} had "
        f"{n[coins - price]} coins left. Then "
        f"{hero.he} saw {a(thing.full)}. {s.say(hero, f'How much is the {thing.noun}?')} "
        f"{s.say(seller, f'It costs {n[second]}' + (' coin.' if second == 1 else ' coins.'))} "
        f"{hero.He} "
        f"bought it, and now there {'was' if left == 1 else 'were'} {n[left]} {coin} left.",
        f"{hero.name} {end}. "
        f"{s.say(sender, s.pick(('You counted well.', f'And what is the {thing.noun} for?', 'Thank you.')))} "
        + s.moral(
            "Count your money twice.",
            f"The {food} were gone by the evening, but the {thing.noun} lasted for years.",
        ),
    ]
