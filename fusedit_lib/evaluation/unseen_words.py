"""Prompts in words that no caption of an emoji contains, and the emoji that they ask for.

prepare_data.py emoji writes captions from the labels and tags of emojibase. The content words of a
prompt, which are all but FUNCTION_WORDS, occur in no label and in no tag, neither in the singular
nor in the plural. Nor are they formed from a word that names their right answers, as "piglet" and
"bobsled" would be; only "swedish" and the other adjectives of flags are. A model that was trained
on the captions has read none of them; only its language model knows them. It does read pieces of
words, though: 44 of the 226 prompts consist entirely of tokens of Gemma 3 that occur in some
caption. A style is to be added: "sedan, flat" or "sedan, 3d".
"""
from typing import Literal, NamedTuple

# synonym: another word for what the labels name, or for something that looks like it; hyponym: a
# kind or an instance of it; hypernym: a class that it belongs to; paraphrase: a description of it,
# or something that stands for it.
Kind = Literal["synonym", "hyponym", "hypernym", "paraphrase"]

FUNCTION_WORDS = frozenset(
    "a an the it its is are be been by of in on for from to with where what something".split())


class UnseenWord(NamedTuple):
    """A prompt without a style, and the labels that are right answers."""
    prompt: str
    kind: Kind
    labels: tuple[str, ...]                 # in lower case, without skin tones


def persons(*roles: str) -> tuple[str, ...]:
    """The labels of roles that emojibase has for a person, a man and a woman."""
    return tuple(label for role in roles for label in (role, f"man {role}", f"woman {role}"))


# ---------------------------------------------------------------------------- emoji that are alike
DOGS = ("dog face", "dog", "guide dog", "service dog", "poodle")
CATS = ("cat face", "cat", "black cat", "grinning cat", "grinning cat with smiling eyes",
        "cat with tears of joy", "smiling cat with heart-eyes", "cat with wry smile",
        "kissing cat", "weary cat", "crying cat", "pouting cat")
HORSES = ("horse face", "horse", "horse racing", "carousel horse")
PIGS = ("pig face", "pig", "pig nose", "boar")
CATTLE = ("cow face", "cow", "ox", "water buffalo")
MONKEYS = ("monkey face", "monkey", "see-no-evil monkey", "hear-no-evil monkey",
           "speak-no-evil monkey")
WHALES = ("whale", "spouting whale")
CHEERFUL = ("grinning face", "grinning face with big eyes", "grinning face with smiling eyes",
            "beaming face with smiling eyes", "grinning squinting face", "smiling face",
            "smiling face with smiling eyes", "smiling face with open hands",
            "face with tears of joy", "partying face", "star-struck")
LAUGHING = ("face with tears of joy", "rolling on the floor laughing", "grinning squinting face",
            "grinning face", "grinning face with big eyes", "grinning face with smiling eyes",
            "beaming face with smiling eyes", "grinning face with sweat", "cat with tears of joy")
FURIOUS = ("angry face", "enraged face", "face with steam from nose",
           "face with symbols on mouth", "angry face with horns", "pouting cat")
SAD = ("crying face", "loudly crying face", "pensive face", "disappointed face", "frowning face",
       "slightly frowning face", "worried face", "sad but relieved face",
       "downcast face with sweat", "face holding back tears", "crying cat")
SURPRISED = ("astonished face", "hushed face", "face with open mouth", "exploding head",
             "flushed face", "face screaming in fear", "shaking face",
             "face with open eyes and hand over mouth", "anguished face",
             "frowning face with open mouth", "weary cat")
AFRAID = ("fearful face", "face screaming in fear", "anxious face with sweat", "anguished face",
          "frowning face with open mouth", "weary cat")
HOUSES = ("house", "house with garden", "houses", "hut", "derelict house")
MOUNTAINS = ("mountain", "snow-capped mountain", "mount fuji")
CARS = ("automobile", "oncoming automobile")
LARGE_SHIPS = ("ship", "passenger ship", "ferry")
ROWING_BOATS = ("person rowing boat", "man rowing boat", "woman rowing boat")
BOATS = ("sailboat", "canoe", "speedboat", "motor boat", *LARGE_SHIPS, *ROWING_BOATS)
LARGE_PLANES = ("airplane", "airplane departure", "airplane arrival")
SNOWFALL = ("cloud with snow", "snowflake", "snowman")
RAINFALL = ("cloud with rain", "sun behind rain cloud", "umbrella with rain drops")
UMBRELLAS = ("umbrella", "umbrella on ground", "umbrella with rain drops", "closed umbrella",
             "beach with umbrella")
CITIES = ("cityscape", "cityscape at dusk", "office building", "night with stars", "sunset")
BOOKS = ("books", "open book", "closed book", "green book", "blue book", "orange book",
         "notebook", "notebook with decorative cover")
HATS = ("top hat", "woman’s hat", "billed cap", "graduation cap", "military helmet",
        "rescue worker’s helmet", "crown")
CARD_SUITS = ("joker", "spade suit", "heart suit", "diamond suit", "club suit")
BEERS = ("beer mug", "clinking beer mugs")
BLADES = ("dagger", "crossed swords")
QUESTIONS = ("red question mark", "white question mark", "exclamation question mark")
HAMMERS = ("hammer", "hammer and pick", "hammer and wrench")

# ---------------------------------------------------------------------------- the prompts
ANIMALS = [
    UnseenWord("hound", "synonym", DOGS),
    UnseenWord("beagle", "hyponym", tuple(label for label in DOGS if label != "poodle")),
    UnseenWord("it barks", "paraphrase", DOGS),
    UnseenWord("tabby", "hyponym", tuple(label for label in CATS if label != "black cat")),
    UnseenWord("it purrs", "paraphrase", CATS),
    UnseenWord("stallion", "hyponym", HORSES),
    UnseenWord("pony", "hyponym", HORSES),
    UnseenWord("it neighs", "paraphrase", HORSES),
    UnseenWord("swine", "synonym", PIGS),
    UnseenWord("it oinks", "paraphrase", PIGS),
    UnseenWord("heifer", "hyponym", ("cow face", "cow")),
    UnseenWord("bovine", "hypernym", (*CATTLE, "bison")),
    UnseenWord("it brays", "paraphrase", ("donkey",)),
    UnseenWord("it bleats", "paraphrase", ("ewe", "goat", "ram")),
    UnseenWord("chimpanzee", "synonym", (*MONKEYS, "orangutan", "gorilla")),
    UnseenWord("primate", "hypernym", (*MONKEYS, "orangutan", "gorilla")),
    UnseenWord("pachyderm", "hypernym",
               ("elephant", "rhinoceros", "hippopotamus", "mammoth")),
    UnseenWord("the sovereign of the savanna", "paraphrase", ("lion",)),
    UnseenWord("hare", "synonym", ("rabbit", "rabbit face")),
    UnseenWord("rodent", "hypernym",
               ("mouse", "mouse face", "rat", "hamster", "chipmunk", "beaver")),
    UnseenWord("porcupine", "synonym", ("hedgehog",)),
    UnseenWord("wallaby", "synonym", ("kangaroo",)),
    UnseenWord("cobra", "hyponym", ("snake",)),
    UnseenWord("alligator", "synonym", ("crocodile",)),
    UnseenWord("toad", "synonym", ("frog",)),
    UnseenWord("it croaks", "paraphrase", ("frog",)),
    UnseenWord("iguana", "hyponym", ("lizard",)),
    UnseenWord("something prehistoric", "paraphrase", ("sauropod", "t-rex", "mammoth")),
    UnseenWord("cockerel", "synonym", ("rooster", "chicken")),
    UnseenWord("falcon", "synonym", ("eagle",)),
    UnseenWord("sparrow", "hyponym", ("bird", "black bird")),
    UnseenWord("pigeon", "synonym", ("dove", "bird")),
    UnseenWord("macaw", "hyponym", ("parrot",)),
    UnseenWord("it quacks", "paraphrase", ("duck",)),
    UnseenWord("it hoots", "paraphrase", ("owl",)),
    UnseenWord("moby dick", "hyponym", WHALES),
    UnseenWord("porpoise", "synonym", ("dolphin",)),
    UnseenWord("trout", "hyponym", ("fish",)),
    UnseenWord("crustacean", "hypernym", ("crab", "lobster", "shrimp")),
    UnseenWord("cephalopod", "hypernym", ("octopus", "squid")),
    UnseenWord("clam", "synonym", ("oyster",)),
    UnseenWord("wasp", "synonym", ("honeybee",)),
    UnseenWord("moth", "synonym", ("butterfly",)),
    UnseenWord("tarantula", "hyponym", ("spider",)),
    UnseenWord("conifer", "hypernym", ("evergreen tree", "christmas tree")),
    UnseenWord("oak", "hyponym", ("deciduous tree",)),
    UnseenWord("nosegay", "synonym", ("bouquet",)),
    UnseenWord("saguaro", "hyponym", ("cactus",)),
]
FOOD = [
    UnseenWord("clementine", "synonym", ("tangerine",)),
    UnseenWord("honeydew", "hyponym", ("melon",)),
    UnseenWord("jalapeno", "hyponym", ("hot pepper",)),
    UnseenWord("gherkin", "synonym", ("cucumber",)),
    UnseenWord("spud", "synonym", ("potato",)),
    UnseenWord("yam", "synonym", ("roasted sweet potato",)),
    UnseenWord("spinach", "hyponym", ("leafy green",)),
    UnseenWord("shallot", "hyponym", ("onion",)),
    UnseenWord("bratwurst", "hyponym", ("hot dog",)),
    UnseenWord("sourdough", "hyponym", ("bread", "baguette bread")),
    UnseenWord("cheddar", "hyponym", ("cheese wedge",)),
    UnseenWord("laid by hens", "paraphrase",
               ("egg", "cooking", "nest with eggs", "hatching chick")),
    UnseenWord("sirloin", "hyponym", ("cut of meat",)),
    UnseenWord("linguine", "hyponym", ("spaghetti",)),
    UnseenWord("udon", "hyponym", ("steaming bowl",)),
    UnseenWord("goulash", "hyponym", ("pot of food",)),
    UnseenWord("nigiri", "hyponym", ("sushi",)),
    UnseenWord("wonton", "hyponym", ("dumpling",)),
    UnseenWord("gelato", "synonym", ("ice cream", "soft ice cream")),
    UnseenWord("muffin", "synonym", ("cupcake",)),
    UnseenWord("biscuit", "synonym", ("cookie",)),
    UnseenWord("bonbon", "synonym", ("candy",)),
    UnseenWord("margarine", "synonym", ("butter",)),
    UnseenWord("cappuccino", "hyponym", ("hot beverage",)),
    UnseenWord("champagne", "hyponym", ("bottle with popping cork", "clinking glasses")),
    UnseenWord("merlot", "hyponym", ("wine glass",)),
    UnseenWord("lager", "hyponym", BEERS),
    UnseenWord("fermented barley", "paraphrase", (*BEERS, "tumbler glass")),
    UnseenWord("bourbon", "hyponym", ("tumbler glass",)),
    UnseenWord("silverware", "synonym",
               ("fork and knife", "fork and knife with plate", "spoon")),
    UnseenWord("kettle", "synonym", ("teapot",)),
]
FACES = [
    UnseenWord("gleeful", "synonym", CHEERFUL),
    UnseenWord("elated", "synonym", CHEERFUL),
    UnseenWord("guffaw", "synonym", LAUGHING),
    UnseenWord("weeping", "synonym",
               ("crying face", "loudly crying face", "face holding back tears",
                "smiling face with tear", "sad but relieved face", "crying cat")),
    UnseenWord("sorrowful", "synonym", SAD),
    UnseenWord("irate", "synonym", FURIOUS),
    UnseenWord("livid", "synonym", FURIOUS),
    UnseenWord("terrified", "synonym", AFRAID),
    UnseenWord("flabbergasted", "synonym", SURPRISED),
    UnseenWord("slumber", "synonym", ("sleeping face", "sleepy face", "zzz", "person in bed")),
    UnseenWord("drowsy", "synonym",
               ("sleepy face", "sleeping face", "yawning face", "tired face", "weary face",
                "face with bags under eyes", "woozy face")),
    UnseenWord("smitten", "synonym",
               ("smiling face with heart-eyes", "smiling face with hearts",
                "face blowing a kiss", "smiling cat with heart-eyes")),
    UnseenWord("queasy", "synonym", ("nauseated face", "face vomiting", "woozy face")),
    UnseenWord("shivering", "synonym", ("cold face", "shaking face")),
    UnseenWord("unwell", "synonym",
               ("face with thermometer", "face with medical mask", "face with head-bandage",
                "nauseated face", "face vomiting", "sneezing face", "woozy face", "hot face")),
    UnseenWord("jester", "synonym", ("clown face", "joker")),
    UnseenWord("satan", "synonym", ("smiling face with horns", "angry face with horns")),
    UnseenWord("phantom", "synonym", ("ghost",)),
    UnseenWord("cranium", "synonym", ("skull", "skull and crossbones")),
    UnseenWord("automaton", "synonym", ("robot",)),
    UnseenWord("martian", "hyponym", ("alien", "alien monster")),
    UnseenWord("excrement", "synonym", ("pile of poo",)),
]
PEOPLE = [
    UnseenWord("physician", "synonym", persons("health worker")),
    UnseenWord("constable", "synonym", persons("police officer")),
    UnseenWord("warlock", "synonym", ("mage", "man mage")),
    UnseenWord("cosmonaut", "synonym", persons("astronaut")),
    UnseenWord("neil armstrong", "hyponym", ("astronaut", "man astronaut")),
    UnseenWord("sherlock holmes", "hyponym", ("detective", "man detective")),
    UnseenWord("bricklayer", "hyponym", persons("construction worker")),
    UnseenWord("aviator", "synonym", persons("pilot")),
    UnseenWord("vocalist", "synonym", persons("singer")),
    UnseenWord("programmer", "synonym", persons("technologist")),
    UnseenWord("toddler", "hyponym", ("baby", "child", "boy", "girl")),
    UnseenWord("duchess", "hyponym", ("princess", "person with crown")),
    UnseenWord("sprinter", "hyponym",
               ("person running", "man running", "woman running",
                "person running: facing right", "man running: facing right",
                "woman running: facing right")),
    UnseenWord("nostrils", "synonym", ("nose", "pig nose")),
    UnseenWord("molar", "hyponym", ("tooth",)),
    UnseenWord("femur", "hyponym", ("bone",)),
    UnseenWord("cherub", "synonym", ("baby angel", "smiling face with halo")),
]
TRAVEL = [
    UnseenWord("sedan", "hyponym", CARS),
    UnseenWord("toyota", "hyponym", (*CARS, "sport utility vehicle", "pickup truck")),
    UnseenWord("ferrari", "hyponym", (*CARS, "racing car")),
    UnseenWord("jeep", "hyponym", (*CARS, "sport utility vehicle")),
    UnseenWord("moped", "synonym", ("motor scooter", "motorcycle")),
    UnseenWord("harley", "hyponym", ("motorcycle",)),
    UnseenWord("freighter", "hyponym", LARGE_SHIPS),
    UnseenWord("titanic", "hyponym", LARGE_SHIPS),
    UnseenWord("watercraft", "hypernym", BOATS),
    UnseenWord("kayak", "synonym", ("canoe", *ROWING_BOATS)),
    UnseenWord("catamaran", "hyponym", ("sailboat",)),
    UnseenWord("boeing", "hyponym", LARGE_PLANES),
    UnseenWord("rotorcraft", "hypernym", ("helicopter",)),
    UnseenWord("petrol", "paraphrase", ("fuel pump", "oil drum")),
    UnseenWord("expressway", "synonym", ("motorway",)),
    UnseenWord("infirmary", "synonym", ("hospital",)),
    UnseenWord("where surgeons operate", "paraphrase", ("hospital",)),
    UnseenWord("where pupils learn", "paraphrase", ("school",)),
    UnseenWord("where savings are deposited", "paraphrase", ("bank", "atm sign")),
    UnseenWord("motel", "hyponym", ("hotel", "love hotel")),
    UnseenWord("where tourists stay overnight", "paraphrase", ("hotel", "love hotel")),
    UnseenWord("cottage", "hyponym", HOUSES),
    UnseenWord("dwelling", "hypernym", HOUSES),
    UnseenWord("where items are manufactured", "paraphrase", ("factory",)),
    UnseenWord("metropolis", "synonym", CITIES),
    UnseenWord("citadel", "synonym", ("castle", "japanese castle")),
    UnseenWord("where emperors reside", "paraphrase", ("castle", "japanese castle")),
    UnseenWord("cathedral", "hyponym", ("church",)),
    UnseenWord("arena", "synonym", ("stadium",)),
    UnseenWord("seashore", "synonym",
               ("beach with umbrella", "umbrella on ground", "desert island")),
    UnseenWord("summit", "synonym", MOUNTAINS),
    UnseenWord("everest", "hyponym", MOUNTAINS),
    UnseenWord("lava", "paraphrase", ("volcano",)),
    UnseenWord("daybreak", "synonym", ("sunrise", "sunrise over mountains")),
    UnseenWord("blizzard", "hyponym", SNOWFALL),
    UnseenWord("frozen precipitation", "paraphrase", SNOWFALL),
    UnseenWord("drizzle", "hyponym", RAINFALL),
    UnseenWord("parasol", "synonym", UMBRELLAS),
    UnseenWord("asteroid", "synonym", ("comet", "shooting star")),
    UnseenWord("galaxy", "hypernym", ("milky way",)),
    UnseenWord("jupiter", "hyponym", ("ringed planet",)),
    UnseenWord("inferno", "synonym", ("fire",)),
    UnseenWord("tsunami", "hyponym", ("water wave",)),
    UnseenWord("breeze", "synonym",
               ("wind face", "leaf fluttering in wind", "dashing away")),
    UnseenWord("valise", "synonym", ("luggage", "briefcase")),
    UnseenWord("worn around the wrist", "paraphrase", ("watch",)),
    UnseenWord("it measures temperature", "paraphrase",
               ("thermometer", "face with thermometer")),
]
ACTIVITIES = [
    UnseenWord("checkmate", "paraphrase", ("chess pawn",)),
    UnseenWord("snooker", "hyponym", ("pool 8 ball",)),
    UnseenWord("blackjack", "hyponym", CARD_SUITS),
    UnseenWord("wimbledon", "hyponym", ("tennis",)),
    UnseenWord("quarterback", "paraphrase", ("american football",)),
    UnseenWord("scrum", "paraphrase", ("rugby football",)),
    UnseenWord("pugilism", "synonym", ("boxing glove",)),
    UnseenWord("pyrotechnics", "synonym", ("fireworks", "sparkler", "firecracker")),
    UnseenWord("yuletide", "synonym",
               ("christmas tree", "santa claus", "mrs. claus", "mx claus", "wrapped gift")),
]
OBJECTS = [
    UnseenWord("fiddle", "synonym", ("violin",)),
    UnseenWord("ukulele", "hyponym", ("guitar", "banjo")),
    UnseenWord("bugle", "synonym", ("trumpet", "postal horn")),
    UnseenWord("harpsichord", "hyponym", ("musical keyboard",)),
    UnseenWord("melody", "synonym", ("musical note", "musical notes", "musical score")),
    UnseenWord("spectacles", "synonym", ("glasses", "sunglasses")),
    UnseenWord("parka", "hyponym", ("coat",)),
    UnseenWord("mittens", "synonym", ("gloves",)),
    UnseenWord("gown", "hyponym", ("dress",)),
    UnseenWord("headgear", "hypernym", HATS),
    UnseenWord("fedora", "hyponym", ("top hat", "woman’s hat")),
    UnseenWord("tiara", "hyponym", ("crown",)),
    UnseenWord("sapphire", "hyponym", ("gem stone", "ring")),
    UnseenWord("macbook", "hyponym", ("laptop",)),
    UnseenWord("it broadcasts programmes", "paraphrase", ("television", "radio")),
    UnseenWord("polaroid", "hyponym", ("camera", "camera with flash")),
    UnseenWord("encyclopedia", "hyponym", BOOKS),
    UnseenWord("tabloid", "hyponym", ("newspaper", "rolled-up newspaper")),
    UnseenWord("parchment", "hyponym", ("scroll",)),
    UnseenWord("penny", "hyponym", ("coin",)),
    UnseenWord("thumbtack", "synonym", ("pushpin", "round pushpin")),
    UnseenWord("mallet", "synonym", HAMMERS),
    UnseenWord("wielded by thor", "paraphrase", HAMMERS),
    UnseenWord("tomahawk", "hyponym", ("axe",)),
    UnseenWord("sabre", "hyponym", BLADES),
    UnseenWord("firearm", "hypernym", ("water pistol",)),
    UnseenWord("grenade", "hyponym", ("bomb",)),
    UnseenWord("injection", "synonym", ("syringe",)),
    UnseenWord("aspirin", "hyponym", ("pill",)),
    UnseenWord("swallowed to cure migraines", "paraphrase", ("pill",)),
    UnseenWord("it enlarges tiny organisms", "paraphrase",
               ("microscope", "magnifying glass tilted left", "magnifying glass tilted right")),
    UnseenWord("settee", "synonym", ("couch and lamp",)),
    UnseenWord("stool", "hyponym", ("chair", "seat")),
    UnseenWord("mattress", "synonym", ("bed", "person in bed")),
    UnseenWord("entrance", "synonym", ("door",)),
    UnseenWord("casket", "synonym", ("coffin",)),
    UnseenWord("where corpses are interred", "paraphrase", ("headstone", "coffin")),
]
SYMBOLS = [
    UnseenWord("hashtag", "synonym", ("keycap: #",)),
    UnseenWord("nuclear", "synonym", ("radioactive", "atom symbol")),
    UnseenWord("toxic", "synonym", ("biohazard", "radioactive", "skull and crossbones")),
    UnseenWord("addition", "synonym", ("plus",)),
    UnseenWord("subtraction", "synonym", ("minus",)),
    UnseenWord("eternity", "synonym", ("infinity",)),
    UnseenWord("crucifix", "synonym", ("latin cross", "orthodox cross")),
    UnseenWord("pacifism", "paraphrase", ("peace symbol", "dove", "victory hand")),
    UnseenWord("query", "synonym", QUESTIONS),
    UnseenWord("hexagram", "synonym", ("dotted six-pointed star", "star of david")),
    UnseenWord("buccaneer", "paraphrase", ("pirate flag", "skull and crossbones")),
    UnseenWord("canadian ensign", "synonym", ("flag: canada",)),
    UnseenWord("swedish ensign", "synonym", ("flag: sweden",)),
    UnseenWord("brazilian ensign", "synonym", ("flag: brazil",)),
    UnseenWord("swiss ensign", "synonym", ("flag: switzerland",)),
]
UNSEEN_WORDS = [*ANIMALS, *FOOD, *FACES, *PEOPLE, *TRAVEL, *ACTIVITIES, *OBJECTS, *SYMBOLS]
