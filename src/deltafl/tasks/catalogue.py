"""Published classification tasks by name: where they are, what their classes are called, how prompts speak of them.

Class names are in the order of the labels. Where a list is long they are the data set's own: its `ClassLabel`, or a
list beside the files. Templates are this package's wording, not that of CLIP's authors, so that zero-shot accuracies
differ a little from published ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTask:
    """One task of the catalogue.

    num_classes: K. templates: prompts with {} where the class goes. hub: the id on the Hugging Face hub; None: only a
    local folder will do. config: the hub set's configuration. image, label: columns, the first that the data have.
    class_names: K names for prompts; None: the data's own. labels: what the data call the K classes where that is
    something else, to recognise them by. test_is_validation: the split to test on is published as "validation".
    """

    num_classes: int
    templates: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    image: tuple[str, ...] = ("image", "img")
    label: tuple[str, ...] = ("label",)
    class_names: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    test_is_validation: bool = False


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


GENERIC_TEMPLATES = (
    "a photograph of a {}.",
    "an image showing a {}.",
    "this picture has a {} in it.",
    "one {}.",
)
"""For tasks that the catalogue does not know."""

_OBJECTS = (
    "a photograph of a {}.", "a small, blurred picture of a {}.", "a low-resolution image of a {}.",
    "a {} seen from close by.", "a {} in its usual surroundings.", "this picture has one {} in it.",
)  # fmt: skip
_SCENES = (
    "a photograph taken at a {}.", "a view of a {}.", "the scene is a {}.", "a wide picture of a {}.",
    "what a {} looks like.",
)  # fmt: skip
_FROM_ABOVE = (
    "a satellite picture of {}.", "{} seen from above.", "an aerial photograph that shows {}.",
    "land cover from orbit: {}.",
)  # fmt: skip
_GLYPHS = (
    'the character "{}" written by hand.', 'a scan of one handwritten "{}".', 'somebody wrote "{}" with a pen.',
    'a grey image of the character "{}".',
)  # fmt: skip

CATALOGUE: Mapping[str, NamedTask] = {
    "stanford_cars": NamedTask(
        196, ("a photograph of a {} car.", "a {} parked by the road.", "the car in this picture is a {}.",
              "an advertisement for a used {}.", "a {}, seen from outside."),
        hub="tanganke/stanford_cars",
    ),
    "dtd": NamedTask(
        47, ("a close-up of a {} texture.", "a surface that looks {}.", "{} material.", "a {} pattern fills the image.",
             "something {}."),
        hub="tanganke/dtd",
        class_names=_listed(
            "banded, blotchy, braided, bubbly, bumpy, chequered, cobwebbed, cracked, crosshatched, crystalline, dotted,"
            "fibrous, flecked, freckled, frilly, gauzy, grid, grooved, honeycombed, interlaced, knitted, lacelike,"
            "lined, marbled, matted, meshed, paisley, perforated, pitted, pleated, polka-dotted, porous, potholed,"
            "scaly, smeared, spiralled, sprinkled, stained, stratified, striped, studded, swirly, veined, waffled,"
            "woven, wrinkled, zigzagged"
        ),
    ),
    "eurosat": NamedTask(
        10, _FROM_ABOVE, hub="tanganke/eurosat",
        class_names=_listed(
            "fields of annual crops, forest, meadows and shrubs, a motorway, industrial buildings, pasture,"
            "orchards or vineyards, houses and gardens, a river, a sea or lake"
        ),
        labels=_listed(
            "AnnualCrop, Forest, HerbaceousVegetation, Highway, Industrial, Pasture, PermanentCrop, Residential,"
            "River, SeaLake"
        ),
    ),
    "gtsrb": NamedTask(
        43, ('a traffic sign that means "{}".', 'a road sign by the roadside: "{}".', 'a crop of the "{}" sign.',
             'drivers see the sign "{}".'),
        hub="tanganke/gtsrb",
        class_names=_listed(
            "speed limit 20, speed limit 30, speed limit 50, speed limit 60, speed limit 70, speed limit 80,"
            "end of speed limit 80, speed limit 100, speed limit 120, no overtaking, no overtaking by lorries,"
            "right of way at the next crossing, priority road, give way, stop, no vehicles, no lorries, no entry,"
            "danger, sharp bend to the left, sharp bend to the right, double bend, uneven road, slippery road,"
            "road narrows on the right, roadworks, traffic lights ahead, pedestrians, children crossing,"
            "cyclists crossing, snow or ice, wild animals, end of all limits, turn right ahead, turn left ahead,"
            "straight on only, straight on or right, straight on or left, keep right, keep left, roundabout,"
            "end of no overtaking, end of no overtaking by lorries"
        ),
    ),
    "mnist": NamedTask(
        10, ('the digit "{}" written by hand.', 'a scan of a handwritten "{}".', 'somebody wrote the number "{}".',
             'white strokes on black that make a "{}".'),
        hub="ylecun/mnist", class_names=tuple("0123456789"),
    ),
    "resisc45": NamedTask(45, _FROM_ABOVE, hub="tanganke/resisc45"),
    "sun397": NamedTask(397, _SCENES, hub="tanganke/sun397"),
    "svhn": NamedTask(
        10, ('the digit "{}" on a house.', 'a street number whose middle digit is "{}".', 'a blurred "{}" on a wall.',
             'a colour photograph of the printed number "{}".'),
        hub="ufldl-stanford/svhn", config="cropped_digits", class_names=tuple("0123456789"),
    ),
    "cifar10": NamedTask(
        10, _OBJECTS, hub="tanganke/cifar10",
        class_names=_listed("airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"),
    ),
    "cifar100": NamedTask(
        100, _OBJECTS, hub="tanganke/cifar100", label=("label", "fine_label"),
        class_names=_listed(
            "apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,"
            "butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch,"
            "crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo,"
            "keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man, maple tree, motorcycle, mountain, mouse,"
            "mushroom, oak tree, orange, orchid, otter, palm tree, pear, pickup truck, pine tree, plain, plate, poppy,"
            "porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper,"
            "snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper, table, tank, telephone, television,"
            "tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm"
        ),
    ),
    "stl10": NamedTask(
        10, _OBJECTS, hub="tanganke/stl10",
        class_names=_listed("airplane, bird, car, cat, deer, dog, horse, monkey, ship, truck"),
    ),
    "flowers102": NamedTask(
        102, ("a photograph of a {}, a flower.", "a {} in bloom.", "a close view of {} petals.", "a garden with a {}."),
        hub="dpdl-benchmark/oxford_flowers102",
    ),
    "food101": NamedTask(
        101, ("a photograph of {}, a dish.", "a plate of {}.", "{} served at a restaurant.", "a meal: {}."),
        hub="ethz/food101", test_is_validation=True,
    ),
    "fashion_mnist": NamedTask(
        10, ("a grey picture of a {}.", "a {} from a clothing catalogue.", "a small image of a {}, to wear or carry.",
             "this product is a {}."),
        hub="zalando-datasets/fashion_mnist",
        class_names=_listed(
            "T-shirt or top, pair of trousers, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
        ),
        labels=_listed("T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"),
    ),
    "kmnist": NamedTask(
        10, ('the Japanese character "{}" written by hand.', 'the hiragana "{}".', '"{}" in an old manuscript.',
             'cursive Japanese script: "{}".'),
        hub="tanganke/kmnist", class_names=_listed("o, ki, su, tsu, na, ha, ma, ya, re, wo"),
    ),
    "emnist_letters": NamedTask(
        26, _GLYPHS, hub="tanganke/emnist_letters", class_names=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    ),
    "oxford_iiit_pet": NamedTask(
        37, ("a photograph of a {}, a pet.", "a {} at home.", "the breed of this animal is {}.", "a portrait of a {}."),
        hub="timm/oxford-iiit-pet",
        class_names=_listed(
            "Abyssinian, American bulldog, American pit bull terrier, basset hound, beagle, Bengal, Birman, Bombay,"
            "boxer, British shorthair, chihuahua, Egyptian Mau, English cocker spaniel, English setter,"
            "German shorthaired, Great Pyrenees, Havanese, Japanese Chin, keeshond, Leonberger, Maine Coon,"
            "miniature pinscher, Newfoundland, Persian, Pomeranian, pug, Ragdoll, Russian Blue, Saint Bernard,"
            "Samoyed, Scottish terrier, Shiba Inu, Siamese, Sphynx, Staffordshire bull terrier, wheaten terrier,"
            "Yorkshire terrier"
        ),
    ),
    "fer2013": NamedTask(
        7, ("a photograph of a face that looks {}.", "somebody who is {}.", "a {} person's face.",
            "the feeling in this face: {}."),
        class_names=_listed("angry, disgusted, afraid, happy, sad, surprised, neutral"),
        labels=_listed("angry, disgust, fear, happy, sad, surprise, neutral"),
    ),
    "pcam": NamedTask(
        2, ("a microscope image of {}.", "a stained slice that shows {}.", "a pathologist would call this {}."),
        hub="1aurent/PatchCamelyon", class_names=("healthy lymph node tissue", "lymph node tissue with a tumour"),
    ),
    "rendered_sst2": NamedTask(
        2, ("a {} film review, printed as an image.", "this text says something {} about a film.",
            "the sentence in the picture is {}."),
        hub="nateraw/rendered-sst2", class_names=("negative", "positive"),
    ),
}  # fmt: skip
"""Name -> task."""
