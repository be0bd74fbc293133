"""Makes semantic label noise: the mistakes of a network that was trained on few clean labels (Lee et al. 2019, RoG).

    python -m ieg_jax.semantic_noise --config=configs/cifar10.py --fraction=0.05 --model=vgg13 \
        --workdir=runs/semantic --out=semantic.npy

This takes that share of each class, trains the network on it with true labels, and writes the network's predictions for
the training set. They are used with

    --config=configs/cifar10.py:noise=file,noise_rate=0 --config.noise.file=semantic.npy

As in RoG, every training example gets a predicted label, even those that the network was trained on, nearly all of
which keep their true label. To train without these examples, make them the trusted set, which is taken out of the
training set: `--config.trusted.ids=runs/semantic/trusted.json`. RoG and the paper use 5 % of CIFAR-10 and 20 % of
CIFAR-100.

`reproduce.semantic_labels.training_config` says how the network is trained and what --config.key=value can change. A
command that was stopped goes on in its work folder.
"""

from absl import flags
from ml_collections import config_flags

from ieg_jax import cli


def define_flags() -> None:
    """Defines the flags. This does not happen at import because other commands have flags of the same names."""
    cli.define_config_flag()
    flags.DEFINE_float("fraction", 0.05, "Share of each class that the network is trained on, in (0, 1).")
    flags.DEFINE_string("model", "vgg13", "The network, one of model.name.")
    flags.DEFINE_string("workdir", None, "Folder for the training of the network.", required=True)
    flags.DEFINE_string("out", None, "New file for the labels, .npy or .json; nothing is overwritten.", required=True)
    flags.adopt_module_key_flags(cli)


def main(argv: list[str]) -> None:
    """Trains, predicts, writes the labels and prints how many of them are wrong."""
    del argv
    # This imports jax, which takes seconds, so it happens only after the flags have been checked.
    from ieg_jax.reproduce import semantic_labels

    values = flags.FLAGS
    overridden = config_flags.get_override_values(values["config"])
    config = semantic_labels.training_config(values.config, values.fraction, values.model, overridden)
    said = semantic_labels.write_labels(config, values.workdir, values.out)
    if said:
        print(said)


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
