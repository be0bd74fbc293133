"""Your own images and labels from one .npz file.

    python -m ieg_jax.main --config=configs/arrays.py --config.data.train=own.npz --workdir=runs/own

The file holds `images` [n,H,W] or [n,H,W,C] (uint8, or floats in [0, 1]), `labels` [n] integers as given, and the
trusted set, `trusted_images` and `trusted_labels`; optionally `test_images` and `test_labels`, and `clean_labels`
[n] (true labels, -1 where not known), from which `trusted=train` takes the trusted set instead. Accuracy depends
on the data.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: method, trusted (separate or train), seed, reference."""
    args = config_lib.parse_arguments(arguments, method="ieg", trusted="separate", seed=0, reference="default")
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "arrays"
    config.trusted.source = args.trusted
    config.num_train_epochs = 40.0
    return config
