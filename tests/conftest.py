"""Settings that must be made before jax is imported, and fixtures of several test files."""

import os

from compilation import FAST_COMPILATION

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Several processes of tests, each with as many threads as there are cores, wait for each other: a logistic regression
# took 0.6 s in place of 0.03.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
import pathlib

import jax
import pytest

from configs import default
from ieg_jax import cli

gc.set_threshold(*cli.GARBAGE_THRESHOLDS)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

if hasattr(jax, "enable_x64"):
    x64 = jax.enable_x64
else:  # jax before 0.8
    from jax.experimental import enable_x64 as x64  # noqa: F401


@pytest.fixture
def tiny_config():
    """A run of a few seconds: digits, the two-convolution network, no work between first and last step."""
    config = default.get_config()
    config.model.name = "tiny"
    config.batch_size = 16
    config.eval_batch_size = 100
    config.num_train_epochs = 0
    config.num_train_steps = 4
    config.log_every_steps = 2
    config.eval_every_epochs = 0
    config.eval_every_steps = 2
    config.checkpoint_every_epochs = 0
    config.checkpoint_every_steps = 2
    config.schedule.first_cycle_epochs = 0
    config.schedule.first_cycle_steps = 4
    config.noise.kind = "uniform"
    config.noise.rate = 0.4
    config.trusted.per_class = 2
    config.mesh.data = 1
    return config
