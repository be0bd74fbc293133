"""Draws from the noise model, whose truth is known."""

import numpy as np

from ieg_jax.audit import noise_model

UNIFORM = np.where(np.eye(4, dtype=bool), 0.7, 0.1)
BY_CLASS = np.array([[0.6, 0.4, 0, 0], [0.35, 0.65, 0, 0], [0, 0, 1.0, 0], [0, 0, 0.2, 0.8]])


def draw(n, transition, seed=0, temperature=1.0):
    """The network's probabilities, true classes and given labels; the truth is drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(len(transition), 0.2), n)
    true = (truth.cumsum(1) > rng.random((n, 1))).argmax(1)
    given = (transition[true].cumsum(1) > rng.random((n, 1))).argmax(1)
    return sharpen(truth, 1 / temperature), true, given


def sharpen(probabilities, temperature):
    """softmax(log p / temperature)."""
    return noise_model.softmax(noise_model.centred_logs(probabilities) / temperature)


def depends_on_the_image(n, seed=0):
    """Four classes; a label is wrong where the network is in doubt, and then it is what this likes second best."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(4, 0.25), n)
    true = (truth.cumsum(1) > rng.random((n, 1))).argmax(1)
    others = np.where(np.arange(4) == true[:, None], -1, truth).argmax(1)
    wrong = rng.random(n) < np.clip(1.2 * (1 - truth[np.arange(n), true]) + 0.05, 0, 0.95)
    return truth, true, np.where(wrong, others, true)
