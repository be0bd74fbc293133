"""Sets the environment variables that libtpu and jax read when they are loaded."""

import importlib.util
import os

from ieg_jax.errors import UserError


def prepare_environment() -> None:
    """Tells libtpu and jax that there is no TPU, so that they do not look for one. This must precede their import.

    Raises:
      UserError: where libtpu is not installed.
    """
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install -e '.[plan]' (package libtpu, Linux on x86-64)")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server, which is only there on Google Cloud
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several of these commands can run at once
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
    }.items():
        os.environ.setdefault(name, value)
