"""WebVision, all 1,000 classes of Google and Flickr, evaluated on ImageNet: Table 5 of the paper.

    python -m ieg_jax.main --config=configs/webvision.py:imagenet=imagenet --config.data.dir=webvision \
        --workdir=runs/webvision

Arguments and the rest as configs/webvision_mini.py; the strong view is another random crop and flip of the image,
for the paper leaves AutoAugment out here. Top-1 / top-5 accuracy that the paper prints: 65.8 / 85.8, on Cloud TPU.
Accuracy and time with this code: not run yet.
"""

from ml_collections import ConfigDict

from configs import webvision_mini


def get_config(arguments: str = "") -> ConfigDict:
    """Arguments: as of configs/webvision_mini.py."""
    config = webvision_mini.get_config(arguments)
    config.data.variant = "full"
    config.augment.strong = config.augment.standard
    return config
