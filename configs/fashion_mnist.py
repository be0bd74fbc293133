"""Fashion-MNIST with label noise and ten trusted images per class, for a machine without an accelerator.

    python -m ieg_jax.reproduce run fashion --set=data.dir=/usr/share/datasets/fashion-mnist
    python -m ieg_jax.main --config=configs/fashion_mnist.py:noise_rate=0.8 \
        --config.data.dir=/usr/share/datasets/fashion-mnist --workdir=runs/fashion

The folder holds the four published IDX files (Debian: package dataset-fashion-mnist); without it TFDS downloads
them. Not an experiment of the paper. 10,000 of the training images at half resolution, 14×14, a wide ResNet of 75,002
parameters; accuracy on all 10,000 test images. Arguments: method, noise (uniform or asymmetric: T-shirt/top ↔ shirt,
pullover ↔ coat, sneaker ↔ ankle boot), noise_rate, trusted_per_class, seed (of everything), reference. Accuracy:
docs/results.md; how the settings were chosen: docs/fashion.md.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments,
        method="ieg",
        noise="uniform",
        noise_rate=0.8,
        trusted_per_class=10,
        seed=0,
        reference="default",
    )
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.noise.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "fashion_mnist"
    config.data.image_size = 14
    config.data.train_size = 10_000
    config.noise.kind = args.noise
    config.noise.rate = args.noise_rate
    config.trusted.per_class = args.trusted_per_class
    config.batch_size = 100
    config.eval_batch_size = 500
    config.augment.standard = "crop(pad=1)|flip"
    methods.tune(config, unlabeled_weight=1.0, consistency_weight=2.0)
    config.schedule.base_lr = 0.05
    # Four cycles of 150, 225, 337 and 507 steps.
    config.schedule.first_cycle_epochs, config.schedule.first_cycle_steps = 0.0, 150
    config.num_train_epochs, config.num_train_steps = 0.0, 1_219
    config.eval_every_epochs, config.eval_every_steps = 0.0, 200
    config.checkpoint_every_epochs, config.checkpoint_every_steps = 0.0, 500
    return config
