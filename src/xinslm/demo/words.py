"""The words that the demo's stories are made of, all written for this project."""

from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return text.split("|")


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(one, two) for one, _, two in (pair.partition("-") for pair in text.split("|"))]


GIRLS = _words(
    "Ada Alma Anna Bella Birgit Carla Clara Dora Edith Elsa Emma Esther Flora Freya Greta Hanna "
    "Ida Ines Iris "
    "Ivy Jana Julia Karin Kira Lara Lena Lotte Lucy Maja Maria Marta Mila Mina Nadia Nina Nora "
    "Olga Paula "
    "Petra Rita Rosa Ruth Sara Selma Sofia Tara Tessa Tilda Uma Vera Viola Wanda Yara Zoe"
)
BOYS = _words(
    "Adam Albert Anton Arno Ben Boris Carl Cyrus Daniel David Edgar Emil Erik Felix Finn Frank "
    "Fritz George "
    "Gustav Hans Henry Hugo Igor Ivan Jacob Jan Jonas Karl Kurt Leo Linus Lukas Marco Martin Max "
    "Mirko Nils "
    "Noah Oscar Otto Paul Peter Ravi Robin Sami Simon Stefan Theo Thomas Tim Toby Victor Walter "
    "Yusuf"
)
ANIMAL_NAMES = _words(
    "Biscuit Bramble Button Clover Cocoa Cricket Dumpling Fern Ginger Hazel Maple Mocha Nibbles "
    "Nutmeg Olive "
    "Peanut Pebble Pepper Pickle Poppy Puddle Pumpkin Rusty Shadow Smoky Snowy Socks Sparky Spot "
    "Sunny Toffee "
    "Truffle Tulip Waffles Whiskers Willow"
)


class Animal(NamedTuple):
    """An animal and what every child knows of it."""

    name: str
    sound: str
    baby: str
    food: str
    home: str


ANIMALS = tuple(
    Animal(*line.split(", "))
    for line in """cat, meow, kitten, fish, house
dog, woof, puppy, meat, kennel
cow, moo, calf, grass, barn
sheep, baa, lamb, clover, meadow
pig, oink, piglet, potatoes, sty
horse, neigh, foal, hay, stable
duck, quack, duckling, pondweed, pond
hen, cluck, chick, corn, coop
goose, honk, gosling, barley, pond
owl, hoot, owlet, mice, hollow tree
frog, croak, tadpole, flies, pond
mouse, squeak, pup, cheese, hole
donkey, hee-haw, foal, carrots, stable
wolf, howl, cub, meat, den
lion, roar, cub, meat, den
bear, growl, cub, honey, cave
bee, buzz, larva, nectar, hive
crow, caw, nestling, seeds, nest
goat, bleat, kid, leaves, barn
snake, hiss, hatchling, eggs, hole""".splitlines()
)
PETS = _words("cat dog duck hen mouse goat rabbit hedgehog squirrel sparrow turtle lamb fox")


class Place(NamedTuple):
    """Somewhere a story happens: 'in the forest', 'the forest', and corners of it to look into."""

    at: str
    name: str
    spots: tuple[str, ...]


PLACES = tuple(
    Place(
        f"{line.split(': ')[0]} the {line.split(': ')[1]}",
        f"the {line.split(': ')[1]}",
        tuple(line.split(": ")[2].split(", ")),
    )
    for line in """in: forest: under a fern, behind an oak tree, inside a hollow log, next to an anthill
at: beach: behind a sand castle, under a striped towel, between two rocks, inside a shell
in: park: under a bench, behind the fountain, beside the swings, below the slide
at: market: under a table, behind the fish stand, next to the flower cart, between two baskets
on: farm: behind the barn, under the tractor, in a heap of hay, next to the well
in: library: between two thick books, under a desk, behind the tall shelf, on the window seat
in: garden: under a rose bush, behind the shed, among the beans, beside the watering can
by: river: under the bridge, among the reeds, on a flat stone, behind a willow
in: kitchen: behind the flour jar, under the stove, inside a copper pot, on the top shelf
at: station: under the clock, behind a suitcase, on platform two, next to the ticket machine
in: attic: inside an old trunk, behind the chimney, under a dusty sheet, on a beam
on: hill: under the lone pine, behind a grey boulder, in the tall grass, beside the kite post
in: museum: behind a statue, under the staircase, beside the dinosaur, in the coat room
at: harbour: under an upturned boat, behind a coil of rope, in a lobster basket, next to the lamp post
in: orchard: under an apple tree, behind the ladder, in an empty crate, beside the beehive
in: schoolyard: under the stairs, behind the goal, inside the sandbox, beside the gate
at: lake: on the jetty, under a canoe, behind the boathouse, among the water lilies
in: village: behind the bakery, under the church bell, beside the pump, on the stone wall""".splitlines()
)

INDOORS = ("the library", "the kitchen", "the attic", "the museum", "the station")
OUTDOORS = tuple(place for place in PLACES if place.name not in INDOORS)

COLOURS = _words(
    "red blue green yellow orange purple pink white black brown grey silver golden turquoise"
)
LOOKS = _words(
    "small big old new shiny wooden soft round heavy light long tiny pretty strange plain striped"
)
TOYS = _words(
    "ball kite doll drum whistle marble puzzle wagon boat train top rope lantern basket scarf hat "
    "mitten "
    "glove ring key button bell book pencil brush mirror cup spoon blanket pillow umbrella coin "
    "shell feather "
    "stone ribbon map compass trumpet flute camera clock ladder bucket shovel candle mask "
    "necklace bracelet"
)
FOODS = _words(
    "apples pears plums cherries grapes peaches nuts carrots tomatoes cookies buns pies pancakes "
    "waffles "
    "sandwiches berries melons lemons rolls muffins tarts pretzels dumplings radishes"
)
CAKES = _phrases(
    "apple cake|carrot cake|plum pie|lemon cake|berry tart|nut bread|honey cake|cheese pie|ginger "
    "cake"
)
INGREDIENTS = _words("flour sugar butter eggs milk honey salt cinnamon cream nuts")
PLANTS = _words("sunflower bean tomato pumpkin carrot tulip radish pea strawberry melon")
HOBBIES = _phrases(
    "to draw|to sing|to climb trees|to read about ships|to count clouds|to ride a bicycle|to "
    "swim|to dance|"
    "to bake with friends|to build towers|to look at the stars|to collect stones|to play chess|"
    "to paint birds|to tell jokes|to run fast|to fish in the stream|to write letters|to watch ants|"
    "to skip stones|to whistle|to invent machines|to fold paper boats|to play the drum|"
    "to listen to old songs|to feed the birds"
)
TRAITS = _words(
    "kind brave shy curious clever quiet cheerful patient gentle lively careful stubborn proud "
    "honest polite "
    "sleepy funny thoughtful hungry busy friendly playful"
)
GLAD = _phrases("happy|glad|proud|very pleased|full of joy|delighted|thankful|relieved")
SAD = _phrases("sad|worried|upset|close to tears|unhappy|troubled|disappointed|anxious")
FEARS = _phrases(
    "the dark|thunder|deep water|big dogs|high places|spiders|the old cellar|loud noises|the "
    "dentist|"
    "speaking in front of the class|riding a horse|the long bridge"
)
CHORES = _phrases(
    "swept the floor|washed the dishes|fed the hens|watered the flowers|folded the towels|carried "
    "the wood|"
    "cleaned the windows|picked the beans|made the beds|brushed the dog|raked the leaves|set the "
    "table"
)
REWARDS = _phrases(
    "a story by the fire|a slice of warm pie|a trip to the lake|a new book|hot cocoa"
)
JOBS = _words(
    "baker farmer teacher doctor painter sailor postman gardener tailor miller clockmaker shepherd"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
WEATHER = (
    ("sunny", "The sun was warm and the sky was blue."),
    ("rainy", "Rain ran down the windows, and there were puddles everywhere."),
    ("windy", "The wind shook the trees and chased the leaves."),
    ("snowy", "Snow lay on the roofs, and the air was cold."),
    ("foggy", "The fog was so thick that the houses looked like ghosts."),
    ("cloudy", "Grey clouds hung low, but it stayed dry."),
    ("stormy", "Thunder rolled over the hills and lightning lit up the sky."),
    ("frosty", "Ice glittered on the grass like glass."),
    ("hot", "It was so hot that even the bees were resting."),
    ("mild", "A mild breeze smelled of flowers."),
)
OPPOSITES = _pairs(
    "hot-cold|big-small|fast-slow|up-down|day-night|wet-dry|hard-soft|full-empty|old-young|happy-sad|"
    "loud-quiet|light-dark|high-low|near-far|open-closed|early-late|thick-thin|strong-weak|clean-dirty|"
    "left-right|first-last|sweet-sour|rich-poor|long-short|front-back|inside-outside"
)
THING_COLOURS = _pairs(
    "a lemon-yellow|grass-green|snow-white|a ripe strawberry-red|coal-black|a carrot-orange|"
    "the clear sky-blue|milk-white|a ripe banana-yellow|a frog-green|chocolate-brown|an "
    "elephant-grey|"
    "a pea-green|a plum-purple"
)
MIXTURES = (
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "blue", "purple"),
    ("red", "white", "pink"),
    ("black", "white", "grey"),
)
SYLLABLES = _words(
    "ba bel bor ca cor da dal del do du fa fen gal gor ha hel il jo ka kel kor la lan lin lo lu "
    "ma mar mel mi "
    "mor na nel no or pa pel ra ran ri ro sa sel sil ta tel ti tor va vel vi wen ya zan zo"
)
TOWN_ENDS = _words("ton ville burg field mouth ford haven stad dale port wick")
LAND_ENDS = _words("ia land or mark ora eth una enia")
