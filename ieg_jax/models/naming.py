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
