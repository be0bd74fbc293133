"""WebVision mini, the Google part of 50 classes, evaluated on ImageNet: Table 5 of the paper.

    python -m ieg_jax.main --config=configs/webvision_mini.py:imagenet=imagenet --config.data.dir=webvision \
        --workdir=runs/webvision_mini

Arguments: imagenet (where ImageNet is: a folder with train/<wnid>/ and val/<wnid>/, or a TFDS folder; ten images per
class of its training set are the trusted set), model (resnet50, or inception_resnet_v2 with 299 pixels), method, seed
(of everything), dtype (bfloat16 or float32, in which the network computes and images are sent to the devices; auto, the
default, is bfloat16 where there is a TPU or a GPU, else float32, so a run that is to go on elsewhere, and ieg_jax.plan,
name it) and reference. batch_groups is to be the number of devices where there are several; a run says so. data.dir is
WebVision's published folder, or where TFDS has it; for a pod, make records with ieg_jax.data.prepare first and add
--config.data.name=records. T = 1, p = 4, k = 8, as in the paper. The rest is that of the authors' code: ResNet-50
version 2 (with reference=paper version 1.5), 4e-4 · ½‖Θ‖² of all parameters, 1,000,000 steps of 64, the first cycle of
the learning rate one epoch long (with reference=paper 200 epochs in all); a strong view is another random crop of the
image itself, a flip, AutoAugment's policy v0 with shifts of at most 250 pixels, and a black square of 16 pixels.
Reported is the end of the last whole cycle. Top-1 / top-5 accuracy that the paper prints: 72.6 / 91.5, on Cloud TPU.
Accuracy and time with this code: not run yet.
"""

from ml_collections import ConfigDict

from configs import default
from ieg_jax import config as config_lib
from ieg_jax import hardware, methods
from ieg_jax.errors import check_choice

SIZES = {"resnet50": 224, "inception_resnet_v2": 299}  # pixels of a side


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: see above."""
    args = config_lib.parse_arguments(
        arguments, imagenet="", model="resnet50", method="ieg", seed=0, dtype="auto", reference="default"
    )
    check_choice("config argument model", args.model, SIZES)
    check_choice("config argument dtype", args.dtype, ("auto", "bfloat16", "float32"))
    config = default.get_config(f"reference={args.reference}")
    config.seed = config.trusted.seed = args.seed
    config.method.name = args.method
    methods.tune(config, unlabeled_weight=4.0, consistency_weight=8.0)
    config.data.name, config.data.variant = "webvision", "mini"
    config.data.test = config.data.trusted = args.imagenet
    config.data.unreadable = "skip"
    config.trusted.source, config.trusted.per_class = "separate", 10
    config.model.name, size = args.model, SIZES[args.model]
    if args.model == "resnet50" and args.reference != "paper":
        config.model.name = "resnet50_v2"
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if hardware.accelerator_is_here() else "float32"
    config.model.dtype = config.data.transfer = dtype

    config.batch_size = 64
    config.num_train_epochs, config.num_train_steps = 0.0, 1_000_000
    if args.reference == "paper":  # section 3.1
        config.num_train_epochs, config.num_train_steps = 200.0, 0
    config.log_every_steps = 100
    config.eval_every_epochs, config.eval_every_steps = 0.0, 10_000
    config.checkpoint_every_epochs, config.checkpoint_every_steps = 0.0, 5_000
    config.optimizer.weight_decay = 4e-4
    config.augment.standard = f"random_resized_crop({size})|flip"
    config.augment.views_of = "original"
    strong = "random_resized_crop({0})|flip|autoaugment_imagenet|cutout(size={1:.4f},fill=-1)"
    config.augment.strong = strong.format(size, 16 / size)
    config.augment.evaluation = f"resize({round(size * 256 / 224)})|center_crop({size})"
    return config
