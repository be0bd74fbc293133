"""The published data sets in numbers: the shape of their images, how many classes and training examples they have.

`ieg_jax.plan` and the costs in `ieg_jax.reproduce list` need these for a training whose data are not there.
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as it was published.

    Attributes:
      image: (H, W, C) as loaded; None where each image has a size of its own.
      num_classes: K.
      num_train: training examples, before damaged ones and trusted ones are taken out.
    """

    image: tuple[int, int, int] | None
    num_classes: int
    num_train: int


SETS = {
    "digits": Published((8, 8, 1), 10, 1_297),
    "fashion_mnist": Published((28, 28, 1), 10, 60_000),
    "cifar10": Published((32, 32, 3), 10, 50_000),
    "cifar100": Published((32, 32, 3), 100, 50_000),
    "webvision/mini": Published(None, 50, 65_944),
    "webvision/google": Published(None, 1000, 980_449),
    "webvision/full": Published(None, 1000, 2_439_574),
    "imagenet": Published(None, 1000, 1_281_167),
    "food101": Published(None, 101, 75_750),
    "controlled_noisy_web_labels": Published(None, 100, 50_000),
}


def find(data: ConfigDict) -> Published | None:
    """The published set that the group `data` of a configuration names; None for other data, such as one's own.

    Its images have the size that they are loaded with: `data.image_size`, where that is above 0.
    """
    name = f"webvision/{data.variant or 'mini'}" if data.name == "webvision" else data.name
    found = SETS.get(name)
    if found is None or data.image_size <= 0:
        return found
    channels = 3 if found.image is None else found.image[2]
    return dataclasses.replace(found, image=(data.image_size, data.image_size, channels))
