"""Your own features: embeddings of a network that is there already, with doubtful labels, and some checked ones.

    python -m ieg_jax.main --config=configs/features.py --config.data.train=own.npz --workdir=runs/features

The file holds `features` [n,D] floats, `labels` [n] integers as given, and the trusted set, `trusted_features` and
`trusted_labels`; optionally `test_features` and `test_labels`, and `clean_labels` [n] (true labels, -1 where not
known), from which `trusted=train` takes the trusted set instead. Or it is a table, .parquet, or .npy with a .csv beside
it, with names, texts and paths of images (docs/data.md). The network, two hidden layers of 256 units, sees each
number less its mean in `features`, by its deviation there; a view is that with Gaussian noise. The length of the
training follows from the number of examples. Two trusted examples in ten of each class are held out, see own_data.py.
Arguments: method, trusted (separate or train), seed (of everything), reference. Accuracy depends on the data.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(arguments, method="ieg", trusted="separate", seed=0, reference="default")
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "features"
    config.trusted.source, config.trusted.holdout = args.trusted, 0.2
    config_lib.follow_features(config)
    methods.tune(config, **config_lib.OWN_DATA)
    return config
