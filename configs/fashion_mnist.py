"""Fashion-MNIST with label noise and ten trusted images per class, for a machine without an accelerator.

    python -m ieg_jax.reproduce run fashion --set=data.dir=/usr/share/datasets/fashion-mnist
    python -m ieg_jax.main --config=configs/fashion_mnist.py:noise_rate=0.8 \
        --config.data.dir=/usr/share/datasets/fashion-mnist --workdir=runs/fashion

The folder holds the four published IDX files (Debian: package dataset-fashion-mnist); without it TFDS downloads
them. Not an experiment of the paper. Accuracy on all 10,000 test images. Arguments: model, method, noise (uniform or
asymmetric: T-shirt/top ↔ shirt, pullover ↔ coat, sneaker ↔ ankle boot), noise_rate, trusted_per_class, seed (of
everything), reference. With model=wide_resnet (default): 10,000 of the training images at half resolution, 14×14, a
network of 75,002 parameters, 12 epochs, in which it does not memorise. With model=mlp: all 60,000 at 28×28, two hidden
layers of 512 units, 670,730 parameters, 30 epochs, in which it does. Accuracy: docs/results.md; how the settings were
chosen: docs/fashion.md.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.errors import check_choice

MODELS = ("wide_resnet", "mlp")


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments,
        model="wide_resnet",
        method="ieg",
        noise="uniform",
        noise_rate=0.8,
        trusted_per_class=10,
        seed=0,
        reference="default",
    )
    check_choice("config argument model", args.model, MODELS)
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.noise.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "fashion_mnist"
    config.noise.kind = args.noise
    config.noise.rate = args.noise_rate
    config.trusted.per_class = args.trusted_per_class
    config.eval_batch_size = 500
    methods.tune(config, unlabeled_weight=1.0, consistency_weight=2.0)
    config.schedule.base_lr = 0.05
    if args.model == "mlp":
        config.model.name, config.model.width = "mlp", 2.0
        config.batch_size = 250
        config.augment.standard = ""  # each image as it is, in every epoch: what a network memorises soonest
        _count(config, first_cycle=885, steps=7_191, every=720)  # cycles of 885, 1,327, 1,992 and 2,987 steps
    else:
        config.data.image_size, config.data.train_size = 14, 10_000
        config.batch_size = 100
        config.augment.standard = "crop(pad=1)|flip"
        _count(config, first_cycle=150, steps=1_219, every=200)  # cycles of 150, 225, 337 and 507 steps
    return config


def _count(config: ConfigDict, first_cycle: int, steps: int, every: int) -> None:
    """Gives the length of a training in steps."""
    config.schedule.first_cycle_epochs, config.schedule.first_cycle_steps = 0.0, first_cycle
    config.num_train_epochs, config.num_train_steps = 0.0, steps
    config.eval_every_epochs, config.eval_every_steps = 0.0, every
    config.checkpoint_every_epochs, config.checkpoint_every_steps = 0.0, 500
