"""The paper's Table 1 in small: CIFAR-10 from scratch with a small network, for a machine without an accelerator.

    python -m ieg_jax.reproduce run cifar10-small --set=data.dir=/data/cifar10 --set=noise.file=/data/CIFAR-10_human.pt
    python -m ieg_jax.main --config=configs/cifar10_small.py:noise_rate=0.8 --config.data.dir=/data/cifar10 \
        --workdir=runs/cifar10_small

Ten thousand of the training images at 32×32, a wide ResNet with ten layers; accuracy on all 10,000 test images.
Arguments: method, noise (uniform or asymmetric) and noise_rate, or labels (CIFAR-10N's worse, 40 % wrong, aggre or
random1; noise.file, docs/data.md), trusted_per_class, seed (of everything), reference. Batch, learning rate, k and p
are those of fashion_mnist.py. Accuracy and time: docs/results.md.
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
        labels="none",
        trusted_per_class=10,
        seed=0,
        reference="default",
    )
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.noise.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "cifar10"
    config.data.train_size = 10_000
    if args.labels == "none":
        config.noise.kind, config.noise.rate = args.noise, args.noise_rate
    else:
        config.noise.kind, config.noise.label_set = "human", args.labels
    config.trusted.per_class = args.trusted_per_class
    config.batch_size = 100
    config.eval_batch_size = 500
    methods.tune(config, unlabeled_weight=1.0, consistency_weight=2.0)
    config.schedule.base_lr = 0.05
    # Four cycles of 250, 375, 563 and 843 steps: 20 epochs.
    config.schedule.first_cycle_epochs, config.schedule.first_cycle_steps = 0.0, 250
    config.num_train_epochs, config.num_train_steps = 0.0, 2_031
    config.eval_every_epochs, config.eval_every_steps = 0.0, 290
    config.checkpoint_every_epochs, config.checkpoint_every_steps = 0.0, 500
    return config
