"""Vision Transformers against those of timm, torchvision and transformers, for the same weights; tiny ones."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_step
import torch_networks
from conftest import x64
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import default
from ieg_jax import models
from ieg_jax.data.backbone import Backbone
from ieg_jax.errors import UserError
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import pretrained, vit
from ieg_jax.train.loop import train_and_evaluate

CLASSES = torch_networks.CLASSES
TINY = vit.Size(patch=8, features=32, depth=2, heads=2, hidden=64)


def group(path="", **keys):
    model = default.get_config().model
    model.update({"name": "vit_s16", "pretrained": str(path), **keys})
    return model


def variables_of(network, size):
    images = jnp.zeros((1, *size, 3))
    return jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=True))


def fit(path, state, conventions, size=(24, 24), num_classes=CLASSES):
    """The tiny network, in float64 where jax has it, and its weights from a file with the arrays of `state`."""
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    model = group(path, conventions=conventions)
    dtype = jnp.zeros(0).dtype
    network = TINY.from_config(model, num_classes=num_classes, dtype=dtype, param_dtype=dtype)
    return network, pretrained.fit(pretrained.read(model), model, variables_of(network, size))


@pytest.mark.parametrize(
    "name, conventions, title",
    [
        ("vit", "own", "timm's names"),
        ("vit_resampled", "own", "timm's names"),
        ("vit_torchvision", "torch", "torchvision's names"),
        ("vit_transformers", "own", "transformers' names of ViT"),
        ("dinov2", "dinov2", "timm's names"),
        ("dinov2_resampled", "dinov2", "timm's names"),
        ("dinov2_transformers", "dinov2", "transformers' names of DINOv2"),
        ("dinov2_plain", "dinov2_plain", "timm's names"),
        ("dinov2_plain_transformers", "dinov2_plain", "transformers' names of DINOv2"),
        ("clip", "clip", "timm's names"),
        ("open_clip", "open_clip", "timm's names"),
        ("clip_transformers", "clip", "transformers' names"),
        ("siglip", "siglip", "timm's names"),
        ("siglip_transformers", "siglip", "transformers' names"),
    ],
)
def test_answers_are_those_of_torch(name, conventions, title, tmp_path):
    """Logits, or features where the file has no head; of files with a text tower too."""
    state, images, expected = torch_networks.golden(name)
    headless = expected.shape[1] != CLASSES
    with x64(True):
        network, weights = fit(tmp_path / "weights.safetensors", state, conventions, images.shape[1:3])
        assert f"({title}, " in weights.note
        assert ("it has no head, which starts afresh" in weights.note) == headless
        assert ("params/position resampled from (3, 3, 32) to (" in weights.note) == ("resampled" in name)
        head = {"params/head/kernel": np.zeros((32, CLASSES)), "params/head/bias": np.zeros(CLASSES)}
        variables = unflatten_dict({**head, **weights.arrays} if headless else weights.arrays, sep="/")

        def answer(network):
            forward = functools.partial(inputs_of_head, network) if headless else network.apply
            kw = {} if headless else {"train": False}
            return np.asarray(jax.jit(functools.partial(forward, **kw))(variables, 2 * images - 1), np.float64)

        spread = expected.std(0).mean()  # from image to image
        assert spread > 0.1 * expected.std()
        # timm and transformers interpolate in float32; everything else is in float64 on both sides.
        np.testing.assert_allclose(answer(network), expected, atol=1e-5 * spread, rtol=0)


def test_low_precision_and_other_conventions(tmp_path):
    state, images, expected = torch_networks.golden("clip")
    network, weights = fit(tmp_path / "weights.safetensors", state, "clip")
    variables, inputs = unflatten_dict(weights.arrays, sep="/"), jnp.float32(2 * images - 1)

    def answer(**changed):
        return jax.jit(functools.partial(network.clone(**changed).apply, train=False))(variables, inputs)

    low = answer(dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32 and 0 < np.abs(low - expected).max() < 0.2 * np.abs(expected).max()
    assert np.abs(answer(conventions="open_clip") - expected).max() > 1e-3 * expected.std()


def openai(state):
    """timm's names of CLIP -> those of OpenAI and OpenCLIP, with the projection and the text tower beside."""
    names = {
        "patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm.": "ln_post.", "cls_token": "class_embedding",
        "pos_embed": "positional_embedding", "blocks.": "transformer.resblocks.", "attn.proj": "attn.out_proj",
        "attn.qkv.": "attn.in_proj_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", ".norm": ".ln_",
    }  # fmt: skip
    renamed = {}
    for name, array in state.items():
        if name.startswith("head."):
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours) if theirs != "norm." or name.startswith("norm.") else name
        shape = {"class_embedding": -1, "positional_embedding": array.shape[1:]}.get(name, array.shape)
        renamed[f"visual.{name}"] = array.reshape(shape)
    others = ("visual.proj", "positional_embedding", "text_projection", "logit_scale", "ln_final.weight")
    others += ("token_embedding.weight", "transformer.resblocks.0.attn.in_proj_weight")
    return renamed | {name: np.zeros((2, 2), np.float32) for name in others}


def published_dinov2(state):
    """timm's names of DINOv2 -> the published ones, in which the class token has a place of its own."""
    place = np.full((1, 1, 32), 0.25, np.float32)
    changed = {
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - place,
        "pos_embed": np.concatenate([place, state["pos_embed"]], 1),
        "mask_token": np.zeros((1, 32), np.float32),
    }
    return {name: array for name, array in state.items() if name != "reg_token" and "head" not in name} | changed


@pytest.mark.parametrize(
    "golden, conventions, rename, title",
    [
        ("clip", "clip", openai, "the published names of CLIP"),
        ("dinov2", "dinov2", published_dinov2, "the published names of DINOv2"),
        (
            "dinov2_plain",
            "dinov2_plain",
            lambda state: state | {"mask_token": np.zeros((1, 32), np.float32)},
            "timm's names",
        ),
        (
            "siglip",
            "siglip",
            lambda state: {f"visual.trunk.{k}": v for k, v in state.items()} | {"text.x": np.zeros(1, np.float32)},
            "timm's names in OpenCLIP",
        ),
        (
            "siglip_transformers",
            "siglip",
            lambda state: {k[13:]: v for k, v in state.items() if k.startswith("vision_model.")},
            "transformers' names of an image tower",
        ),
    ],
)
def test_the_same_arrays_by_other_names(golden, conventions, rename, title, tmp_path):
    state, _, _ = torch_networks.golden(golden)
    _, ours = fit(tmp_path / "ours.safetensors", state, conventions)
    _, theirs = fit(tmp_path / "theirs.safetensors", rename(state), conventions)
    assert f"({title}, " in theirs.note
    assert ours.arrays.keys() - theirs.arrays.keys() <= {"params/head/kernel", "params/head/bias"}
    for path, array in theirs.arrays.items():
        np.testing.assert_allclose(array, ours.arrays[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "golden, expected",
    [
        ("vit", "'own' or 'torch'"),
        ("dinov2", "'dinov2'"),
        ("dinov2_plain", "'dinov2_plain'"),
        ("dinov2_plain_transformers", "'dinov2_plain'"),
        ("clip", "'clip' or 'open_clip'"),
        ("siglip", "'siglip'"),
        ("vit_torchvision", "'torch'"),
        ("vit_transformers", "'own' or 'torch'"),
        ("dinov2_transformers", "'dinov2'"),
        ("clip_transformers", "'clip' or 'open_clip'"),
        ("siglip_transformers", "'siglip'"),
    ],
)
def test_a_file_says_which_conventions_it_needs(golden, expected, tmp_path):
    state, _, _ = torch_networks.golden(golden)
    for conventions in vit.FORMS:
        if f"'{conventions}'" not in expected:
            with pytest.raises(UserError, match=rf"model.conventions: got '{conventions}', expected {expected}: the"):
                fit(tmp_path / "weights.safetensors", state, conventions)


def test_what_does_not_fit_is_named(tmp_path):
    state, _, _ = torch_networks.golden("vit")
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=r": 1 missing: blocks\.1\.attn\.qkv\.bias; 1 not known: aux"):
        changed = {name: array for name, array in state.items() if name != "blocks.1.attn.qkv.bias"}
        fit(path, changed | {"aux": np.zeros(1, np.float32)}, "own")
    with pytest.raises(UserError, match=r": 1 of another shape: pos_embed with \(12, 32\) for \(3, 3, 32\)$"):
        fit(path, state | {"pos_embed": np.zeros((1, 12, 32), np.float32)}, "own")
    separate, _, _ = torch_networks.golden("vit_transformers")
    name = "vit.encoder.layer.0.attention.attention.value.weight"
    with pytest.raises(
        UserError, match=r"arrays that do not fit together: .*\.query\.weight with \(32, 32\), .*ValueE"
    ):
        fit(path, separate | {name: np.zeros((32, 31), np.float32)}, "own")
    _, weights = fit(path, state, "own", num_classes=3)
    assert "its head is for 7 classes, this one for 3 starts afresh" in weights.note


def test_own_weights_for_another_size_of_images(tmp_path):
    """Of a plane it is that plane, but for the border; images need not be square."""
    network = TINY.from_config(group(), num_classes=CLASSES)
    own = flatten_dict(variables_of(network, (48, 24)), sep="/")
    assert own["params/position"].shape == (6, 3, 32)
    places = np.broadcast_to(np.arange(6.0, dtype=np.float32)[:, None, None], (6, 3, 32))
    own = {name: np.zeros(leaf.shape, np.float32) for name, leaf in own.items()} | {"params/position": places}
    _, weights = fit(tmp_path / "weights.safetensors", own, "own", (96, 16))
    assert "(as ieg_jax.export writes them, " in weights.note
    got = weights.arrays["params/position"]
    assert got.shape == (12, 2, 32)
    np.testing.assert_allclose(
        got[4:8], np.broadcast_to(np.arange(4, 8)[:, None, None] / 2 - 0.25, (4, 2, 32)), atol=1e-5
    )


def test_attention_by_hand():
    query = jnp.array([[[[2.0, 0.0]], [[0.0, 0.0]]]])
    key = jnp.array([[[[1.0, 5.0]], [[0.0, 7.0]]]])
    value = jnp.array([[[[1.0, 10.0]], [[3.0, 30.0]]]])
    share = 1 / (1 + math.exp(-2 / math.sqrt(2)))
    expected = [[share + 3 * (1 - share), 10 * share + 30 * (1 - share)], [2, 20]]
    np.testing.assert_allclose(vit.attention(query, key, value)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("conventions", [pytest.param("dinov2", marks=pytest.mark.slow), "siglip"])
def test_second_derivatives(conventions):
    """Along a direction, against the difference quotient of the gradient, in float64; remat changes nothing."""
    with x64(True):
        size = vit.Size(patch=4, features=4, depth=1, heads=2, hidden=4)
        network = size.from_config(
            group(conventions=conventions), num_classes=3, dtype=jnp.float64, param_dtype=jnp.float64
        )
        rng = np.random.default_rng(0)
        images = rng.normal(size=(2, 8, 4, 3))
        shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=True))["params"]
        params, direction = (jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes) for _ in range(2))

        def loss(params, remat):
            logits = network.clone(remat=remat).apply({"params": params}, images, train=True)
            return jnp.sum(jax.nn.log_softmax(logits)[:, 0])

        @functools.partial(jax.jit, static_argnums=1)
        def along(params, remat):
            return jax.jvp(jax.grad(functools.partial(loss, remat=remat)), (params,), (direction,))

        def gradient(step):
            return along(jax.tree.map(lambda p, d: p + step * d, params, direction), False)[0]

        second = along(params, False)[1]
        quotient = jax.tree.map(lambda a, b: (a - b) / 2e-5, gradient(1e-5), gradient(-1e-5))
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(second))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), second, quotient)
        if conventions == "siglip":
            again = along(params, True)[1]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9 * scale), second, again)


@pytest.mark.parametrize(
    "name, conventions, parameters",
    [  # as they are counted elsewhere, where the class token is two: its own and the embedding of its place
        ("vit_s16", "own", 22_050_664 - 384),
        ("vit_b16", "torch", 86_567_656 - 768),
        ("vit_l16", "own", 304_326_632 - 1024),
        ("vit_s14", "dinov2", 22_056_576 + (4 - 1 - 1 + 16**2 - 37**2) * 384 + 385 * 1000),
        ("vit_b32", "clip", 87_456_000 - 768 + 769 * 1000),
        ("vit_b16", "siglip", 92_884_224 + 769 * 1000),
    ],
)
def test_parameter_counts(name, conventions, parameters):
    network = models.create(group(name=name, conventions=conventions), 1000)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables_of(network, (224, 224)))) == parameters


def test_images_that_cannot_be_cut():
    network = models.create(group(name="vit_b14"), 2)
    with pytest.raises(
        UserError, match=r"images of 224×225 .* patches of 14×14; expected .* 14, such as 224 or 238: data"
    ):
        variables_of(network, (224, 225))
    with pytest.raises(UserError, match="such as 14: data"):
        variables_of(network, (8, 8))


def test_conventions_of_other_networks():
    with pytest.raises(
        UserError, match=r"model\.conventions of vit_b16: got 'flax', expected one of own, torch, dinov2,"
    ):
        models.validate(group(name="vit_b16", conventions="flax"))
    with pytest.raises(
        UserError, match=r"model\.conventions of resnet50: got 'clip', expected one of own, torch, flax"
    ):
        models.validate(group(name="resnet50", conventions="clip"))
    with pytest.raises(UserError, match="model.conventions: got 'clip', .* expected 'own' for images with 1 channel"):
        network = TINY.from_config(group(conventions="clip"), num_classes=2)
        network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True)


def test_features_of_a_tower(tmp_path, monkeypatch):
    """As `python -m ieg_jax.embed` makes them; they are those of transformers."""
    state, images, expected = torch_networks.golden("clip_transformers")
    safetensors.numpy.save_file(state, tmp_path / "clip.safetensors")
    monkeypatch.setitem(models.REGISTRY, "vit_s16", TINY)
    keys = default.get_config().backbone
    keys.update({"name": "vit_s16", "pretrained": str(tmp_path / "clip.safetensors"), "conventions": "clip"})
    keys.image_size = 24
    backbone = Backbone(keys)
    np.testing.assert_allclose(backbone.features(images), expected, atol=1e-4)


@pytest.mark.slow
def test_a_step_of_ieg():
    """Lookahead and meta-gradient go through attention, without moving averages of batch norm; every weight moves."""
    size = vit.Size(patch=4, features=8, depth=1, heads=2, hidden=8)
    network = size.from_config(group(), num_classes=small_step.CLASSES)
    _, _, state, step = small_step.make("ieg", network=network)
    assert state.batch_stats == {}
    after, _ = jax.jit(step)(state, small_step.make_batch(), jax.random.key(1))
    assert after.batch_stats == {}
    for (path, old), new in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(after.params), strict=True):
        assert np.isfinite(new).all() and np.abs(new - old).max() > 0, path


@pytest.mark.slow
def test_a_run_of_ieg_from_published_weights(tiny_config, tmp_path, monkeypatch):
    """The meta-gradient goes through attention, and the weights move."""
    state, _, _ = torch_networks.golden("vit")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        images=rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8),
        labels=np.arange(40) % 4,
        trusted_images=rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        trusted_labels=np.arange(8) % 4,
    )
    safetensors.numpy.save_file(state, tmp_path / "vit.safetensors")
    monkeypatch.setitem(models.REGISTRY, "vit_s16", TINY)
    tiny_config.data.update(name="arrays", train=str(tmp_path / "own.npz"))
    tiny_config.noise.kind, tiny_config.noise.rate = "none", 0.0
    tiny_config.trusted.source = "separate"
    tiny_config.model.update(group(tmp_path / "vit.safetensors"))
    tiny_config.update(batch_size=4, num_train_steps=1, eval_every_steps=1, checkpoint_every_steps=1)
    result = train_and_evaluate(tiny_config, str(tmp_path / "run"))
    assert result["steps"] == 1 and 0 <= result["trusted_accuracy"] <= 1
    row = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert re.search(r'"optimizer/update_norm": [1-9]', row) or re.search(r'"optimizer/update_norm": 0\.0*[1-9]', row)
