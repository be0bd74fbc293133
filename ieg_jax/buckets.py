"""What a command has to do before it uses paths on Google Cloud Storage (gs://…)."""

import importlib.util

from ieg_jax.errors import UserError
from ieg_jax.lazy import tf


def prepare() -> None:
    """Checks that the packages are there, and lets TensorFlow load as `lazy` has it: etils would load it by itself.

    Raises:
      UserError: where a package is missing.
    """
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.cloud.storage") is None:
        raise UserError(
            "paths that begin with gs:// need the package google-cloud-storage, with which Orbax writes checkpoints "
            "there: pip install 'ieg_jax[gcs]' (it comes with [tpu] too)"
        )
    _ = tf.io  # loads it
