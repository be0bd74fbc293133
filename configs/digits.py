"""Digits with uniform label noise: the paper's Figure 1 and Table 7 in small, minutes on a laptop.

    python -m ieg_jax.reproduce run quick
    python -m ieg_jax.main --config=configs/digits.py:method=ieg,noise_rate=0.8 --workdir=runs/digits

As configs/quickstart.py, half as long again. Accuracy: docs/results.md. Arguments: method, noise_rate,
trusted_per_class, seed (of everything), reference.
"""

from ml_collections import ConfigDict

from configs import quickstart
from ieg_jax import config as config_lib


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments, method="ieg", noise_rate=0.8, trusted_per_class=3, seed=0, reference="default"
    )
    config = quickstart.get_config(",".join(f"{name}={value}" for name, value in vars(args).items()))
    # Four cycles of 60, 90, 135 and 203 steps.
    config.schedule.first_cycle_steps = 60
    config.num_train_steps = 488
    config.checkpoint_every_steps = 488
    return config
