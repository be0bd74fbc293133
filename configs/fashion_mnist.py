"""Fashion-MNIST with uniform label noise and ten trusted images per class.

    python -m ieg_jax.main --config=configs/fashion_mnist.py:noise_rate=0.8 \
        --config.data.dir=/usr/share/datasets/fashion-mnist --workdir=runs/fashion

The folder holds the four published IDX files (Debian: package dataset-fashion-mnist); without it TFDS downloads
them. Not an experiment of the paper. At half resolution, 14×14. Accuracy: not run yet.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: method, noise_rate, trusted_per_class, seed (of everything), reference."""
    args = config_lib.parse_arguments(
        arguments, method="ieg", noise_rate=0.8, trusted_per_class=10, seed=0, reference="default"
    )
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.noise.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "fashion_mnist"
    config.data.image_size = 14
    config.noise.kind = "uniform"
    config.noise.rate = args.noise_rate
    config.trusted.per_class = args.trusted_per_class
    config.batch_size = 100
    config.eval_batch_size = 500
    config.augment.standard = "crop(pad=1)|flip"
    return config
