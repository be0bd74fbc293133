"""Networks of Flax NNX as linen modules: `network=from_nnx(MyNetwork, 10)` in place of `MyNetwork(10, rngs=...)`.

A run makes the initial weights from its seed, and methods of several networks make them more than once. So it needs to
know how a network is made, which an instance does not tell. The weights are then arrays in `params` and `batch_stats`
like those of any linen module, and all that differentiates, averages, saves or restores them is the same. Flax's bridge
does the work. What the bridge itself returns can be neither copied nor pickled, and its paths have numbers in them.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from ieg_jax.errors import UserError, first_line


def from_nnx(network_class: Callable[..., Any], *args: Any, **kwargs: Any) -> "FromNNX":
    """Describes a network of Flax NNX, for `IEGClassifier(network=...)` and `train.loop.train_and_evaluate`.

    Args:
      network_class: a subclass of `flax.nnx.Module`, called with the other arguments and `rngs=`. An instance takes
        float32 images `[n, H, W, C]` and returns logits `[n, K]`. It is called as `network(images, train=...)` where it
        has an argument of this name, else as `network(images)` after `network.train()` or `network.eval()`.
      *args: of the class; they can be hashed.
      **kwargs: likewise, without `rngs`.

    Returns:
      A linen module whose variables have the paths that they have in the network, in `params` (`nnx.Param`) and
      `batch_stats` (`nnx.BatchStat`).
    """
    return FromNNX(network_class, args, FrozenDict(kwargs))


class FromNNX(nn.Module):
    """A network of Flax NNX as a linen module, see `from_nnx`.

    Attributes:
      nnx_class: what makes it.
      args: of `nnx_class`.
      kwargs: of `nnx_class`, without `rngs`.
    """

    nnx_class: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = FrozenDict()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`."""
        from flax import nnx  # it takes a while to import, and most runs do without

        def call(network, x):
            if "train" in inspect.signature(type(network).__call__).parameters:
                return network(x, train=train)
            (network.train if train else network.eval)()
            return network(x)

        # metadata_fn=None: plain arrays, whatever else a variable of NNX knows, such as how to split it over devices.
        bridge = nnx.bridge.ToLinen(self.nnx_class, self.args, self.kwargs, metadata_fn=None, parent=None)
        if self.is_initializing():
            logits, variables = bridge.init_with_output(self.make_rng("params"), x, nnx_method=call)
        else:
            logits, variables = bridge.apply(_numbered(self.variables), x, nnx_method=call, mutable=["batch_stats"])
        for collection, tree in variables.items():
            if self.is_mutable_collection(collection):
                for name, value in _named(tree).items():
                    self.put_variable(collection, name, value)
        return logits


def check(network: Any) -> None:
    """Raises UserError for an instance or a class of NNX, and for a described one that draws random numbers in a call.

    Any other network is let through, whatever it is.
    """
    kind = network if isinstance(network, type) else type(network)
    # By name: importing flax.nnx takes a while, and whoever has such a network has imported it.
    if any(base.__module__.startswith("flax.nnx") for base in kind.__mro__):
        name = name_of(network)
        raise UserError(
            f"network: {name} is a network of Flax NNX, and a run makes the weights itself, from its seed; give "
            f"network=ieg_jax.from_nnx({name}, ...), with the arguments of {name} but rngs"
        )
    if not isinstance(network, FromNNX):
        return
    from flax import nnx  # see above

    try:
        made = nnx.eval_shape(lambda: network.nnx_class(*network.args, **network.kwargs, rngs=nnx.Rngs(0)))
    except Exception as error:  # whatever someone's network raises
        raise UserError(
            f"network {name_of(network)} cannot be made: {first_line(error)}; give from_nnx its arguments but rngs"
        ) from error
    if jax.tree.leaves(nnx.state(made, nnx.RngState)):
        raise UserError(
            f"network {name_of(network)} keeps random numbers (nnx.Rngs) for its calls, as nnx.Dropout does; expected "
            f"one that computes without; take such layers out"
        )


def name_of(network: Any) -> str:
    """The name of the class of a network; of one of NNX that of its class there."""
    kind = getattr(network, "nnx_class", network if isinstance(network, type) else type(network))
    return getattr(kind, "__name__", type(network).__name__)


def _named(tree: Any) -> Any:
    """A tree of variables with text in place of the numbers that entries of lists have in their paths."""
    return {str(name): _named(value) for name, value in tree.items()} if hasattr(tree, "items") else tree


def _numbered(tree: Any) -> Any:
    """The opposite of `_named`: attributes have names that are no numbers."""
    if not hasattr(tree, "items"):
        return tree
    return {int(name) if name.isdecimal() else name: _numbered(value) for name, value in tree.items()}
