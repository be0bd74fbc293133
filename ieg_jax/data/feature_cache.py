"""Features of images by a backbone, computed once and kept.

A feature is computed for one image at a time and depends on nothing but its bytes, the weights and the size, so it is
kept under a hash of these: the next run on the same images, a fold of an audit, or the same command after it was
stopped finds it there.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
import time
import uuid
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from rich.progress import track

from ieg_jax import files
from ieg_jax.data import augment, images
from ieg_jax.data.backbone import Backbone
from ieg_jax.data.images import to_float
from ieg_jax.data.splits import Split
from ieg_jax.errors import StorageError, UserError, first_line
from ieg_jax.lazy import tf
from ieg_jax.runtime.progress import duration_text

AT_ONCE = 1024  # images whose features are kept before the next are begun
DTYPE = "float16"  # of features that are kept, unless somebody asks for float32


class Cache:
    """Features that were computed before, in files of about a thousand. Several processes can use one folder.

    Where nothing can be written, features are kept in memory, with a warning.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._places, self._known, self._unwritten = folder, {}, set(), {}
        self.refresh()

    def refresh(self) -> None:
        """Looks for files that other processes have written in the meantime."""
        with contextlib.suppress(OSError):  # no such folder, or one that was removed
            for file in sorted(self._folder.glob("*.npz")):
                if file.name not in self._known:
                    self._known.add(file.name)
                    content = self._read(file)
                    if content is not None:
                        self._places |= {key: (file, row) for row, key in enumerate(content["keys"].tolist())}

    @staticmethod
    def _read(file: epath.Path) -> Mapping[str, np.ndarray] | None:
        """The arrays of a file; None where it is damaged or gone."""
        try:
            with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ("keys", "features")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def __contains__(self, key: str) -> bool:
        return key in self._unwritten or key in self._places

    def read(self, keys: Sequence[str]) -> np.ndarray | None:
        """The features of these keys, `[n, D]`; None where a file has gone since, whose keys are then forgotten."""
        by_file: dict[epath.Path, list[tuple[int, int]]] = {}
        rows = [self._unwritten.get(key) for key in keys]
        for place, key in enumerate(keys):
            if rows[place] is None:
                file, row = self._places[key]
                by_file.setdefault(file, []).append((place, row))
        for file, places in by_file.items():
            content = self._read(file)
            if content is None:
                self._places = {key: at for key, at in self._places.items() if at[0] != file}
                return None
            for place, row in places:
                rows[place] = content["features"][row]
        return np.stack(rows)

    def write(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Keeps features `[n, D]` under their keys."""
        # A name of its own: others may be writing the same features.
        place = self._folder / f"{uuid.uuid4().hex}.npz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_arrays(place, {"keys": np.array(keys), "features": features}, compressed=False)
        except (OSError, StorageError) as error:
            if not self._unwritten:
                warnings.warn(
                    f"features cannot be kept in {self._folder} ({first_line(error)}); the next run computes them anew",
                    stacklevel=2,
                )
            self._unwritten |= dict(zip(keys, features, strict=True))
            return
        self.refresh()


def cache_of(backbone: Backbone, folder: str = "", dtype: str = DTYPE) -> Cache:
    """Where the features of a backbone are kept.

    Args:
      backbone: the network.
      folder: in place of `features` in the user's cache folder.
      dtype: of the numbers, float16 or float32.
    """
    place = epath.Path(folder).expanduser() if folder else epath.Path(images.cache_folder()) / "features"
    about = json.dumps({**backbone.about, "dtype": dtype}, sort_keys=True)
    return Cache(place / hashlib.sha256(about.encode()).hexdigest()[:16])


def features_of(
    splits: Mapping[str, Split],
    backbone: Backbone,
    cache: Cache,
    views: Mapping[str, int] | None = None,
    policy: str = "",
    dtype: str = DTYPE,
    quiet: bool = False,
) -> dict[str, np.ndarray]:
    """The features of the images of some splits, and of augmented views of them.

    Several processes that want the same features share the work, where they see the same cache: each goes through it in
    an order of its own, and leaves out what another has written in the meantime.

    Args:
      splits: images in memory, or checked ones in files.
      backbone: the network.
      cache: where they are kept.
      views: how many views of each image of a split there are, the image itself being the first; one if not named.
      policy: makes the others (`data.augment`). A view depends on the image and its number alone.
      dtype: of the numbers.
      quiet: whether nothing is shown.

    Returns:
      Features `[n, V, D]` of each split.

    Raises:
      UserError: for an image that cannot be decoded.
    """
    views = dict(views or {})
    wanted = []
    for name, split in splits.items():
        digests = _digests(split)
        for view in range(views.get(name, 1)):
            keys = [_key(digest, view, policy) for digest in digests]
            wanted += [
                _Chunk(name, view, policy, start, digests[start : start + AT_ONCE], keys[start : start + AT_ONCE])
                for start in range(0, len(split), AT_ONCE)
            ]
    found: dict[str, dict[int, list[np.ndarray]]] = {name: {} for name in splits}
    _compute(wanted, splits, backbone, cache, dtype, quiet)
    for chunk in wanted:
        while (values := cache.read(chunk.keys)) is None:  # a file of the cache was removed or damaged
            _compute([chunk], splits, backbone, cache, dtype, quiet=True)
        found[chunk.split].setdefault(chunk.view, []).append(values)
    return {name: np.stack([np.concatenate(parts) for parts in of_view.values()], 1) for name, of_view in found.items()}


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some images of a split, whose features are kept before the next are begun."""

    split: str
    view: int
    policy: str
    start: int
    digests: Sequence[str]
    keys: Sequence[str]


def _compute(
    chunks: Sequence[_Chunk],
    splits: Mapping[str, Split],
    backbone: Backbone,
    cache: Cache,
    dtype: str,
    quiet: bool,
) -> None:
    """Computes the features that are not in the cache."""
    missing = [chunk for chunk in chunks if any(key not in cache for key in chunk.keys)]
    random.shuffle(missing)  # several processes that work at once seldom do the same
    title = f"features of {sum(len(chunk.keys) for chunk in missing):,} images by {backbone.about['network']}"

    def read(chunk: _Chunk) -> tuple[list[str], np.ndarray | None]:
        """The keys that are missing still, and their pictures."""
        cache.refresh()
        places = [place for place, key in enumerate(chunk.keys) if key not in cache]
        if not places:
            return [], None
        rows, digests = np.array(places) + chunk.start, [chunk.digests[place] for place in places]
        pixels = pixels_of(splits[chunk.split], rows, backbone.size, chunk.view, chunk.policy, digests)
        return [chunk.keys[place] for place in places], pixels

    began = time.monotonic()
    with ThreadPoolExecutor(1) as reader:  # the next pictures are read while features are computed
        ahead = [reader.submit(read, chunk) for chunk in missing[:1]]
        for number in track(range(len(missing)), title, disable=quiet or len(missing) < 2):
            if number == 2 and not quiet:  # the first one was compiled; a log has no bar
                rest = (time.monotonic() - began) * (len(missing) - 2)
                print(f"{title}: about {duration_text(rest)} for those that are left")
            began = time.monotonic()
            keys, pixels = ahead.pop().result()
            ahead += [reader.submit(read, chunk) for chunk in missing[number + 1 : number + 2]]
            cache.refresh()
            if any(key not in cache for key in keys):  # else somebody else was faster
                cache.write(keys, backbone.features(pixels).astype(dtype))


def _digests(split: Split) -> list[str]:
    """A hash of the content of each image."""
    if split.in_memory:
        about = f"{split.images.shape[1:]} {split.images.dtype}".encode()
        return [hashlib.sha256(about + image.tobytes()).hexdigest() for image in split.images]
    read = split.images.reader()

    def digest(row: int) -> str:
        encoded = images.readable(read, row, split.names[row])
        return hashlib.sha256(encoded.content.numpy()).hexdigest()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(digest, range(len(split))))


def _key(digest: str, view: int, policy: str) -> str:
    about = f"{digest} {view} {policy}" if view else digest
    return hashlib.sha256(about.encode()).hexdigest()[:32]


def pixels_of(
    split: Split, rows: np.ndarray, size: int, view: int = 0, policy: str = "", digests: Sequence[str] = ()
) -> np.ndarray:
    """Images, or a view of them, `[n, H, W, C]` uint8 or float32 in [0, 1]."""
    if not view:
        if split.in_memory:
            return _square(split.images[rows])
        return images.load_resized(split.images[rows], size, split.names[rows], "bilinear")
    augmented = augment.parse_policy(policy, "backbone.augment")
    seeds = np.array([[int(digest[:15], 16), view] for digest in digests], np.int64)
    if split.in_memory:
        pixels = split.images[rows]
        dataset = tf.data.Dataset.from_tensor_slices((pixels, seeds))
        dataset = dataset.map(lambda image, seed: augmented(to_float(image), seed), tf.data.AUTOTUNE)
    else:
        read = split.images.reader()
        dataset = tf.data.Dataset.from_tensor_slices((rows, seeds))
        dataset = dataset.map(lambda row, seed: augmented(read(row), seed), tf.data.AUTOTUNE)
    try:
        made = np.concatenate(list(dataset.batch(256).as_numpy_iterator()))
    except tf.errors.OpError as error:
        for row in () if split.in_memory else rows:
            images.readable(lambda row: read(row).whole(), row, split.names[row])  # names the image
        raise UserError(f"an image cannot be augmented: {images.reason(error)}") from None
    return _square(np.clip((made + 1) / 2, 0, 1))


def _square(pixels: np.ndarray) -> np.ndarray:
    """The centre squares of images `[n, H, W, C]`."""
    height, width = pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]
