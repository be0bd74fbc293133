"""What a run of the benchmark was asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ieg_jax import methods
from ieg_jax.errors import UserError, check_choice

PARTS = ("steps", "peers", "methods", "pipeline", "startup", "growth", "storage")
IMPORTANT = ("supervised", "trusted_only", "l2r", "ieg")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how often.

    Attributes:
      parts: of PARTS; `peers` are measured in the rounds of `steps`.
      rounds: samples of each step of a large network; other parts take fewer.
      quick: the small network in place of the large ones, and little of the rest.
      methods: names; of the part `methods` all by default, of `steps` those of IMPORTANT among them.
      networks: titles of the networks of `steps`; () = as `quick` says.
      settings: flat key -> value, of every step.
      torch_python: an interpreter that has PyTorch; "" = this one.
      say: is told what begins.
    """

    parts: tuple[str, ...] = PARTS
    rounds: int = 7
    quick: bool = False
    methods: tuple[str, ...] = tuple(methods.REGISTRY)
    networks: tuple[str, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    torch_python: str = ""
    say: Callable[[str], None] = print

    def __post_init__(self):
        for part in self.parts:
            check_choice("--part", part, PARTS)
        for name in self.methods:
            check_choice("--methods", name, methods.REGISTRY)
        if self.rounds < 1:
            raise UserError(f"--rounds: got {self.rounds}, expected at least 1")

    @property
    def few(self) -> int:
        """Samples of what is many or slow."""
        return 1 if self.quick else min(self.rounds, 3)


def settings_of(pairs: list[str], config: Any) -> dict[str, Any]:
    """Reads `key=value` as --config.key=value would be read.

    Args:
      pairs: such as `model.dtype=bfloat16`.
      config: has every key, with a value of its type.

    Raises:
      UserError: for a key that does not exist and a value of another type.
    """
    found = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            group = config
            for part in key.split("."):
                group = group[part]
        except (KeyError, TypeError):
            raise UserError(f"--set={pair}: there is no key {key!r}; configs/default.py lists them") from None
        try:
            found[key] = text == "True" if isinstance(group, bool) else type(group)(text)
        except (TypeError, ValueError):
            raise UserError(f"--set={pair}: expected a value like {group!r}") from None
    return found
