"""Where the label of a corrupted example goes, for noise that depends on the true class alone.

Each function gives a matrix `[K, K]` float64, row = true class, column = new label, rows sum to 1. A share `rate` of
the labels goes there, so the transition matrix is T = (1 − rate) · I + rate · matrix.
"""

import numpy as np

from ieg_jax.errors import UserError

CIFAR100_SUPERCLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# The fine labels are numbered in alphabetical order.
CIFAR100_CLASSES = tuple(sorted(name for members in CIFAR100_SUPERCLASSES.values() for name in members))


def _cycles(groups: list[list[int]]) -> np.ndarray:
    """Each class -> the next of its group, the last -> the first."""
    target = np.empty(sum(map(len, groups)), np.int64)
    for group in groups:
        target[group] = np.roll(group, -1)
    return target


# Name of the data set -> the class that each class is mistaken for, itself where it is not.
LOOKALIKES = {
    # bird 2 → airplane 0, cat 3 ↔ dog 5, deer 4 → horse 7, truck 9 → automobile 1
    "cifar10": np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1]),
    "cifar100": _cycles([sorted(map(CIFAR100_CLASSES.index, members)) for members in CIFAR100_SUPERCLASSES.values()]),
    # T-shirt/top 0 ↔ shirt 6, pullover 2 ↔ coat 4, sneaker 7 ↔ ankle boot 9
    "fashion_mnist": np.array([6, 1, 4, 3, 2, 5, 0, 9, 8, 7]),
}
NEIGHBOURS = {"cifar100": _cycles(np.arange(100).reshape(20, 5).tolist())}


def symmetric(name: str, num_classes: int) -> np.ndarray:
    """Every class alike but the true one."""
    del name
    return (1 - np.eye(num_classes)) / (num_classes - 1)


def asymmetric(name: str, num_classes: int) -> np.ndarray:
    """The class that looks alike, of the data set `name`; Patrini et al. 2017 for CIFAR.

    Raises:
      UserError: for a data set without a table.
    """
    return _to_one_class(LOOKALIKES, "asymmetric", name, num_classes)


def asymmetric_contiguous(name: str, num_classes: int) -> np.ndarray:
    """CIFAR-100: the next of five contiguous fine labels, which are not the superclasses; as in ELR's code.

    Raises:
      UserError: for another data set.
    """
    return _to_one_class(NEIGHBOURS, "asymmetric_contiguous", name, num_classes)


def _to_one_class(tables: dict[str, np.ndarray], kind: str, name: str, num_classes: int) -> np.ndarray:
    if name not in tables:
        raise UserError(
            f"noise.kind={kind} is defined for {', '.join(tables)}, not for {name}; say which classes are mistaken "
            f"for which with noise.kind=transition_matrix"
        )
    target = tables[name]
    if len(target) != num_classes:
        raise UserError(
            f"noise.kind={kind}: {name} has {num_classes} classes here, expected {len(target)}; "
            f"set data.num_classes=0, or use noise.kind=transition_matrix"
        )
    return np.eye(num_classes)[target]
