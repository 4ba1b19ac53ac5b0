"""Endless small stories, the same for the same seed: text for a demo without a real model.

A plot is a template: `[a|b]` is a choice, `{slot}` a word of the story, `a(n)` the article that
fits. Surprises are choices (who, where, what, how many) and the rest follows from them: what is
lost is found, what is counted adds up. So a small model learns much in minutes.

    for text in stories(1_000_000, seed=0): ...
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from xinslm.files import new_file

NAMES = {
    "girl": "Ada Alma Anna Bella Carla Clara Dora Edith Elsa Emma Flora Freya Greta Hanna Ida Ines "
    "Iris Ivy Jana Julia Karin Kira Lara Lena Lotte Lucy Maria Marta Mila Nadia Nina Nora Olga "
    "Paula Rita Rosa Ruth Sara Selma Sofia Tara Tilda Uma Vera Viola Wanda Yara Zoe",
    "boy": "Adam Albert Anton Ben Boris Carl Daniel David Edgar Emil Erik Felix Finn Frank George "
    "Hans Henry Hugo Igor Ivan Jacob Jan Jonas Karl Kurt Leo Linus Lukas Marco Martin Max Nils "
    "Noah Oscar Otto Paul Peter Ravi Robin Sami Simon Stefan Theo Thomas Tim Toby Victor Walter",
}
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = {
    "look": "red blue green yellow orange purple white black grey silver golden small big old new "
    "shiny wooden round heavy light tiny strange plain striped",
    "toy": "ball kite doll drum whistle marble puzzle wagon boat top rope lantern basket scarf hat "
    "glove ring key button bell book pencil brush mirror cup spoon blanket pillow umbrella coin "
    "shell feather stone ribbon map compass trumpet flute camera clock ladder bucket shovel candle "
    "mask necklace",
    "food": "apples pears plums cherries grapes peaches nuts carrots tomatoes cookies buns pies "
    "pancakes waffles sandwiches berries melons lemons rolls muffins tarts dumplings radishes",
    "trait": "kind brave shy curious clever quiet cheerful patient gentle lively careful stubborn "
    "proud honest polite sleepy funny thoughtful busy friendly playful",
    "glad": "happy glad proud delighted thankful relieved",
    "sad": "sad worried upset unhappy troubled disappointed anxious",
    "plant": "sunflower bean tomato pumpkin carrot tulip radish pea strawberry melon",
    "job": "baker farmer teacher doctor painter sailor postman gardener tailor miller shepherd",
    "animal": "kitten puppy lamb duckling owlet foal goat squirrel hedgehog rabbit",
    "weather": "sunny rainy windy snowy foggy cloudy stormy frosty hot mild",
    "month": "January February March April May June July August September October November",
}
PLACES = (
    ("in the forest", "under a fern|behind an oak tree|inside a hollow log|next to an anthill"),
    ("at the beach", "behind a sand castle|under a striped towel|between two rocks|in a shell"),
    ("in the park", "under a bench|behind the fountain|beside the swings|below the slide"),
    ("at the market", "under a table|behind the fish stand|next to the carts|between two baskets"),
    ("on the farm", "behind the barn|under the tractor|in a heap of hay|next to the well"),
    ("in the library", "between two thick books|under a desk|behind the shelf|on the window seat"),
    ("in the garden", "under a rose bush|behind the shed|among the beans|beside the watering can"),
    ("by the river", "under the bridge|among the reeds|on a flat stone|behind a willow"),
    ("at the station", "under the clock|behind a suitcase|on platform two|next to the machine"),
    ("in the attic", "inside an old trunk|behind the chimney|under a dusty sheet|on a beam"),
    ("on the hill", "under the lone pine|behind a grey boulder|in the grass|beside the post"),
    ("at the harbour", "under an old boat|behind a coil of rope|in a lobster basket|by the lamp"),
)
OPENING = """[Once upon a time there was a(n) {trait} {kind} named {hero}. One {weather}
[morning|afternoon|evening] {he} was {place}.|One {weather} day, a(n) {trait} {kind} called {hero}
was {place}.|It was a(n) {weather} day in {month}. {hero}, a(n) {trait} {kind}, was {place}.]
[The wind shook the trees.|{He} liked to [draw|sing|read|swim|dance|count clouds].|]"""
MORAL = """[They talked about it for a long time.|It was a day to remember.|That night everybody
slept well.|From then on, things were better.|Then it was time to go home.]"""
PLOTS = {
    "lost_and_found": (
        OPENING
        + """ {He} had {his} {look} {toy} with {him}, but suddenly it was gone. {hero} was
        {sad}.""",
        """{other} [came along|was passing by|came running]. "[What is wrong?|Can I help you?]"
        asked {other}. "I have lost my {look} {toy}," said {hero}. "[Let us look for it
        together.|It cannot be far away.]" """,
        """They looked {spot}, but there was [nothing|no trace of it]. Then they looked {spot2}.
        [No luck.|Nothing.] At last [{hero}|{other}] looked {spot3}, and there was the {look}
        {toy}! {hero} was {glad}. "Thank you," {he} said, "I will take better care of my {toy}." """
        + MORAL,
    ),
    "sharing": (
        OPENING + """ In {his} [bag|basket|box|pocket] {he} had {total} {food}.""",
        """{other} came by and looked {sad}. "[I forgot my lunch.|I am so hungry.|Those {food} smell
        good.]" [{hero} thought for a moment.|At first {hero} wanted to keep everything.|{hero} did
        not wait a second.]""",
        """"Here, take {given}," said {hero}. So {hero} gave {given} to {other} and had {left} left.
        {other} was {glad}. [Food tastes better when it is shared.|Since that day they have been
        friends.|Half of something can make two people happy.]""",
    ),
    "shopping": (
        """{hero}'s [mom|dad|aunt|uncle] gave {him} {total} coins. "Please buy some {food} at the
        market." It was a(n) {weather} day, and {hero} [skipped|walked|ran] down the road.""",
        """The {food} cost {given} coins, so {hero} had {left} coins left. Then {he} saw a(n) {look}
        {toy}. "How much is the {toy}?" asked {hero}. "It costs one coin," said the {job}. {He}
        bought it, and now there were {less} coins left.""",
        """{hero} [brought|carried] the {less} coins back home. "[You counted well.|And what is the
        {toy} for?]" """
        + MORAL,
    ),
    "garden": (
        """On {day}, the {job} gave {hero} a(n) {plant} seed. "[Small things need time.|It needs
        sun, water and patience.]" {hero} [dug a hole|took a pot] [by the fence|behind the
        house|near the well] and planted it.""",
        """Every day {he} came to look. [Nothing happened.|There was only brown earth.|A bird looked
        on.] "[Is it asleep?|I will wait one more day.]" said {hero}. But {wait} days later, on
        {later}, a green tip came out.""",
        """By [summer|autumn|harvest time] the {plant} was [as tall as the door|the pride of the
        street]. {hero} was {glad}. [Good things take time.|Next spring {he} would share it with
        {other}.]""",
    ),
    "broken": (
        """{hero} was [playing with a ball|dancing|chasing the cat] when it happened. Crash! The
        {look} [vase|cup|plate|lamp] of {his} [mom|dad|aunt|uncle] lay on the floor in {total}
        pieces. {hero} was {sad}.""",
        """[First {he} hid the pieces [under the rug|in a drawer]. But {he} could not [sleep|eat].
        So {he} told the truth.|{hero} did not run away.] "I broke it, and I am sorry," {he}
        said.""",
        """"[Thank you for telling me.|It was only a thing.|That took courage.]" Together they
        [glued the pieces together|saved coins and bought a new one]. [The truth is lighter than a
        secret.|A thing can be mended, and so can trust.]""",
    ),
    "rescue": (
        OPENING
        + """ Then {he} met {other}, who was out of breath. "A(n) {animal} is stuck
        {trap}!" They ran there at once, and the {animal} looked at them with big eyes.""",
        """"[What can we do?|How do we get there?]" asked {other}. {hero} fetched {tool} from the
        {job}. While {other} held it, {he} climbed slowly and took the {animal} in {his} arms.""",
        """The {animal} was {glad}, and so were {hero} and {other}. They gave it [some milk|a
        carrot|a bed of hay] and called it [Button|Clover|Cocoa|Fern|Maple|Pebble|Pickle]. """
        + MORAL,
    ),
}
TRAPS = (
    ("on a high roof", "a ladder"),
    ("in a deep hole", "a long rope"),
    ("in the mud", "a wooden plank"),
    ("in a tall tree", "a ladder"),
)


def story(rng: random.Random) -> str:
    """Tell one story, its paragraphs divided by blank lines."""
    plot = PLOTS[rng.choice(list(PLOTS))]
    slots = choose_slots(rng)
    return "\n\n".join(fill(" ".join(paragraph.split()), slots, rng) for paragraph in plot)


def choose_slots(rng: random.Random) -> dict[str, str]:
    """Choose who, where, what and how many."""
    kind = rng.choice(("girl", "boy"))
    hero = rng.choice(NAMES[kind].split())
    he, him, his = PRONOUNS[kind]
    place, spots = rng.choice(PLACES)
    first, second, third = rng.sample(spots.split("|"), 3)
    total = rng.randint(6, 20)
    given = rng.randint(2, total - 3)
    day, wait = rng.randrange(7), rng.randint(2, 6)
    trap, tool = rng.choice(TRAPS)
    chosen = {name: rng.choice(words.split()) for name, words in WORDS.items()}
    others = [name for names in NAMES.values() for name in names.split() if name != hero]
    return chosen | {
        **{"kind": kind, "hero": hero, "he": he, "him": him, "his": his, "He": he.capitalize()},
        **{"other": rng.choice(others), "place": place, "trap": trap, "tool": tool},
        **{"spot": first, "spot2": second, "spot3": third},
        **{"total": NUMBERS[total], "given": NUMBERS[given], "left": NUMBERS[total - given]},
        **{"less": NUMBERS[total - given - 1], "wait": NUMBERS[wait]},
        **{"day": DAYS[day], "later": DAYS[(day + wait) % 7]},
    }


def fill(template: str, slots: dict[str, str], rng: random.Random) -> str:
    """Make the choices, innermost first, and fill the slots."""
    while "[" in template:
        template = re.sub(
            r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), template
        )
    text = " ".join(template.format(**slots).split())
    return re.sub(
        r"\b([Aa])\(n\) (?=(\w))",
        lambda found: f"{found[1]}{'n' if found[2] in 'aeiou' else ''} ",
        text.replace("a(n) honest", "an honest"),
    )


def stories(num_bytes: int, seed: int = 0) -> Iterator[str]:
    """Tell stories until they have `num_bytes` bytes of UTF-8 or a little more."""
    rng = random.Random(f"stories {seed}")
    written = 0
    while written < num_bytes:
        text = story(rng)
        written += len(text.encode())
        yield text


def write_stories(path: Path, num_bytes: int, seed: int = 0) -> None:
    """Write about `num_bytes` of stories as records {"text"}."""
    with new_file(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for text in stories(num_bytes, seed):
            file.write(json.dumps({"text": text}) + "\n")
