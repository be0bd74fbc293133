"""CIFAR-100 with label noise: Tables 2, 4, 6 and A2 of the paper. Arguments as of configs/cifar10.py.

    python -m ieg_jax.main --config=configs/cifar100.py:noise_rate=0.8,trusted_per_class=1 --workdir=runs/cifar100

Test accuracy that the paper prints for ieg with wrn28_10, uniform noise 0.2, 0.4, 0.8, and 10 trusted images per class:
81.2 ± 0.7, 80.2 ± 0.3, 75.5 ± 0.2; with 1 per class: 77.4 ± 0.4, 75.1 ± 1.1, 62.1 ± 1.2. Hardware there: one V100.
Accuracy and time with this code: not run yet.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: as of configs/cifar10.py."""
    config = cifar10.get_config(arguments)
    config.data.name = "cifar100"
    return config
