"""How the arrays of a network are called in published files: what the families of networks tell `pretrained`.

A family whose weights are published has an attribute `NAMINGS`, a tuple of `Naming`s, one for each way in which files
name the arrays. It may also have a function `fitted(path, array, shape)`, for arrays whose shape depends on the size of
the images: it makes one of the shape that the network has.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np

# The last part of a path in the network -> that of the name in PyTorch.
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def turned(array: np.ndarray) -> np.ndarray:
    """A kernel of PyTorch, `[out, in, h, w]` or `[out, in]`, as `[h, w, in, out]` or `[in, out]`; else as it is."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return array.transpose(axes) if axes else array


def by_table(table: dict[str, str | tuple[str, ...]], prefix: str = "") -> Callable[[str], tuple[str, ...]]:
    """The function `Naming.name` of a table, for names as PyTorch has them, without moving averages.

    Args:
      table: layer or array -> its name in the file, or the names of those that it is made of. Of a layer in a block the
        key is without the numbers of the block: `block/norm1` is the layer `norm1` of each block `block<number>`. The
        names may contain these numbers as {0}, {1}, …
      prefix: before all names.
    """

    def name(path: str) -> tuple[str, ...]:
        first, *rest = path.removeprefix("params/").split("/")
        numbers, leaf = re.findall(r"\d+", first), ""
        key = "/".join([re.sub(r"\d+", "", first), *rest])
        if key not in table:
            key, _, leaf = key.rpartition("/")
        names = table.get(key, ())
        names = (names,) if isinstance(names, str) else names
        if leaf:  # torch's layer with query, key and value in one array calls it in_proj_weight, not in_proj.weight
            dots = ("_" if name.endswith("in_proj") else "." for name in names)
            names = [f"{name}{dot}{TORCH_LEAVES[leaf]}" for name, dot in zip(names, dots, strict=True)]
        return tuple(prefix + name.format(*numbers) for name in names)

    return name


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a kind of file names its arrays, and in which order it has their axes.

    Attributes:
      title: what messages call it.
      name: path of an array in the network -> its name in the file, or the names of several that it is made of.
      conventions: the values of `model.conventions` that the weights may need; () = that of the run that they are from.
      torch: whether axes are in PyTorch's order.
      others: regular expression of whole names: arrays of a file that are of no use, such as those of a text tower.
      marks: (name, conventions): a file with an array of this name needs these. The first that is there counts.
      make: (path, arrays in the order of their names) -> the array, in the order of the network; by default the first
        array, turned where `torch` says so. Raises ValueError for arrays that do not fit together.
    """

    title: str
    name: Callable[[str], str | tuple[str, ...]]
    conventions: tuple[str, ...] = ()
    torch: bool = False
    others: str = ""
    marks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    make: Callable[[str, list[np.ndarray]], np.ndarray] | None = None

    def names(self, path: str) -> tuple[str, ...]:
        """The names in the file of what an array of the network is made of."""
        names = self.name(path)
        return (names,) if isinstance(names, str) else names

    def made(self, path: str, arrays: list[np.ndarray]) -> np.ndarray:
        """The array of the network that arrays of the file make."""
        if self.make:
            return self.make(path, arrays)
        return turned(arrays[0]) if self.torch else arrays[0]

    def without_use(self, name: str) -> bool:
        """Whether an array of the file may be there and is not read; PyTorch counts batches in some."""
        if self.torch and name.endswith(".num_batches_tracked"):
            return True
        return bool(self.others and re.fullmatch(self.others, name))

    def conventions_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Under which conventions the weights of a file with these arrays may have been trained."""
        return next((needed for mark, needed in self.marks if mark in names), self.conventions)


OWN = Naming("as ieg_jax.export writes them", lambda path: path)
