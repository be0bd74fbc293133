import functools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from ieg_jax.data import autoaugment


def pictures():
    """Random images, images of few grey levels and constant ones, of several shapes."""
    generator = np.random.default_rng(0)
    for height, width, channels in [(32, 32, 3), (33, 47, 3), (8, 5, 1), (3, 3, 3), (2, 6, 3), (64, 31, 1)]:
        for low, high in [(0, 256), (60, 160), (77, 78)]:
            yield generator.integers(low, high, (height, width, channels)).astype(np.uint8)


def to_pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def from_pillow(image):
    return np.asarray(image).reshape(image.height, image.width, -1)


def fill_color(image, fill):
    return fill if image.mode == "L" else (fill,) * 3


def affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill_color(image, fill))


def enhance(name):
    return lambda image, factor: getattr(ImageEnhance, name)(image).enhance(factor)


FACTORS = [0.0, 0.1, 0.64, 1.0, 1.9]
SHEARS = [-0.3, -0.12, 0.0, 0.03, 0.3]
SHIFTS = [-250.0, -2.5, -1.0, 0.0, 2.4, 9.0]
DEGREES = [-30.0, -3.0, 0.0, 12.5, 30.0, 77.0, 90.0]
# name → (the same in Pillow, values). These agree in every pixel: whole numbers, float64 or fixed point on both sides.
EXACT = {
    "Invert": (lambda image, _: ImageOps.invert(image), [0]),
    "AutoContrast": (lambda image, _: ImageOps.autocontrast(image), [0]),
    "Equalize": (lambda image, _: ImageOps.equalize(image), [0]),
    "Solarize": (ImageOps.solarize, [0, 1, 51, 128, 230.4, 255, 256]),
    "Posterize": (ImageOps.posterize, [1, 2, 4, 7, 8]),
    "Rotate": (lambda image, v: image.rotate(v, fillcolor=fill_color(image, 7)), DEGREES),
    "ShearX": (lambda image, v: affine(image, (1, v, 0, 0, 1, 0), 7), SHEARS),
    "ShearY": (lambda image, v: affine(image, (1, 0, 0, v, 1, 0), 7), SHEARS),
    "TranslateX": (lambda image, v: affine(image, (1, 0, v, 0, 1, 0), 7), SHIFTS),
    "TranslateY": (lambda image, v: affine(image, (1, 0, 0, 0, 1, v), 7), SHIFTS),
}
# These end in a float32 product and sum, which some compilers fuse: a grey level apart in few pixels, if any.
BLENDS = {name: (enhance(name), FACTORS) for name in ("Color", "Contrast", "Brightness", "Sharpness")}


def run(name, image, value, centre=(0, 0), fill=7):
    return autoaugment.PRIMITIVES[name](tf.constant(image), value, tf.constant(centre), fill).numpy()


@pytest.mark.parametrize("name", EXACT)
def test_primitive_equals_pillow(name):
    reference, values = EXACT[name]
    for image in pictures():
        for value in values:
            result = run(name, image, value)
            np.testing.assert_array_equal(result, from_pillow(reference(to_pillow(image), value)), f"{name} {value}")
            assert result.dtype == np.uint8


@pytest.mark.parametrize("name", BLENDS)
def test_blend_equals_pillow(name):
    reference, values = BLENDS[name]
    for image in pictures():
        for value in values:
            expected = from_pillow(reference(to_pillow(image), value)).astype(int)
            apart = np.abs(run(name, image, value).astype(int) - expected)
            assert apart.max() <= 1 and np.count_nonzero(apart) <= 0.001 * apart.size, f"{name} {value}"


def test_solarize_add():
    image = np.array([[0, 100, 127, 128, 255]], np.uint8)[..., None]
    np.testing.assert_array_equal(run("SolarizeAdd", image, 77)[0, :, 0], [77, 177, 204, 128, 255])
    np.testing.assert_array_equal(run("SolarizeAdd", image, -110)[0, :, 0], [0, 0, 17, 128, 255])


def test_posterize_to_no_bits_is_black():
    assert not run("Posterize", next(pictures()), 0).any()


@pytest.mark.parametrize("reach, centre, rows, columns", [(2, (3, 4), (1, 5), (2, 6)), (3, (0, 8), (0, 3), (5, 9))])
def test_cutout_reaches_to_both_sides_and_stops_at_the_border(reach, centre, rows, columns):
    expected = np.zeros([6, 9, 3], np.uint8)
    expected[slice(*rows), slice(*columns)] = 128
    np.testing.assert_array_equal(run("Cutout", np.zeros([6, 9, 3], np.uint8), reach, centre), expected)


def test_cutout_of_nothing():
    assert not run("Cutout", np.zeros([6, 9, 3], np.uint8), 0, (3, 3)).any()


@pytest.mark.parametrize("name", autoaugment.PRIMITIVES)
def test_the_value_may_be_a_tensor_of_a_tf_data_map(name):
    _, values = (EXACT | BLENDS).get(name, (None, [0, 3]))
    image = next(pictures())
    dataset = tf.data.Dataset.from_tensor_slices(np.array(values, np.float32))
    results = dataset.map(lambda value: autoaugment.PRIMITIVES[name](tf.constant(image), value, tf.constant([4, 5]), 7))
    assert results.element_spec.shape == image.shape
    for value, result in zip(values, results.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(result, run(name, image, value, (4, 5)))


# What the published definitions give at levels 0, 3, 7 and 10, by hand.
LEVELS = [
    (autoaugment.cifar_parameters, "Rotate", [0, 9, 21, 30], True),
    (autoaugment.cifar_parameters, "ShearX", [0, 0.09, 0.21, 0.3], True),
    (autoaugment.cifar_parameters, "ShearY", [0, 0.09, 0.21, 0.3], True),
    (autoaugment.cifar_parameters, "TranslateX", [0, 3, 7, 10], True),
    (autoaugment.cifar_parameters, "TranslateY", [0, 3, 7, 10], True),
    (autoaugment.cifar_parameters, "Solarize", [256, 180, 77, 0], False),
    (autoaugment.cifar_parameters, "Posterize", [4, 3, 2, 0], False),
    (autoaugment.cifar_parameters, "Color", [0.1, 0.64, 1.36, 1.9], False),
    (autoaugment.cifar_parameters, "Contrast", [0.1, 0.64, 1.36, 1.9], False),
    (autoaugment.cifar_parameters, "Brightness", [0.1, 0.64, 1.36, 1.9], False),
    (autoaugment.cifar_parameters, "Sharpness", [0.1, 0.64, 1.36, 1.9], False),
    (autoaugment.cifar_parameters, "Cutout", [0, 3, 7, 10], False),
    (autoaugment.imagenet_parameters, "Rotate", [0, 9, 21, 30], True),
    (autoaugment.imagenet_parameters, "ShearX", [0, 0.09, 0.21, 0.3], True),
    (autoaugment.imagenet_parameters, "ShearY", [0, 0.09, 0.21, 0.3], True),
    (autoaugment.imagenet_parameters, "TranslateY", [0, 75, 175, 250], True),
    (autoaugment.imagenet_parameters, "Solarize", [0, 76, 179, 256], False),
    (autoaugment.imagenet_parameters, "SolarizeAdd", [0, 33, 77, 110], False),
    (autoaugment.imagenet_parameters, "Posterize", [1, 1, 2, 4], False),
    (autoaugment.imagenet_parameters, "Color", [0.1, 0.64, 1.36, 1.9], False),
    (functools.partial(autoaugment.imagenet_parameters, translate_pixels=100), "TranslateY", [0, 30, 70, 100], True),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "Rotate", [0, 9, 21, 30], True),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "ShearX", [0, 0.09, 0.21, 0.3], True),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "ShearY", [0, 0.09, 0.21, 0.3], True),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "TranslateX", [0, 5, 13, 18], True),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "TranslateY", [0, 3, 6, 9], True),
    (
        functools.partial(autoaugment.randaugment_parameters, height=20, width=40),
        "Solarize",
        [256, 179.2, 76.8, 0],
        False,
    ),
    (functools.partial(autoaugment.randaugment_parameters, height=20, width=40), "Posterize", [8, 7, 5, 4], False),
    (
        functools.partial(autoaugment.randaugment_parameters, height=20, width=40),
        "Contrast",
        [0.1, 0.64, 1.36, 1.9],
        False,
    ),
]


@pytest.mark.parametrize("parameters, name, values, signed", LEVELS)
def test_what_a_level_means(parameters, name, values, signed):
    got = [parameters(level)[name] for level in (0, 3, 7, 10)]
    np.testing.assert_allclose([parameter.value for parameter in got], values, rtol=1e-12)
    assert {parameter.signed for parameter in got} == {signed}


def test_operations_of_the_tables():
    cifar, imagenet = autoaugment.SUB_POLICIES["cifar"], autoaugment.SUB_POLICIES["imagenet_v0"]
    assert len(cifar) == 95 and len(imagenet) == 25
    for table, parameters in [(cifar, autoaugment.cifar_parameters), (imagenet, autoaugment.imagenet_parameters)]:
        operations = [operation for sub_policy in table for operation in sub_policy]
        assert {name for name, _, _ in operations} <= set(parameters(0)) <= set(autoaugment.PRIMITIVES)
        assert all(0 <= p <= 1 and 0 <= level <= 10 for _, p, level in operations)
    assert len(autoaugment.randaugment_parameters(5, 32, 32)) == 14


def draws(draw, n):
    """`draw(seed)` for n seeds, stacked."""
    dataset = tf.data.Dataset.range(n).map(lambda i: draw(tf.stack([i, 7 * i + 1]))).batch(n)
    return autoaugment.Drawn(*next(dataset.as_numpy_iterator()))


def within_binomial(counts, n, p):
    """Whether counts are within 5 standard deviations of n · p."""
    p = np.asarray(p, float)
    return np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9


def test_every_sub_policy_comes_as_often_as_the_others_and_its_operations_as_they_should():
    n, size = 9500, 95
    chances = np.array([[p for _, p, _ in sub_policy] for sub_policy in autoaugment.SUB_POLICIES["cifar"]])
    # The level says which sub-policy it was.
    table = [[("TranslateX", p, 1 + row) for p in pair] for row, pair in enumerate(chances)]
    drawn = draws(lambda seed: autoaugment.draw_sub_policy(seed, table, autoaugment.cifar_parameters), n)
    row = np.abs(drawn.values[:, 0]).astype(int) - 1
    np.testing.assert_array_equal(np.abs(drawn.values[:, 1]), 1 + row)
    assert within_binomial(np.bincount(row, minlength=size), n, 1 / size).all()
    applied = drawn.operations != len(autoaugment.cifar_parameters(0))
    assert set(drawn.operations[applied]) == {list(autoaugment.cifar_parameters(0)).index("TranslateX")}
    for which in range(size):
        here = row == which
        assert within_binomial(applied[here].sum(0), here.sum(), chances[which]).all()
    negative = drawn.values < 0
    assert within_binomial(negative.sum(0), n, 0.5).all()
    # The two signs, and application and sign, have nothing to do with each other.
    assert within_binomial((negative[:, 0] == negative[:, 1]).sum(), n, 0.5)
    assert within_binomial((negative & applied).sum(0), n, chances.mean(0) / 2).all()
    assert drawn.centres.min() >= 0 and drawn.centres.max() < 1
    assert within_binomial((drawn.centres < 0.3).sum(0), n, 0.3).all()


def test_randaugment_draws_each_operation_as_often():
    n = 4200
    parameters = autoaugment.randaugment_parameters(10, 32, 32)
    drawn = draws(lambda seed: autoaugment.draw_operations(seed, 3, parameters), n)
    for layer in range(3):
        assert within_binomial(np.bincount(drawn.operations[:, layer], minlength=14), n, 1 / 14).all()
    assert within_binomial((drawn.operations[:, 0] == drawn.operations[:, 1]).sum(), n, 1 / 14)
    rotated = drawn.values[drawn.operations == list(parameters).index("Rotate")]
    assert set(rotated) == {-30, 30} and within_binomial((rotated < 0).sum(), len(rotated), 0.5)
    assert set(drawn.values[drawn.operations == list(parameters).index("Color")]) == {np.float32(1.9)}


def by_pillow(image, drawn, names, fill):
    """What was drawn, done by Pillow."""
    for operation, value, centre in zip(*map(np.asarray, drawn), strict=True):
        name = [*names, "Identity"][operation]
        height, width = image.shape[:2]
        row, column = (centre * [height, width]).astype(int)
        if name == "Cutout":
            reach, image = int(value), image.copy()
            image[max(0, row - reach) : row + reach, max(0, column - reach) : column + reach] = 128
        elif name == "SolarizeAdd":
            image = np.where(image < 128, np.clip(image.astype(int) + int(value), 0, 255), image).astype(np.uint8)
        elif name == "Rotate":
            image = from_pillow(to_pillow(image).rotate(value, fillcolor=fill_color(to_pillow(image), fill)))
        elif name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
            matrix = np.eye(2, 3)
            matrix["XY".index(name[-1]), 2 if name.startswith("T") else "YX".index(name[-1])] += value
            image = from_pillow(affine(to_pillow(image), matrix.ravel().tolist(), fill))
        elif name == "Posterize":
            image = from_pillow(ImageOps.posterize(to_pillow(image), int(value)))
        elif name != "Identity":
            image = from_pillow((EXACT | BLENDS)[name][0](to_pillow(image), float(value)))
    return image


SIZE = (32, 36)
POLICIES = {
    "cifar": (
        autoaugment.autoaugment_cifar,
        lambda seed: autoaugment.draw_sub_policy(seed, autoaugment.SUB_POLICIES["cifar"], autoaugment.cifar_parameters),
        list(autoaugment.cifar_parameters(0)),
        0,
    ),
    "cifar on grey": (
        functools.partial(autoaugment.autoaugment_cifar, fill=0.0),
        lambda seed: autoaugment.draw_sub_policy(seed, autoaugment.SUB_POLICIES["cifar"], autoaugment.cifar_parameters),
        list(autoaugment.cifar_parameters(0)),
        128,
    ),
    "imagenet": (
        autoaugment.autoaugment_imagenet,
        lambda seed: autoaugment.draw_sub_policy(
            seed, autoaugment.SUB_POLICIES["imagenet_v0"], autoaugment.imagenet_parameters
        ),
        list(autoaugment.imagenet_parameters(0)),
        128,
    ),
    "randaugment": (
        functools.partial(autoaugment.randaugment, layers=3, magnitude=6.0),
        lambda seed: autoaugment.draw_operations(seed, 3, autoaugment.randaugment_parameters(6.0, *SIZE)),
        list(autoaugment.randaugment_parameters(6.0, *SIZE)),
        128,
    ),
}


@pytest.mark.parametrize("name, channels", [*((name, 3) for name in POLICIES), ("cifar", 1), ("imagenet", 1)])
def test_policy_does_what_it_drew(name, channels):
    policy, draw, names, fill = POLICIES[name]
    n = 60
    images = np.random.default_rng(1).integers(0, 256, (n, *SIZE, channels)).astype(np.uint8)

    def example(pixels, i):
        seed = tf.stack([i, 3 * i])
        return policy(tf.cast(pixels, tf.float32) / 127.5 - 1.0, seed), draw(seed)

    dataset = tf.data.Dataset.from_tensor_slices((images, np.arange(n))).map(example)
    results, drawn = next(dataset.batch(n).as_numpy_iterator())
    assert results.dtype == np.float32 and results.shape == images.shape and np.abs(results).max() <= 1
    for i in range(n):
        expected = by_pillow(images[i], [part[i] for part in drawn], names, fill)
        np.testing.assert_allclose((results[i] + 1) * 127.5, expected, atol=1e-4)


@pytest.mark.parametrize(
    "policy", [autoaugment.autoaugment_cifar, autoaugment.autoaugment_imagenet, autoaugment.randaugment]
)
def test_same_seed_same_result_other_seed_other_result(policy):
    image = tf.constant(np.random.default_rng(2).uniform(-1, 1, (24, 20, 3)), tf.float32)
    runs = [[policy(image, tf.constant([3, i], tf.int64)).numpy().tobytes() for i in range(20)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 8


def test_the_graph_has_one_case_for_each_operation_of_a_sub_policy():
    seed = tf.TensorSpec([2], tf.int64)
    graph = tf.function(autoaugment.autoaugment_cifar).get_concrete_function(tf.TensorSpec([32, 32, 3]), seed).graph
    assert [node.type for node in graph.get_operations()].count("StatelessCase") == 2


def by_transparent_pillow(image, drawn, names):
    """The released form: Pillow's images of four channels, and those that work on colours alone make them opaque."""
    picture = to_pillow(image).convert("RGBA")
    for operation, value, centre in zip(*map(np.asarray, drawn), strict=True):
        name, value = [*names, "Identity"][operation], float(value)
        if name == "Rotate":
            picture = picture.rotate(value, fillcolor=(0, 0, 0, 0))
        elif name in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
            matrix = np.eye(2, 3)
            matrix["XY".index(name[-1]), 2 if name.startswith("T") else "YX".index(name[-1])] += value
            picture = picture.transform(picture.size, Image.AFFINE, matrix.ravel().tolist(), fillcolor=(0, 0, 0, 0))
        elif name == "Cutout":
            row, column = (centre * image.shape[:2]).astype(int)
            reach, content = int(value), np.array(picture)
            content[max(0, row - reach) : row + reach, max(0, column - reach) : column + reach, :3] = 128
            picture = Image.fromarray(content)
        elif name in ("Color", "Contrast", "Brightness", "Sharpness"):
            picture = getattr(ImageEnhance, name)(picture).enhance(value)
        elif name == "Posterize":
            picture = ImageOps.posterize(picture.convert("RGB"), int(value)).convert("RGBA")
        elif name == "Solarize":
            picture = ImageOps.solarize(picture.convert("RGB"), value).convert("RGBA")
        elif name != "Identity":
            picture = getattr(ImageOps, name.lower())(picture.convert("RGB")).convert("RGBA")
    content = np.asarray(picture)
    return np.where(content[..., 3:] > 0, content[..., :3] / 127.5 - 1, 0.0), (content[..., 3] == 0).any()


def chance_of_grey(sub_policy):
    """That pixels from outside come into an image and that nothing makes them opaque, by the table."""
    chance = 0.0
    for name, probability, level in sub_policy:
        moves = name in autoaugment.GEOMETRY and level > 0
        opaque = name in autoaugment.OPAQUE
        chance += probability * ((1 - chance) * moves - chance * opaque)
    return chance


def test_what_stays_transparent_becomes_grey():
    _, draw, names, _ = POLICIES["cifar"]
    n = 600
    images = np.random.default_rng(1).integers(0, 256, (n, *SIZE, 3)).astype(np.uint8)

    def example(pixels, i):
        seed = tf.stack([i, 3 * i])
        image = tf.cast(pixels, tf.float32) / 127.5 - 1.0
        return autoaugment.autoaugment_cifar(image, seed, transparent=1), draw(seed)

    dataset = tf.data.Dataset.from_tensor_slices((images, np.arange(n))).map(example)
    results, drawn = next(dataset.batch(n).as_numpy_iterator())
    transparent = 0
    for i in range(n):
        expected, some = by_transparent_pillow(images[i], [part[i] for part in drawn], names)
        transparent += some
        apart = np.abs(results[i] - expected) * 127.5
        assert apart.max() < 1.01 and (apart > 0.01).mean() < 0.001, "as the blends, which may round otherwise"
    share = np.mean([chance_of_grey(policy) for policy in autoaugment.SUB_POLICIES["cifar"]])
    assert share == pytest.approx(0.128, abs=5e-4)
    assert within_binomial(transparent, n, share)
