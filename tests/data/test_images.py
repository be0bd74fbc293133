import dataclasses
import os
import re

import image_trees
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import default
from ieg_jax.data import augment, images, splits
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(path):
    content = path.read_bytes()
    return images.Encoded(tf.constant(content), tf.constant(images.check_image(content).plain))


def test_every_format_is_read_as_it_is_meant(tmp_path):
    want = image_trees.odd_images(tmp_path)
    for name, pixels in want.items():
        np.testing.assert_array_equal(encoded(tmp_path / name).whole(), pixels, err_msg=name)
        checked = images.check_image((tmp_path / name).read_bytes())
        assert (checked.height, checked.width, checked.error) == (*pixels.shape[:2], ""), name
    plain = {name for name in want if images.check_image((tmp_path / name).read_bytes()).plain}
    assert plain == {"plain.png", "plain.jpg", "grey.jpg", "grey.png"}


def test_originals_of_files_and_arrays(tmp_path):
    """Whatever holds the images: uint8, in the order that is asked for, each of its own size."""
    want = image_trees.odd_images(tmp_path)
    names = sorted(want)
    checked = images.check(np.array([str(tmp_path / name) for name in names], object))
    stored = images.FileImages(
        np.array([str(tmp_path / name) for name in names], object),
        np.array([one.plain for one in checked]),
        np.array([(one.height, one.width) for one in checked]),
    )
    split = splits.make_split(stored, np.zeros(len(names)), names=np.array(names, object))
    for row, pixels in zip((2, 0), split.originals(np.array([2, 0])), strict=True):
        np.testing.assert_array_equal(pixels, want[names[row]])
    assert split.is_visible
    floats = splits.make_split(np.array([0.0, 0.499, 1.0], np.float32).reshape(3, 1, 1, 1).repeat(2, 1), np.zeros(3))
    assert [int(pixels[0, 0, 0]) for pixels in floats.originals(range(3))] == [0, 127, 255] and floats.is_visible
    features = splits.make_split(np.zeros((3, 1, 1, 7), np.float32), np.zeros(3))
    assert not features.is_visible
    (tmp_path / names[0]).unlink()
    with pytest.raises(UserError, match=f"{re.escape(names[0])} cannot be read"):
        list(split.originals([0]))


def test_a_window_of_a_jpeg_is_that_part_of_the_whole(tmp_path):
    for name, image in (("colour.jpg", image_trees.picture(3, (200, 120))), ("grey.jpg", None)):
        image = image or image_trees.picture(4, (200, 120)).convert("L")
        image_trees.save(tmp_path / name, image, quality=95)
        whole = encoded(tmp_path / name).whole().numpy().astype(int)
        window = encoded(tmp_path / name).window(lambda size: tf.constant([17, 33, 64, 90])).numpy()
        part = whole[17 : 17 + 64, 33 : 33 + 90]
        # Colour is stored at half resolution: at the rim of the window its neighbours are not decoded.
        np.testing.assert_array_equal(window[2:-2, 2:-2], part[2:-2, 2:-2], err_msg=name)
        assert np.abs(window - part).max() <= (40 if name == "colour.jpg" else 0)


def test_windows_inside_tf_data_for_all_formats(tmp_path):
    want = image_trees.odd_images(tmp_path)
    names = sorted(want)
    checked = [images.check_image((tmp_path / name).read_bytes()) for name in names]
    stored = images.FileImages(np.array([str(tmp_path / name) for name in names]), np.array([c.plain for c in checked]))
    reader = stored[np.arange(len(names))[::-1]].reader()
    got = tf.data.Dataset.range(len(names)).map(
        lambda row: reader(row).window(lambda size: tf.stack([2, 3, size[0] - 5, size[1] - 4]))
    )
    for name, window in zip(names[::-1], got, strict=True):
        part = want[name][2:-3, 3:-1]
        assert np.abs(window.numpy().astype(int) - part)[2:-2, 2:-2].max() == 0, name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "zero bytes"),
        (b"not an image at all", "no image in a known format"),
        ("cut jpg", "cannot be decoded"),
        ("cut png", "cannot be decoded"),
        ("float tiff", "floats of unknown range"),
        ("long tiff", "integers of 32 bits and unknown range; save it with 8 or 16 bits"),
        ("holed jpg", "cannot be decoded: damaged or cut short (Corrupt JPEG data"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, content, message):
    if isinstance(content, str):
        what, suffix = content.split()
        image = image_trees.picture(1, (64, 64))
        kind = {"float": np.float32, "long": np.int32}.get(what)
        if what == "holed":
            image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        image = image if kind is None else Image.fromarray(np.ones((4, 4), kind))
        image.save(tmp_path / f"x.{suffix}")
        content = (tmp_path / f"x.{suffix}").read_bytes()
        half = len(content) // 2
        content = content[:half] + bytes(20) + content[half + 20 :] if what == "holed" else content
        content = content[: len(content) // 2] if what == "cut" else content
    checked = images.check_image(content)
    assert message in checked.error


@pytest.mark.parametrize("tags, white", [({}, 65535), ({images.BITS_PER_SAMPLE: 12}, 4095), ({281: 1000}, 1000)])
def test_the_file_says_what_white_is(tmp_path, tags, white, monkeypatch):
    """12 bits in 16 and the like: of a TIFF the tags count."""
    pixels = np.array([[0, white // 2, white]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={281: white} if 281 in tags else {})
    if images.BITS_PER_SAMPLE in tags:  # Pillow reads such files and does not write them
        read = images._highest
        stub = type("Stub", (), {"tag_v2": tags})
        monkeypatch.setattr(images, "_highest", lambda image: read(stub))
    decoded = images.decode_any((tmp_path / "x.tif").read_bytes())
    assert decoded[0, :, 0].tolist() == [0, round(255 * (white // 2) / white), 255]


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MOST_PIXELS", 63)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert (
        images.check_image((tmp_path / "x.png").read_bytes()).error == "64 pixels, expected at most 63; make it smaller"
    )


def test_images_without_contrast_are_told():
    assert splits.narrow_range(np.array([0, 26], np.uint8)) == splits.narrow_range(np.array([0.2, 0.31])) == ""
    assert splits.narrow_range(np.array([0, 1], np.uint8)).startswith("the pixels lie between 0 and 1, in less than")
    assert "between 0 and 0.00392, in less" in splits.narrow_range(np.array([0, 1 / 255], np.float32))


def test_files_are_decoded_once_and_again_when_they_change(tmp_path, monkeypatch):
    paths = []
    for number in range(3):
        image_trees.save(tmp_path / f"{number}.png", image_trees.picture(number))
        paths.append(str(tmp_path / f"{number}.png"))
    calls = []
    decode = images.check_image
    monkeypatch.setattr(images, "check_image", lambda content: calls.append(1) or decode(content))
    paths = np.array([*paths, str(tmp_path / "missing.png")])
    first = images.check(paths)
    assert [c.error for c in first] == ["", "", "", "no such file"]
    assert images.check(paths) == first and len(calls) == 3
    (tmp_path / "1.png").write_bytes(b"something else")
    assert images.check(paths)[1].error and len(calls) == 6
    stat = (tmp_path / "0.png").stat()
    (tmp_path / "0.png").write_bytes(b"x" * stat.st_size)
    os.utime(tmp_path / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert images.check(paths)[0].error and len(calls) == 9, "as many bytes, but a nanosecond later"


def test_a_passing_trouble_is_not_remembered(tmp_path, monkeypatch):
    image_trees.save(tmp_path / "x.png", image_trees.picture(1))
    paths = np.array([str(tmp_path / "x.png")], object)
    with monkeypatch.context() as patch:
        patch.setattr(images.pathlib.Path, "read_bytes", raise_permission_error)
        assert images.check(paths)[0].error == "cannot be read: Permission denied"
    assert images.check(paths)[0].error == ""


def raise_permission_error(path):
    raise PermissionError(13, "Permission denied")


def test_what_is_remembered_is_kept_part_by_part_and_made_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHECKED_AT_ONCE", 2)
    for k in range(5):
        image_trees.save(tmp_path / f"{k}.png", image_trees.picture(k, (10 + k, 9)))
    paths = np.array([str(tmp_path / f"{k}.png") for k in range(5)], object)
    first = images.check(paths)
    assert [(c.height, c.width) for c in first] == [(9, 10 + k) for k in range(5)]
    kept = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(kept) == 3
    kept[0].write_bytes(b"damaged")
    assert images.check(paths) == first
    assert len(kept[0].read_bytes()) > 10


def test_random_resized_crop_draws_what_it_says(tmp_path):
    """On an image whose pixels are their own coordinates, each crop tells which window it was."""
    height, width = 90, 120
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    image = tf.constant(np.stack([rows, columns, rows * 0], -1), tf.float32)
    areas, ratios = [], []
    for seed in range(300):
        crop = augment.random_resized_crop(image, tf.constant([seed, 1], tf.int64), 32, 0.25, 1.5).numpy()
        assert crop.shape == (32, 32, 3)
        # From one output pixel to the next, in source pixels.
        step_y, step_x = (crop[20, 16, 0] - crop[10, 16, 0]) / 10, (crop[16, 20, 1] - crop[16, 10, 1]) / 10
        tall, wide = step_y * (height - 1) / 2 * 32, step_x * (width - 1) / 2 * 32
        areas.append(tall * wide / (height * width))
        ratios.append(wide / tall)
    assert 0.24 < min(areas) < 0.3 and 0.9 < max(areas) <= 1.01
    assert 0.64 < min(ratios) < 0.75 and 1.35 < max(ratios) < 1.56


def test_resizing_is_pillows(tmp_path):
    picture = image_trees.picture(5, (90, 60))
    image_trees.save(tmp_path / "x.png", picture)
    got = augment.resize(encoded(tmp_path / "x.png"), None, 32)
    want = np.asarray(picture.resize((48, 32), Image.Resampling.BILINEAR), np.float32)
    assert got.shape == (32, 48, 3)
    assert np.abs((got.numpy() + 1) * 127.5 - want).max() <= 1.01  # it rounds twice
    middle = augment.center_crop(got, None, 20)
    np.testing.assert_array_equal(middle, got[6:26, 14:34])
    small = augment.center_crop(encoded(tmp_path / "x.png"), None, 80)
    square = picture.crop((15, 0, 75, 60)).resize((80, 80), Image.Resampling.BILINEAR)
    assert np.abs((small.numpy() + 1) * 127.5 - np.asarray(square, np.float32)).max() <= 1.01  # it rounds twice


def test_a_policy_decodes_before_its_first_ordinary_operation(tmp_path):
    image_trees.save(tmp_path / "x.png", image_trees.picture(5, (8, 8)))
    seed = tf.constant([0, 0], tf.int64)
    for text in ("", "flip", "center_crop(8)|flip"):
        out = augment.parse_policy(text, "key")(encoded(tmp_path / "x.png"), seed)
        assert out.dtype == tf.float32 and -1 <= out.numpy().min() < out.numpy().max() <= 1


def folder_config(tmp_path):
    config = default.get_config()
    config.data.name, config.data.train = "image_folder", str(tmp_path / "photos")
    return config


def test_unreadable_images_are_refused_or_skipped_and_named(tmp_path):
    config = folder_config(tmp_path)
    for label in ("cat", "dog"):
        for k in range(3):
            image_trees.save(tmp_path / "photos" / label / f"{k}.jpg", image_trees.picture(k))
    (tmp_path / "photos" / "cat" / "0.jpg").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"1 of 6 images cannot be used:\n  cat/0.jpg: (?s:.*)skip"):
        sources.load(config.data)
    config.data.unreadable = "skip"
    source = sources.load(config.data)
    assert list(source.left_out) == ["cat/0.jpg"]
    assert source.train.ids.tolist() == [1, 2, 3, 4, 5], "the others keep their ids"
    for k in (1, 2):
        (tmp_path / "photos" / "cat" / f"{k}.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match="no image of class 'cat' can be decoded:\n  cat/0.jpg: no image(?s:.*)2.jpg: zero"
    ):
        sources.load(config.data)


def test_an_image_that_is_gone_after_it_was_checked_is_named(tmp_path):
    image_trees.save(tmp_path / "0.jpg", image_trees.picture(0))
    paths = np.array([str(tmp_path / "0.jpg"), str(tmp_path / "gone.jpg")], object)
    with pytest.raises(UserError, match=r"image cat/1 cannot be read: [^{]*No such file") as raised:
        images.load_resized(images.FileImages(paths, np.array([True, True])), 8, np.array(["cat/0", "cat/1"], object))
    assert "Op:" not in str(raised.value)


def test_image_size_loads_into_memory(tmp_path):
    config = folder_config(tmp_path)
    for label in ("cat", "dog"):
        image_trees.save(tmp_path / "photos" / label / "x.png", image_trees.picture(1, (30, 20)))
    config.data.image_size = 10
    source = sources.load(config.data)
    pixels = np.asarray(image_trees.picture(1, (30, 20)), np.float64)[:, 5:25]  # the middle square
    area = pixels.reshape(10, 2, 10, 2, 3).mean((1, 3))
    assert source.train.images.dtype == np.uint8
    assert np.abs(source.train.images[0] - area).max() <= 0.5 + 1e-4
    assert dataclasses.is_dataclass(source)
