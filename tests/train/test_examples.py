import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ieg_jax.train import examples, metrics
from ieg_jax.train.loop import train_and_evaluate


def test_sums_by_hand():
    """Two steps of three, one example twice in a batch, and a step that does not count."""
    add = jax.jit(examples.add)

    def seen(ids, weights, trust):
        trust = None if trust is None else jnp.array(trust)
        return metrics.Examples(jnp.array(ids), jnp.array(weights), jnp.ones(3, jnp.int8), trust)

    state = examples.empty(5)
    state = add(state, seen([4, 0, 4], [0.5, 0.2, 0.3], [1.0, 0.0, 0.0]), jnp.array(True))
    state = add(state, seen([1, 2, 3], [0.9, 0.1, 0.0], [1.0, 1.0, 1.0]), jnp.array(False))
    state = add(state, seen([0, 1, 2], [0.0, 1.0, 0.0], None), jnp.array(True))
    found = examples.averages(jax.device_get(state))
    np.testing.assert_array_equal(found["visits"], [2, 1, 1, 0, 2])
    np.testing.assert_allclose(found["weight"], [0.3, 3.0, 0.0, np.nan, 1.2], rtol=1e-6)  # ω times 3
    np.testing.assert_allclose(found["trust"], [0.5, 1.0, 1.0, np.nan, 0.5])


@pytest.mark.parametrize(
    "method, epochs, visits", [("ieg", 1.0, 4 * 16), ("l2r", 0.02, 2 * 16), ("supervised", 1.0, 0)]
)
def test_a_run_writes_down_its_last_epochs(tiny_config, tmp_path, method, epochs, visits):
    """Four steps of sixteen; 0.02 epochs of the 1,277 examples are 1.6 steps."""
    tiny_config.method.name, tiny_config.audit.epochs = method, epochs
    train_and_evaluate(tiny_config, str(tmp_path))
    if not visits:
        assert not (tmp_path / "examples.npz").exists()
        return
    with np.load(tmp_path / "examples.npz") as file:
        found = dict(file)
    assert found["visits"].sum() == visits
    seen = found["visits"] > 0
    trusted = json.loads((tmp_path / "trusted.json").read_text())["ids"]
    assert not seen[trusted].any(), "they are not in the noisy training set"
    assert np.isnan(found["weight"][~seen]).all() and np.isfinite(found["weight"][seen]).all()
    # ω sums to 1 over a batch (to less where all are tiny, to 0 where no example helps).
    total = (found["weight"] * found["visits"])[seen].sum() / 16
    assert 0 < total <= visits / 16 + 1e-3
    assert set(np.unique(found["trust"][seen])) <= {0.0, 0.5, 1.0} and (
        method == "ieg" or (found["trust"][seen] == 1).all()
    )
