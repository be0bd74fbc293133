"""Plain cross-entropy on a linear network, in numpy: on the labels as given, and on the trusted set alone."""

import numpy as np
import pytest
from conftest import x64
from linear import CLASSES, cross_entropy, make, make_batch, views


@pytest.mark.parametrize("name, view", [("supervised", 0), ("trusted_only", 1)])
def test_the_loss_by_hand(name, view):
    """Plain training sees the standard view, and training on the trusted set alone the first strong one."""
    batch = make_batch()
    with x64():
        _, method, state, weights, _ = make(name, **{"optimizer.weight_decay": 0.05})
        supervision = method.supervise(state, batch, None)
        value, aux = method.loss(state.params, state, batch, supervision, None)
    each = [cross_entropy(np.eye(CLASSES)[batch["label"]], seen @ weights).mean() for seen in views(batch)]
    assert len(set(each)) == 3, "each view has a loss of its own"
    assert float(aux.terms["cross_entropy"]) == pytest.approx(each[view], rel=1e-9)
    assert float(value) == pytest.approx(each[view] + 0.025 * (weights**2).sum(), rel=1e-9)
    np.testing.assert_allclose(aux.logits, views(batch)[view] @ weights, rtol=1e-9)
