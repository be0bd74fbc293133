"""Images that stay encoded, in files or in records, until a tf.data pipeline needs them.

TensorFlow decodes plain images (8-bit grey or RGB JPEG and PNG, upright), and of a JPEG only the window that is needed.
Pillow decodes all others (CMYK, 16 bits, palettes, transparency, EXIF orientation, other formats); it is slower and
knows them all. Where both can read a file, both give the same pixels.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
from etils import epath
from PIL import Image, ImageOps
from rich.progress import track

from ieg_jax import files
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

JPEG_START = b"\xff\xd8\xff"
JPEG_QUALITY = 95
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF
VERSION = 2  # of `check_image`; what other versions found is not used
MOST_PIXELS = 100_000_000
CANNOT_BE_READ = "cannot be read"
READS_PER_CORE = 16  # in flight at once from a bucket, where most of the time is latency
READS_IN_FLIGHT = READS_PER_CORE * (os.cpu_count() or 1)
CHECKED_AT_ONCE = 5000  # image files whose outcome is kept in one file of the cache
ORIENTATION = 0x0112  # EXIF tag; 1 = upright
# (height, width) int32 [2] -> (top, left, height, width) int32 [4]
ChooseWindow = Callable[["tf.Tensor"], "tf.Tensor"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One encoded image inside a tf.data function.

    Attributes:
      content: scalar string, the bytes of the file.
      plain: scalar bool, whether TensorFlow's decoders read it as it is meant; else Pillow decodes it.
    """

    content: tf.Tensor
    plain: tf.Tensor

    def whole(self) -> tf.Tensor:
        """The image, uint8 `[H, W, 3]`."""
        return self.window(lambda size: tf.concat([[0, 0], size], 0))

    def window(self, choose: ChooseWindow) -> tf.Tensor:
        """A window of the image, uint8 `[h, w, 3]`; of a plain JPEG nothing else is decoded."""

        def of_jpeg():
            box = choose(tf.image.extract_jpeg_shape(self.content)[:2])
            return tf.image.decode_and_crop_jpeg(self.content, box, channels=3, dct_method="INTEGER_ACCURATE")

        def of_other():
            image = tf.cond(
                self.plain,
                lambda: tf.io.decode_image(self.content, channels=3, expand_animations=False),
                lambda: tf.numpy_function(_decode_any, [self.content], tf.uint8, stateful=False),
            )
            image = tf.ensure_shape(image, [None, None, 3])
            box = choose(tf.shape(image)[:2])
            return tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])

        is_jpeg = tf.strings.substr(self.content, 0, len(JPEG_START)) == JPEG_START
        return tf.ensure_shape(tf.cond(self.plain & is_jpeg, of_jpeg, of_other), [None, None, 3])


class StoredImages:
    """Encoded images by row: they have a length, take an array of rows as index, and make a reader for tf.data."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, rows: np.ndarray) -> StoredImages:
        """The images in these rows, in this order."""
        raise NotImplementedError

    def reader(self) -> Callable[[tf.Tensor], Encoded]:
        """Makes a function row -> Encoded. It copies tables into tensors, so call it once and not for each image."""
        raise NotImplementedError

    @property
    def is_remote(self) -> bool:
        """Whether reading one takes a request to a bucket."""
        return False


@dataclasses.dataclass(frozen=True)
class FileImages(StoredImages):
    """Image files.

    Attributes:
      paths: `[n]` str objects.
      plain: `[n]` bool, see `Encoded`; None = the files have not been checked, and `reader` cannot be used yet.
      sizes: `[n, 2]` int32, height and width in pixels of the upright image; None likewise.
    """

    paths: np.ndarray
    plain: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: np.ndarray) -> FileImages:
        columns = (self.paths, self.plain, self.sizes)
        return FileImages(*(None if column is None else column[rows] for column in columns))

    def reader(self) -> Callable[[tf.Tensor], Encoded]:
        """A function row -> Encoded."""
        paths, plain = tf.constant(self.paths.tolist(), tf.string), tf.constant(self.plain, tf.bool)
        return lambda row: Encoded(tf.io.read_file(paths[row]), plain[row])

    @property
    def is_remote(self) -> bool:
        """Whether the first is on a bucket, and so all."""
        return any(map(files.is_remote, self.paths[:1]))


@dataclasses.dataclass(frozen=True)
class JoinedImages(StoredImages):
    """Images of several places.

    Attributes:
      parts: where they are.
      places: `[n, 2]` int64, the part of an image and its row there.
    """

    parts: tuple[StoredImages, ...]
    places: np.ndarray

    @classmethod
    def of(cls, *parts: StoredImages) -> JoinedImages:
        """All images of the parts, one part after the other."""
        numbers = [np.stack([np.full(len(part), number), np.arange(len(part))], 1) for number, part in enumerate(parts)]
        return cls(parts, np.concatenate(numbers).astype(np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: np.ndarray) -> JoinedImages:
        return JoinedImages(self.parts, self.places[rows])

    def reader(self) -> Callable[[tf.Tensor], Encoded]:
        """A function row -> Encoded."""
        readers, places = [part.reader() for part in self.parts], tf.constant(self.places)

        def read(row):
            part, place = tf.unstack(places[row], 2)

            def of(reader):
                encoded = reader(place)
                return encoded.content, encoded.plain

            branches = [functools.partial(of, reader) for reader in readers]
            return Encoded(*tf.switch_case(tf.cast(part, tf.int32), branches))

        return read

    @property
    def is_remote(self) -> bool:
        """Whether some are on a bucket."""
        return any(part.is_remote for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What `check_image` found out about one encoded image.

    Attributes:
      plain: see `Encoded`.
      height, width: in pixels, of the upright image.
      error: what is wrong with it, "" = nothing.
    """

    plain: bool = False
    height: int = 0
    width: int = 0
    error: str = ""


def decode_any(content: bytes) -> np.ndarray:
    """Decodes any image that Pillow can read.

    The image is turned upright as EXIF says, transparent parts are put over white, 16 bits (or as many as a TIFF says)
    are scaled to 8, and CMYK and palettes become RGB. Of an animation the first picture is taken.

    Args:
      content: the bytes of a file.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      OSError, ValueError, SyntaxError: as Pillow does for what it cannot read.
    """
    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            values = np.asarray(image, np.float64)
            image = Image.fromarray(np.clip(np.round(values * 255 / _highest(opened)), 0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("pixels are floats of unknown range; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def _highest(image: Image.Image) -> int:
    """The value of white in an image of more than 8 bits: what the file says, else that of 16 bits.

    Raises:
      ValueError: for 32 bits without a word, whose values can mean anything.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if MAX_SAMPLE_VALUE in tags:
        return int(np.max(tags[MAX_SAMPLE_VALUE]))
    bits = int(np.max(tags.get(BITS_PER_SAMPLE, 16)))
    if bits > 16:
        raise ValueError(f"pixels are integers of {bits} bits and unknown range; save it with 8 or 16 bits")
    return 2**bits - 1


def check_image(content: bytes) -> Checked:
    """Decodes an image as the pipeline will, and returns what was found; an image that is damaged raises nothing."""
    if not content:
        return Checked(error="zero bytes")
    try:
        with Image.open(io.BytesIO(content)) as image:
            plain, num_pixels = _is_plain(image, content), image.width * image.height
            is_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if num_pixels > MOST_PIXELS:
            return Checked(error=f"{num_pixels:,} pixels, expected at most {MOST_PIXELS:,}; make it smaller")
        if is_jpeg:
            try:
                # Pillow and TensorFlow decode what is damaged in the middle too, and do not say of which file.
                decoded = simplejpeg.decode_jpeg(content, strict=True)
            except ValueError as error:
                return Checked(error=f"cannot be decoded: damaged or cut short ({error})")
        if not plain:
            decoded = decode_any(content)
        elif not is_jpeg:
            decoded = tf.io.decode_image(content, channels=3, expand_animations=False)
    except Image.UnidentifiedImageError:
        return Checked(error=f"no image in a known format (begins with {content[:8]!r})")
    except tf.errors.InvalidArgumentError:
        return Checked(error="cannot be decoded: damaged or cut short")
    except Exception as error:  # Pillow's plugins raise whatever they meet
        return Checked(error=f"cannot be decoded: {type(error).__name__}: {error}")
    return Checked(plain, decoded.shape[0], decoded.shape[1])


def check(paths: np.ndarray) -> list[Checked]:
    """Decodes every file once and remembers the outcome.

    Results are kept in the user's cache folder, for some thousand files at a time, under a hash of their paths, sizes
    and times of change. So the next start on the same data decodes nothing, and a check that was stopped goes on.

    Args:
      paths: `[n]` str objects.

    Returns:
      `[n]`, in order.
    """
    parts = [paths[start : start + CHECKED_AT_ONCE] for start in range(0, len(paths), CHECKED_AT_ONCE)]
    with concurrent.futures.ThreadPoolExecutor(reads_at_once(paths)) as pool:
        shown = track(parts, "checking images", transient=True, disable=len(paths) < 1000)
        return [checked for part in shown for checked in _check_part(part, pool)]


def _check_part(paths: np.ndarray, pool: concurrent.futures.Executor) -> list[Checked]:
    stats = list(pool.map(stat, paths))
    key = hashlib.sha256(repr([VERSION, *zip(paths.tolist(), stats, strict=True)]).encode()).hexdigest()
    cached = cache_folder() / "checked" / f"{key}.npz"
    if cached.is_file():
        try:
            with np.load(cached, allow_pickle=False) as table:
                columns = [table[field.name].tolist() for field in dataclasses.fields(Checked)]
            return [Checked(*row) for row in zip(*columns, strict=True)]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass  # the file in the cache is damaged: check again
    unread = []  # files that the system could not read; as that may be over at the next start, it is not remembered

    def check_file(path: str) -> Checked:
        content, error = read(path)
        if error.startswith(CANNOT_BE_READ):
            unread.append(path)
        return Checked(error=error) if error else check_image(content)

    results = list(pool.map(check_file, paths))
    if not unread:
        table = {field.name: [getattr(r, field.name) for r in results] for field in dataclasses.fields(Checked)}
        cached.parent.mkdir(parents=True, exist_ok=True)
        files.write_arrays(cached, table)
    return results


def reads_at_once(paths: Sequence[str]) -> int:
    """How many files to read at the same time: many where they are on a bucket."""
    return READS_IN_FLIGHT if any(map(files.is_remote, paths[:1])) else os.cpu_count() or 1


def read(path: str) -> tuple[bytes, str]:
    """Reads an image file, on a disk or on a bucket.

    Returns:
      The bytes, and what went wrong, "" = nothing. Where the system could not read the file, which may be over the next
      time, this begins with CANNOT_BE_READ.
    """
    try:
        if files.is_remote(path):
            return epath.Path(path).read_bytes(), ""
        if not os.path.isfile(path) and os.path.exists(path):
            return b"", "no regular file"  # a pipe or a device would never end
        return pathlib.Path(path).read_bytes(), ""
    except (FileNotFoundError, ValueError):
        return b"", "no such file"
    except files.storage_errors() as error:
        return b"", f"{CANNOT_BE_READ}: {getattr(error, 'strerror', None) or error}"


def storable(content: bytes, resize: int = 0) -> tuple[bytes, str]:
    """What to put into a record for an image: bytes that TensorFlow alone decodes as they are meant.

    Args:
      content: the bytes of a file.
      resize: pixels; an image whose shorter side is longer is made that small and stored as JPEG. 0 = none is.

    Returns:
      The bytes to store and what is wrong with the image, "" = nothing. A plain image keeps the bytes of its file, any
      other becomes a PNG; for a damaged one the bytes are empty.
    """
    checked = check_image(content)
    if checked.error:
        return b"", checked.error
    small = resize and min(checked.height, checked.width) > resize
    if checked.plain and not small:
        return content, ""
    picture, buffer = Image.fromarray(decode_any(content)), io.BytesIO()
    if small:
        factor = resize / min(picture.size)
        size = tuple(max(resize, round(side * factor)) for side in picture.size)
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue(), ""


def cache_folder() -> pathlib.Path:
    """The folder for results that can be computed again: `$XDG_CACHE_HOME/ieg_jax` or `~/.cache/ieg_jax`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ieg_jax"


def load_resized(images: StoredImages, size: int, names: np.ndarray, method: str = "area") -> np.ndarray:
    """Decodes all images into memory.

    Args:
      images: n of them.
      size: pixels of a side; the centre square of each image is resized to it.
      names: `[n]`, for messages.
      method: area, or bilinear (with antialiasing), which is smooth where images become larger.

    Returns:
      uint8 `[n, size, size, 3]`.

    Raises:
      UserError: naming the first image that cannot be decoded.
    """
    read = images.reader()

    def load(row):
        return square(tf.cast(read(row).whole(), tf.float32), size, method)

    rows = tf.data.Dataset.range(len(images)).map(load, tf.data.AUTOTUNE, deterministic=True).batch(256)
    batches = track(rows, "decoding images", -(-len(images) // 256), transient=True, disable=len(images) < 1000)
    decoded = []
    try:
        for batch in batches:
            decoded.append(np.round(batch.numpy()).astype(np.uint8))
    except tf.errors.OpError as error:
        # The batches come in order, so the image is one of those behind the last batch: find out which, to name it.
        for row in range(256 * len(decoded), len(images)):
            readable(load, row, names[row])
        raise UserError(f"an image cannot be decoded: {reason(error)}") from None
    return np.concatenate(decoded)


def readable(read: Callable[[tf.Tensor], Any], row: int, name: str) -> Any:
    """What `read` returns for a row.

    Raises:
      UserError: naming the image, where it cannot be read or decoded.
    """
    try:
        return read(tf.constant(row))
    except tf.errors.OpError as error:
        raise UserError(f"image {name} cannot be read: {reason(error)}; restore its file") from None


def reason(error: tf.errors.OpError) -> str:
    """The first line of TensorFlow's message, without the names of its operations."""
    lines = error.message.strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\{\{.*?\}\}\s*)+|\s*\[Op:.*\]\s*.*$", "", lines[0])


def square(image: tf.Tensor, size: int, method: str = "area") -> tf.Tensor:
    """The centre square of an image `[..., H, W, C]`, resized to `size`; float32. `method`: see `load_resized`."""
    height, width = tf.shape(image)[-3], tf.shape(image)[-2]
    side = tf.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[..., top : top + side, left : left + side, :]
    return tf.image.resize(image, (size, size), method, antialias=method == "bilinear")


def to_float(image: tf.Tensor) -> tf.Tensor:
    """Scales uint8 pixels, or floats in [0, 1], to float32 in [-1, 1]."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0 if image.dtype == tf.uint8 else image * 2.0 - 1.0


def _decode_any(content: bytes | np.ndarray) -> np.ndarray:
    # TensorFlow hands over bytes inside a graph, and outside one an array that holds them.
    return decode_any(content if isinstance(content, bytes) else content.item())


def _is_plain(image: Image.Image, content: bytes) -> bool:
    """Whether TensorFlow's decoders read an image as it is meant."""
    upright = image.getexif().get(ORIENTATION, 1) in (0, 1)
    if image.format == "PNG":
        bits = content[24]  # the bit depth, in the header chunk at the beginning of each PNG
        return upright and bits == 8 and image.mode in ("L", "RGB") and not image.has_transparency_data
    return upright and image.format == "JPEG" and image.mode in ("L", "RGB")


def stat(path: str) -> tuple[int, int]:
    """The bytes of a file and the time of its last change in nanoseconds; (-1, -1) where there is no such file."""
    try:
        if files.is_remote(path):
            remote = tf.io.gfile.stat(path)
            return remote.length, remote.mtime_nsec
        found = os.stat(path)
    except (*files.storage_errors(), ValueError):  # a path with a zero byte is a ValueError
        return (-1, -1)
    return found.st_size, found.st_mtime_ns
