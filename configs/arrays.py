"""Your own images and labels from one .npz file.

    python -m ieg_jax.main --config=configs/arrays.py --config.data.train=own.npz --workdir=runs/own

The file holds `images` [n,H,W] or [n,H,W,C] (uint8, or floats in [0, 1]), `labels` [n] integers as given, and the
trusted set, `trusted_images` and `trusted_labels`; optionally `test_images` and `test_labels`, and `clean_labels`
[n] (true labels, -1 where not known), from which `trusted=train` takes the trusted set instead. Size of the network and
length of the training follow from the data, and two trusted images in ten of each class are held out, as in
own_data.py. Accuracy depends on the data.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.errors import check_choice


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: method, trusted (separate or train), augment (as own_data.py), seed, reference."""
    args = config_lib.parse_arguments(
        arguments, method="ieg", trusted="separate", augment="photos", seed=0, reference="default"
    )
    check_choice("config argument augment", args.augment, config_lib.AUGMENT_PRESETS)
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "arrays"
    config.trusted.source, config.trusted.holdout = args.trusted, 0.2
    config.model.depth, config.model.width = config_lib.AUTO, float(config_lib.AUTO)
    config_lib.follow_data(config, learning_rate=0.05)
    methods.tune(config, **config_lib.OWN_DATA)
    config.augment.standard, config.augment.strong = config_lib.AUGMENT_PRESETS[args.augment]
    return config
