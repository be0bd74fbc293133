"""What torchvision's and timm's networks answer, for networks here to be compared with.

    python tests/torch_networks.py            # needs torch, torchvision and timm, which nothing else here does

writes fixtures/torch_networks.npz: for each network the names and shapes of its state dict and the logits, computed in
float64. Weights and images are not in it, they come from numpy's RandomState, whose numbers never change. Written on
2026-11-28 with torch 2.14.1, torchvision 0.29.1, timm 1.0.31.
"""

import contextlib
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "fixtures" / "torch_networks.npz"
SIZES = {
    "resnet50": (65, 50), "inception_resnet_v2": (75, 90), "densenet": (16, 12), "efficientnet_lite0": (65, 50),
    "tf_efficientnet_lite0": (65, 50),
}  # fmt: skip
GAIN_OF_MOBILE_BLOCKS = 1.8  # ReLU6 and narrow layers let signals die else
NARROW = 16  # the first two have 1/16 of their channels
CLASSES = 7


def images(name):
    """Three images `[3, H, W, 3]` in [0, 1]."""
    return np.random.RandomState(1).uniform(size=(3, *SIZES[name], 3))


def state_dict(shapes):
    """Weights with which signals neither die nor explode: name -> array, in the order of `shapes`."""
    random, state = np.random.RandomState(0), {}
    gain = GAIN_OF_MOBILE_BLOCKS if any(name.startswith("blocks.") for name in shapes) else 1
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros(shape, np.int64)
        elif len(shape) > 1:
            state[name] = random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            state[name] = random.uniform(0.5, 1.5, shape) * (0.3 if name.endswith("bn3.weight") else gain)
        else:
            state[name] = random.normal(size=shape) * 0.1
    return {name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in state.items()}


def golden(name):
    """(state dict, images in [0, 1], logits) of one network from the file."""
    with np.load(FILE) as archive:
        shapes = {key: tuple(shape) for key, shape in json.loads(str(archive[f"{name}_shapes"])).items()}
        return state_dict(shapes), images(name), archive[f"{name}_logits"]


@contextlib.contextmanager
def narrow(torch):
    """Inside, layers have 1/NARROW of the channels that they are asked for, images and classes apart."""
    kinds = (torch.nn.Conv2d, torch.nn.modules.batchnorm._NormBase, torch.nn.Linear)
    originals = [kind.__init__ for kind in kinds]

    def part(channels):
        assert channels == 3 or channels % NARROW == 0
        return channels if channels == 3 else channels // NARROW

    conv, norm, linear = originals
    kinds[0].__init__ = lambda self, before, after, *args, **kw: conv(self, part(before), part(after), *args, **kw)
    kinds[1].__init__ = lambda self, channels, *args, **kw: norm(self, part(channels), *args, **kw)
    kinds[2].__init__ = lambda self, before, after, *args, **kw: linear(self, part(before), after, *args, **kw)
    try:
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__init__ = original


def main():
    import timm
    import torch
    import torchvision

    normalize = torchvision.transforms.functional.normalize
    with narrow(torch):
        resnet = torchvision.models.resnet50(num_classes=CLASSES)
        inception = timm.create_model("inception_resnet_v2", num_classes=CLASSES)
    for part, repeats in (("repeat", 2), ("repeat_1", 2), ("repeat_2", 1)):
        setattr(inception, part, getattr(inception, part)[:repeats])
    densenet = torchvision.models.DenseNet(3, (2, 2, 2), 6, num_classes=CLASSES)
    densenet.features.conv0 = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False)  # that for images of 32×32 pixels
    for name in ("norm0", "relu0", "pool0"):
        setattr(densenet.features, name, torch.nn.Identity())
    lite = {name: timm.create_model(name, num_classes=CLASSES) for name in SIZES if "lite" in name}
    content = {}
    for name, network, mean, std in (
        ("resnet50", resnet, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("inception_resnet_v2", inception, [0.5] * 3, [0.5] * 3),
        ("densenet", densenet, [0.5] * 3, [0.5] * 3),
        ("efficientnet_lite0", lite["efficientnet_lite0"], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("tf_efficientnet_lite0", lite["tf_efficientnet_lite0"], [0.5] * 3, [0.5] * 3),
    ):
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        network.load_state_dict({key: torch.as_tensor(array) for key, array in state_dict(shapes).items()})
        x = torch.as_tensor(images(name).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            logits = network.double().eval()(normalize(x, mean, std)).numpy()
        content |= {f"{name}_shapes": json.dumps(shapes), f"{name}_logits": logits}
        print(name, logits)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
