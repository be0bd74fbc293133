"""Says whether a host delivers the examples that its chips take, or the chips wait for data."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from ieg_jax import methods
from ieg_jax.data.batches import work_of_an_example
from ieg_jax.data.images import READS_PER_CORE
from ieg_jax.errors import UserError

DOCTOR = "python -m ieg_jax.data.doctor"
UNKNOWN = f"Whether the chip waits for data is not known: run {DOCTOR} on such a host, and name its report by --doctor."


@dataclasses.dataclass(frozen=True)
class Host:
    """What a host does at best. What is None is not known, and bounds nothing.

    Attributes:
      cores: processors.
      images_per_cpu_second: views that are read, decoded and augmented per second of processor time.
      read_seconds: from the request for an image to its last byte, of images on a bucket.
      reads_in_flight: requests that wait at the same time.
      assembly_bytes_per_second: of examples that are ready, made into batches and handed to the devices.
    """

    cores: int | None = None
    images_per_cpu_second: float | None = None
    read_seconds: float | None = None
    reads_in_flight: int | None = None
    assembly_bytes_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """What one noisy example asks of a host, with the trusted images that go with it.

    Attributes:
      images: views that are made.
      reads: images that are read.
      size: bytes that go to the devices.
    """

    images: float
    reads: float
    size: float


@dataclasses.dataclass(frozen=True)
class Supply:
    """What a host delivers and what its chips take, in examples per second.

    Attributes:
      bounds: what each part of the input lets through at best; at least one.
      wanted: what the chips of the host take at most.
    """

    bounds: dict[str, float]
    wanted: float

    @property
    def binds(self) -> str:
        """The part of the input that lets the least through."""
        return min(self.bounds, key=self.bounds.get)

    @property
    def delivered(self) -> float:
        """What the host delivers at best."""
        return self.bounds[self.binds]

    @property
    def waiting(self) -> float:
        """The share of the time for which the chips wait, in [0, 1): a step then takes as long as its examples do."""
        return max(0.0, 1 - self.delivered / self.wanted)

    def __str__(self) -> str:
        each = (
            f"a host delivers {self.delivered:,.0f} examples/s at most ({self.binds} binds), and its chips take "
            f"{self.wanted:,.0f}"
        )
        if self.waiting:
            return f"The chip waits {self.waiting:.0%} of the time for data: {each}."
        return f"The chip does not wait for data: {each}, which leaves {self.delivered / self.wanted - 1:.0%} headroom."


def read_host(file: str, given: Mapping[str, float | None]) -> Host:
    """What is known of a host, from a measurement and by hand.

    Args:
      file: report.json of `ieg_jax.data.doctor`; "" = none.
      given: fields of Host, which count in place of those measured where they are not None. Reads in flight follow
        from the number of processors, as in training, where they are not given.

    Raises:
      UserError: for a file that cannot be read, or is no such report.
    """
    fields = {}
    if file:
        try:
            speed = json.loads(pathlib.Path(file).expanduser().read_text())["throughput"]
            fields = {name: speed[name] for name in ("cores", "read_seconds", "assembly_bytes_per_second")}
            fields["images_per_cpu_second"] = speed["examples_per_cpu_second"] * speed["images_per_example"]
        except OSError as error:
            raise UserError(f"--doctor={file}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--doctor={file}: holds no speeds of the input, expected the report.json of {DOCTOR}; run it again "
                f"where an older version wrote it"
            ) from None
    fields |= {name: value for name, value in given.items() if value is not None}
    if fields.get("cores"):
        fields.setdefault("reads_in_flight", READS_PER_CORE * fields["cores"])
    return Host(**fields)


def bounds(host: Host, example: Example) -> dict[str, float]:
    """What each part of the input lets through at best, in examples per second; without what is not known."""
    found = {}
    if host.cores and host.images_per_cpu_second:
        found["decoding and augmentation"] = host.cores * host.images_per_cpu_second / example.images
    if host.reads_in_flight and host.read_seconds:
        found["reading"] = host.reads_in_flight / host.read_seconds / example.reads
    if host.assembly_bytes_per_second:
        found["assembly of batches"] = host.assembly_bytes_per_second / example.size
    return found


def table(example: Example, supply: Supply) -> Table:
    """The table of what each part of the input lets through."""
    asks = {
        "decoding and augmentation": f"{example.images:g} images",
        "reading": f"{example.reads:g} reads",
        "assembly of batches": f"{example.size:,.0f} bytes",
    }
    made = Table(title="input of a host")
    for heading in ("what", "an example has", "examples/s at most"):
        made.add_column(heading, justify="left" if heading == "what" else "right")
    for name, rate in supply.bounds.items():
        made.add_row(name, asks[name], f"{rate:,.0f}")
    made.add_section()
    made.add_row("[bold]its chips take[/bold]", "", f"[bold]{supply.wanted:,.0f}[/bold]")
    return made


def supply(config: ConfigDict, row: Mapping[str, Any], host: Host, num_hosts: int) -> tuple[Example, Supply] | None:
    """What a step asks of each host, and what it gets.

    Args:
      config: that the step is of.
      row: of the step, from `report.summarize`.
      host: each of the hosts.
      num_hosts: among which the batch is divided.

    Returns:
      None where nothing is known of the host, or the step does not fit.
    """
    images, reads = work_of_an_example(config, methods.get(config.method.name).streams)
    example = Example(images, reads, row["arguments"]["batch"] * row["num_chips"] / row["batch_size"])
    found = bounds(host, example)
    if not found or "images_per_second" not in row:
        return None
    return example, Supply(found, row["images_per_second"] / num_hosts)


def as_dict(host: Host, num_hosts: int, example: Example, made: Supply) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "host": dataclasses.asdict(host),
        "num_hosts": num_hosts,
        "example": dataclasses.asdict(example),
        "examples_per_second": made.bounds,
        "wanted": made.wanted,
        "waiting": made.waiting,
    }
