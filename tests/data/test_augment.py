import numpy as np
import pytest
import tensorflow as tf

from ieg_jax.data import augment
from ieg_jax.data.augment import parse_policy
from ieg_jax.errors import UserError


def seed(*numbers):
    return tf.constant(numbers, tf.int64)


def picture(height=6, width=8, channels=1):
    return tf.reshape(tf.linspace(-0.9, 0.9, height * width * channels), [height, width, channels])


def results(policy, image, n=200):
    return [parse_policy(policy, "key")(image, seed(0, i)).numpy() for i in range(n)]


@pytest.mark.parametrize(
    "policy", ["crop(2)", "flip", "affine(rotate=30,translate=0.2)", "intensity(0.5)", "cutout(0.5)"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_result_other_seed_other_result(policy, channels):
    image = picture(channels=channels)
    first, again = results(policy, image, 12), results(policy, image, 12)
    np.testing.assert_array_equal(first, again)
    assert len({r.tobytes() for r in first}) > 1
    assert all(r.shape == image.shape and r.dtype == np.float32 for r in first)
    assert max(np.abs(r).max() for r in first) <= 1.0


def test_crop_takes_every_window_of_the_padded_image():
    image = picture()
    padded = np.pad(image.numpy(), ((1, 1), (1, 1), (0, 0)), constant_values=-1)
    windows = {padded[y : y + 6, x : x + 8].tobytes() for y in range(3) for x in range(3)}
    assert {r.tobytes() for r in results("crop(pad=1)", image)} == windows


def test_crop_without_its_last_offset():
    image = picture()
    padded = np.pad(image.numpy(), ((2, 2), (2, 2), (0, 0)), constant_values=-1)
    windows = {padded[y : y + 6, x : x + 8].tobytes() for y in range(4) for x in range(4)}
    assert {r.tobytes() for r in results("crop(pad=2,last=0)", image)} == windows
    assert {r.tobytes() for r in results("crop(pad=0,last=0)", image)} == {image.numpy().tobytes()}


def test_flip_mirrors_about_half_the_time():
    image = picture()
    flipped = [np.array_equal(r, image.numpy()[:, ::-1]) for r in results("flip", image)]
    plain = [np.array_equal(r, image) for r in results("flip", image)]
    assert all(a != b for a, b in zip(flipped, plain, strict=True))
    assert 70 < sum(flipped) < 130


def test_affine_of_nothing_is_the_identity():
    np.testing.assert_allclose(augment.affine(picture(), seed(0, 1)), picture(), atol=1e-6)


def test_affine_translates_by_what_it_drew():
    image = tf.tensor_scatter_nd_update(tf.fill([9, 9, 1], -1.0), [[4, 4, 0]], [1.0])
    for number in range(20):
        u = tf.random.stateless_uniform([5], seed(0, number), -1.0, 1.0).numpy()
        moved = augment.affine(image, seed(0, number), translate=0.3).numpy()[..., 0] + 1
        rows, columns = np.indices((9, 9))
        centre = (moved * rows).sum() / moved.sum(), (moved * columns).sum() / moved.sum()
        np.testing.assert_allclose(centre, (4 + u[4] * 2.7, 4 + u[3] * 2.7), atol=1e-3)


def test_affine_rotates_about_the_centre():
    image = tf.tensor_scatter_nd_update(tf.fill([9, 9, 1], -1.0), [[4, 7, 0]], [1.0])
    for number in range(20):
        u = tf.random.stateless_uniform([5], seed(0, number), -1.0, 1.0).numpy()
        moved = augment.affine(image, seed(0, number), rotate=90.0).numpy()[..., 0] + 1
        rows, columns = np.indices((9, 9))
        y, x = (moved * rows).sum() / moved.sum() - 4, (moved * columns).sum() / moved.sum() - 4
        angle = np.arctan2(-y, x)
        assert abs(np.angle(np.exp(1j * (angle - u[0] * np.pi / 2)))) < 0.12
        assert abs(np.hypot(x, y) - 3) < 0.35


def test_cutout_fills_a_clipped_square_with_grey():
    image = tf.ones([8, 8, 1])
    areas = [(r == 0).sum() for r in results("cutout(0.5)", image)]
    assert max(areas) == 16
    assert min(areas) >= 4
    for r in results("cutout(0.5)", image, 20):
        hole = np.argwhere(r[..., 0] == 0)
        assert len(hole) == np.prod(np.ptp(hole, axis=0) + 1), "one rectangle"


def test_intensity_is_linear():
    for r in results("intensity(0.1)", picture(), 10):
        slope, shift = np.polyfit(picture().numpy().ravel(), r.ravel(), 1)
        assert abs(slope - 1) < 0.1
        assert abs(shift) < 0.1


def test_operations_are_applied_in_order_with_seeds_of_their_own():
    image = picture()
    s = seed(3, 4)
    fold = tf.random.experimental.stateless_fold_in
    expected = augment.cutout(augment.crop(image, fold(s, 0), 1), fold(s, 1), 0.4)
    np.testing.assert_array_equal(parse_policy("crop(1)|cutout(size=0.4)", "key")(image, s), expected)
    np.testing.assert_array_equal(parse_policy("", "key")(image, s), image)


@pytest.mark.parametrize(
    "text, message",
    [
        ("crop(pad=-1)", "pad is -1, expected at least 0"),
        ("resize(0)", "size is 0, expected above 0"),
        ("random_resized_crop(8, smallest=2)", "smallest is 2.0, expected a share"),
        ("random_resized_crop(8, stretch=0.5)", "stretch is 0.5, expected at least 1"),
        ("randaugment(layers=0)", "layers is 0, expected at least 1"),
        ("randaugment(magnitude=11)", "magnitude is 11.0, expected a level"),
        ("cutout(0.5, fill=2)", "fill is 2.0, expected a grey value"),
        ("intensity(1e999)", "strength is inf, expected a number"),
    ],
)
def test_numbers_that_make_no_sense(text, message):
    with pytest.raises(UserError, match=f"augment.strong: .*{message}"):
        augment.parse_policy(text, "augment.strong")
