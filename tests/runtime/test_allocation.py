"""What `--keep_memory` does to page faults, in a process of its own: the settings of malloc are for all of it."""

import os
import subprocess
import sys

import pytest
from runs import ROOT

COUNT = """
import resource, sys
import jax, jax.numpy as jnp
from ieg_jax.runtime import allocation, watch
if sys.argv[1] == "kept":
    allocation.prepare()
x = jnp.ones((3000, 3000))
def work(x):
    for i in range(2):  # temporary arrays of 36 MB each
        x = jnp.sort(x * (1.0 + i), axis=i % 2)
    return x.sum()
step = watch.compile_step(jax.jit(work).lower(x))
assert allocation.keep_freed() == (sys.argv[1] == "kept")
for _ in range(3):  # until the heap has grown
    jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    jax.block_until_ready(step(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, float(step(x)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
def test_steps_touch_the_same_pages_again():
    counts = {}
    for form in ("given back", "kept"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        ran = subprocess.run([sys.executable, "-c", COUNT, form], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        faults, counts["result " + form] = ran.stdout.split()
        counts[form] = int(faults)
    assert counts["result kept"] == counts["result given back"]
    # glibc takes arrays above 32 MiB from the system each time: of 36 MB, 9,000 pages of 4 kB
    assert counts["given back"] > 3 * 5000 and counts["kept"] < counts["given back"] / 2, counts
