"""The command that turns a folder of images into sharded records: `python -m ieg_jax.data.prepare`.

    python -m ieg_jax.data.prepare --config=configs/webvision_mini.py --config.data.dir=webvision --out=gs://bucket/mini

It reads what the configuration names (WebVision, ImageNet, folders and lists of images), and writes TFRecord shards as
TFDS names them, with an index beside them, which `data.name=records` reads by random access. Every image is decoded
once on the way. What is no plain 8-bit JPEG or PNG is stored as PNG, everything else as the bytes it came as, unless
--resize makes it smaller. Every shard is read back and compared before it gets its name, so an interrupted run of the
command goes on with the first shard that is not there.

    … --runner=DataflowRunner --beam_options=project=PROJECT,region=REGION,temp_location=gs://bucket/tmp

With --runner the shards are written by a pipeline of Apache Beam, many at a time, on this machine or on Dataflow. The
files are the same.
"""

import json
import sys

from absl import flags

from ieg_jax import cli
from ieg_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner")


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_string("out", None, "Folder for the records, local or on a bucket.", required=True)
    flags.DEFINE_integer("examples_per_shard", 1024, "Images in one file.", lower_bound=1)
    flags.DEFINE_integer(
        "resize",
        0,
        "Pixels: images whose shorter side is longer are made that small, as JPEG. 0 = as they come.",
        lower_bound=0,
    )
    flags.DEFINE_enum("runner", None, RUNNERS, "Writes the shards with Apache Beam, by this runner of it.")
    flags.DEFINE_list(
        "beam_options", [], "Options of Apache Beam and of the runner: key=value, or key alone for a switch."
    )


def main(argv: list[str]) -> None:
    """Writes the records and prints what was written as one line of JSON."""
    del argv
    # These take seconds to import: after the flags were checked.
    from ieg_jax.data import beam_pipeline, shards

    values = flags.FLAGS
    if values.beam_options and not values.runner:
        raise UserError(f"--beam_options={','.join(values.beam_options)}: needs --runner, {' or '.join(RUNNERS)}")
    write = beam_pipeline.writer(values.runner, values.beam_options, values.out) if values.runner else None
    result = shards.prepare(values.config, values.out, values.examples_per_shard, values.resize, write)
    for name, error in result["left_out"].items():
        print(f"left out: {name}: {error}", file=sys.stderr)
    print(json.dumps({key: result[key] for key in ("images", "bytes")} | {"left_out": len(result["left_out"])}))


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
