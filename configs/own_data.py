"""Your own images: a list of paths and doubtful labels, or a folder for each class, and some checked ones.

    python -m ieg_jax.main --config=configs/own_data.py --config.data.train=labels.csv \
        --config.data.trusted=trusted.csv --workdir=runs/own

data.train and data.trusted (and data.test, to have the accuracy measured) are lists with the columns path and label;
with the argument source=image_folder data.train has a folder for each class. Further arguments: size (pixels of the
network's input; images are decoded once and kept in memory at this size), method, seed (of everything) and
reference. Left and right are taken to mean the same; for symbols and text set
--config.augment.standard='crop(pad=4)'. Accuracy depends on the data.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(arguments, source="image_csv", size=64, method="ieg", seed=0, reference="default")
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = args.source
    config.data.image_size = args.size
    config.trusted.source = "separate"
    config.num_train_epochs = 40.0
    config.model.depth, config.model.width = 16, 2.0
    config.augment.standard = "crop(pad=4)|flip"
    config.augment.strong = "randaugment(2,5)|cutout(0.4)"
    return config
