"""What the networks of torchvision, timm and transformers answer, for networks here to be compared with.

    python tests/torch_networks.py            # needs torch, torchvision, timm and transformers, which nothing else does

writes fixtures/torch_networks.npz: for each network the names and shapes of its state dict and the logits, computed in
float64; of transformers' networks without a head the features. Weights and images are not in it, they come from numpy's
RandomState, whose numbers never change. Written on 2026-11-28 with torch 2.14.1, torchvision 0.29.1, timm 1.0.31,
transformers 5.24.0.

    python tests/torch_networks.py vit_s16=vit_small_patch16_224:own:224 ...

compares networks of the published size with those of timm, in float64 with random weights: name here=name in
timm:conventions:size.
"""

import contextlib
import json
import pathlib
import re
import sys

import numpy as np

FILE = pathlib.Path(__file__).parent / "fixtures" / "torch_networks.npz"
SIZES = {
    "resnet50": (65, 50), "resnet50_v2": (66, 50),
    "inception_resnet_v2": (75, 90), "densenet": (16, 12), "efficientnet_lite0": (65, 50),
    "tf_efficientnet_lite0": (65, 50), "vit": (24, 24), "vit_resampled": (16, 40), "vit_torchvision": (24, 24),
    "vit_transformers": (24, 24), "dinov2": (24, 24), "dinov2_plain": (24, 24), "dinov2_plain_transformers": (24, 24),
    "dinov2_resampled": (40, 40), "dinov2_transformers": (24, 24),
    "clip": (24, 24), "open_clip": (24, 24), "clip_transformers": (24, 24), "siglip": (24, 24),
    "siglip_transformers": (24, 24), "convnext": (70, 64), "convnextv2": (70, 64),
    "convnext_transformers": (70, 64), "convnextv2_transformers": (70, 64),
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
        elif len(shape) > 1 and shape[0] == 1:  # tokens and embeddings of places
            state[name] = random.normal(size=shape) * 0.5
        elif len(shape) > 1:
            state[name] = random.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight", "gamma", "lambda1", "layer_scale_parameter")):
            state[name] = random.uniform(0.5, 1.5, shape) * (0.3 if name.endswith("bn3.weight") else gain)
        else:
            state[name] = np.asarray(random.normal(size=shape) * 0.1)
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


def vision_transformers():
    """Tiny ones of timm and torchvision with the options of the published ones: name -> (network, mean, std)."""
    import torchvision
    from timm import data
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import VisionTransformer

    tiny = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    tiny |= {"num_classes": CLASSES, "dynamic_img_size": True}
    half, imagenet = ([0.5] * 3, [0.5] * 3), (data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD)
    clip = (data.OPENAI_CLIP_MEAN, data.OPENAI_CLIP_STD)
    plain, dino = VisionTransformer(**tiny), {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
    dinov2 = VisionTransformer(**tiny, **dino)
    tower = {"pre_norm": True, "norm_layer": lambda *args, **kw: LayerNorm(*args, eps=1e-5, **kw)}
    return {
        "vit": (plain, *half),
        "vit_resampled": (plain, *half),
        "vit_torchvision": (torchvision.models.VisionTransformer(24, 8, 2, 2, 32, 64, num_classes=CLASSES), *imagenet),
        "dinov2": (dinov2, *imagenet),
        "dinov2_resampled": (dinov2, *imagenet),
        "dinov2_plain": (VisionTransformer(**tiny, init_values=1e-5), *imagenet),
        "clip": (VisionTransformer(**tiny, **tower, act_layer="quick_gelu"), *clip),
        "open_clip": (VisionTransformer(**tiny, **tower), *clip),
        # timm has this activation in its largest SigLIP alone, the original and transformers in all.
        "siglip": (VisionTransformer(**tiny, class_token=False, global_pool="map", act_layer="gelu_tanh"), *half),
    }


def of_transformers():
    """Tiny networks of transformers: name -> (network, output of which features or logits are kept, mean, std)."""
    import transformers
    from timm import data

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text |= {"vocab_size": 10, "max_position_embeddings": 5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    towers = {"vision_config": {**size, "intermediate_size": 64}, "text_config": text}
    half, imagenet = ([0.5] * 3, [0.5] * 3), (data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD)
    vit = transformers.ViTConfig(**size, intermediate_size=64, num_labels=CLASSES)
    dinov2 = transformers.Dinov2WithRegistersConfig(**size, mlp_ratio=2)
    convnext = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": CLASSES}
    convnext |= {"layer_norm_eps": 1e-6}  # of the last, as in the original; transformers has 1e-12 there
    clip = transformers.CLIPConfig(**towers, projection_dim=16)
    return {
        "vit_transformers": (transformers.ViTForImageClassification(vit), "logits", *half),
        "dinov2_transformers": (transformers.Dinov2WithRegistersModel(dinov2), "pooler_output", *imagenet),
        "dinov2_plain_transformers": (
            transformers.Dinov2Model(transformers.Dinov2Config(**size, mlp_ratio=2)), "pooler_output", *imagenet
        ),
        "clip_transformers": (
            transformers.CLIPModel(clip), "pooler_output", data.OPENAI_CLIP_MEAN, data.OPENAI_CLIP_STD
        ),
        "siglip_transformers": (
            transformers.SiglipModel(transformers.SiglipConfig(**towers)), "pooler_output", *half
        ),
        "convnext_transformers": (transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(**convnext)), "logits", *imagenet,
        ),
        "convnextv2_transformers": (transformers.ConvNextV2ForImageClassification(
            transformers.ConvNextV2Config(**convnext)), "logits", *imagenet,
        ),
    }  # fmt: skip


def with_random_weights(network):
    """A network of transformers with the weights of `state_dict`, and the names and shapes of its file."""
    import tempfile

    import safetensors.numpy

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)  # by the published names, which are not always those of the modules
        file = f"{folder}/model.safetensors"
        shapes = {name: array.shape for name, array in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(state_dict(shapes), file, metadata={"format": "pt"})
        return type(network).from_pretrained(folder).double().eval(), shapes


def main():
    import timm
    import torch
    import torchvision
    from timm.layers import BatchNormAct2d, create_conv2d

    normalize = torchvision.transforms.functional.normalize
    with narrow(torch):
        resnet = torchvision.models.resnet50(num_classes=CLASSES)
        resnet_v2 = timm.models.resnetv2.ResNetV2(
            (3, 4, 6, 3),
            num_classes=NARROW * CLASSES,
            stem_type="same",
            conv_layer=create_conv2d,
            norm_layer=BatchNormAct2d,
        )  # its last layer is a convolution too
        inception = timm.create_model("inception_resnet_v2", num_classes=CLASSES)
    for part, repeats in (("repeat", 2), ("repeat_1", 2), ("repeat_2", 1)):
        setattr(inception, part, getattr(inception, part)[:repeats])
    densenet = torchvision.models.DenseNet(3, (2, 2, 2), 6, num_classes=CLASSES)
    densenet.features.conv0 = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False)  # that for images of 32×32 pixels
    for name in ("norm0", "relu0", "pool0"):
        setattr(densenet.features, name, torch.nn.Identity())
    convnext = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "num_classes": CLASSES}
    lite = {name: timm.create_model(name, num_classes=CLASSES) for name in SIZES if "lite" in name}
    half, imagenet = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    networks = {
        "resnet50": (resnet, *imagenet),
        "resnet50_v2": (resnet_v2, *half),
        "inception_resnet_v2": (inception, *half),
        "densenet": (densenet, *half),
        "efficientnet_lite0": (lite["efficientnet_lite0"], *imagenet),
        "tf_efficientnet_lite0": (lite["tf_efficientnet_lite0"], *half),
        **vision_transformers(),
        "convnext": (timm.models.ConvNeXt(**convnext), *imagenet),
        # One of the sizes of V2 has 1×1 convolutions in place of dense layers, as here.
        "convnextv2": (timm.models.ConvNeXt(**convnext, use_grn=True, ls_init_value=None, conv_mlp=True), *imagenet),
    }
    content = {}

    def inputs(name, mean, std):
        return normalize(torch.as_tensor(images(name).transpose(0, 3, 1, 2).copy()), mean, std)

    def keep(name, shapes, output):
        content.update({f"{name}_shapes": json.dumps(shapes), f"{name}_logits": output.numpy()})
        print(name, output)

    with torch.no_grad():
        for name, (network, mean, std) in networks.items():
            shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
            network.load_state_dict({key: torch.as_tensor(array) for key, array in state_dict(shapes).items()})
            keep(name, shapes, network.double().eval()(inputs(name, mean, std)))
        for name, (network, output, mean, std) in of_transformers().items():
            network, shapes = with_random_weights(network)
            network = getattr(network, "vision_model", network) if output == "pooler_output" else network
            keep(name, shapes, network(inputs(name, mean, std))[output])
    np.savez_compressed(FILE, **content)


def compare(name, theirs, conventions, size):
    """Prints how far a network of the published size is from that of timm; see the head of this file."""
    import tempfile

    import jax
    import safetensors.numpy
    import timm
    import torch
    import torchvision
    from flax.traverse_util import unflatten_dict
    from timm import data

    from configs import default
    from ieg_jax import models
    from ieg_jax.models import pretrained

    jax.config.update("jax_enable_x64", True)
    x = np.random.RandomState(1).uniform(size=(2, size, size, 3))
    network = timm.create_model(theirs, num_classes=CLASSES)
    if conventions == "siglip":  # see vision_transformers
        for module in network.modules():
            if isinstance(getattr(module, "act", None), torch.nn.GELU):
                module.act = torch.nn.GELU("tanh")
    state = state_dict({key: tuple(value.shape) for key, value in network.state_dict().items()})
    network.load_state_dict({key: torch.as_tensor(array) for key, array in state.items()})
    if "pos_embed" in state:
        network.set_input_size(size)
    half, imagenet = ([0.5] * 3, [0.5] * 3), (data.IMAGENET_DEFAULT_MEAN, data.IMAGENET_DEFAULT_STD)
    of_images = {"own": half, "torch": imagenet, "dinov2": imagenet, "dinov2_plain": imagenet, "siglip": half}
    of_images |= dict.fromkeys(("clip", "open_clip"), (data.OPENAI_CLIP_MEAN, data.OPENAI_CLIP_STD))
    scaled = torch.as_tensor(x.transpose(0, 3, 1, 2).copy())
    scaled = torchvision.transforms.functional.normalize(scaled, *of_images[conventions])
    with torch.no_grad():
        expected = network.double().eval()(scaled).numpy()
    model = default.get_config().model
    model.update({"name": name, "conventions": conventions, "dtype": "float64"})
    ours = models.create(model, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        model.pretrained = f"{folder}/weights.safetensors"
        safetensors.numpy.save_file(state, model.pretrained)
        shapes = jax.eval_shape(lambda: ours.init(jax.random.key(0), x, train=True))
        variables = unflatten_dict(pretrained.fit(pretrained.read(model), model, shapes).arrays, sep="/")
    got = jax.jit(lambda v, x: ours.apply(v, x, train=False))(variables, 2 * x - 1)
    spread = expected.std(0).mean()
    off = np.abs(got - expected).max() / spread
    print(f"{name} as {theirs}, {size} pixels: off by {off:.1e} of the spread from image to image, {spread:.2f}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, theirs, conventions, size = re.fullmatch(r"(\w+)=(\w+):(\w+):(\d+)", argument).groups()
        compare(name, theirs, conventions, int(size))
    if not sys.argv[1:]:
        main()
