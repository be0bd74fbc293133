"""What a command has to do before it uses paths on Google Cloud Storage (gs://…)."""

import importlib.util
import re
from collections.abc import Iterable

from ieg_jax.errors import UserError, first_line
from ieg_jax.lazy import tf

SECONDS = 20.0  # for an answer
ROLES = "roles/storage.objectAdmin, and roles/storage.legacyBucketReader for the permission storage.buckets.get"


def prepare(arguments: Iterable[str]) -> None:
    """Checks that paths on buckets can be used, and lets TensorFlow load as `lazy` has it: etils would do it by itself.

    Args:
      arguments: of the command; the buckets of its --workdir and --out are asked for.

    Raises:
      UserError: where a package is missing, and for a bucket that is not there or cannot be reached.
    """
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.cloud.storage") is None:
        raise UserError(
            "paths that begin with gs:// need the package google-cloud-storage, with which Orbax writes checkpoints "
            "there: pip install 'ieg_jax[gcs]' (it comes with [tpu] too)"
        )
    for name in dict.fromkeys(re.findall(r"--?(?:workdir|out)[= ]gs://([^/ ]+)", " ".join(arguments))):
        _check(name)
    _ = tf.io  # loads it


def _check(name: str) -> None:
    """Asks for a bucket once, as Orbax will: TensorFlow would go on asking for minutes for one that is not there."""
    from google.api_core import exceptions  # takes half a second, so only where it is used
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage

    try:
        storage.Client().get_bucket(name, timeout=SECONDS)
    except exceptions.NotFound:
        raise UserError(f"gs://{name}: there is no such bucket; make it, or mend the name") from None
    except exceptions.Forbidden as error:
        raise UserError(f"gs://{name}: not allowed ({first_line(error)}); this account needs {ROLES}") from None
    except (GoogleAuthError, OSError) as error:
        raise UserError(
            f"gs://{name}: no credentials ({first_line(error)}); give the machine a service account with {ROLES}, or "
            f"use `gcloud auth application-default login`"
        ) from None
    except exceptions.GoogleAPIError as error:
        raise UserError(f"gs://{name} cannot be reached ({first_line(error)}); try again") from None
