"""The supervised and the IEG step in TensorFlow (`tf.function`), for comparison: `benchmarks.bench` runs it.

The same as in ieg_jax: initial weights, batch, network (with its moving averages of batch norm), losses and weight
decay, the exact meta-gradient through the momentum update by double backward, ω and λ, pseudo labels, mixup,
consistency, SGD with momentum, and the moving average of the weights. Each forward pass is made once: that of the image
and that of its view serve the pseudo labels, the lookahead and the loss, as XLA has it too, so that a step of IEG is 22
forward passes. Not there: metrics of the step. `tests/benchmarks` holds loss, ω, λ and the new weights to ours.
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import peer


class Layers:
    """Layers over images `[n, H, W, C]`, with parameters by path; collects the statistics of batch norm."""

    def __init__(self, params: dict[str, Any]):
        self.params = params
        self.statistics = {}

    def conv(self, x, name, stride=1):
        """See `peer.Layers`."""
        return tf.nn.conv2d(x, self.params[f"{name}/kernel"], stride, "SAME")

    def norm(self, x, name):
        """See `peer.Layers`."""
        y, mean, var, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.params[f"{name}/scale"],
            offset=self.params[f"{name}/bias"],
            mean=[],
            variance=[],
            epsilon=peer.NORM_EPSILON,
        )
        self.statistics |= {f"{name}/mean": mean, f"{name}/var": var}  # the variance is the unbiased one
        return y

    def relu(self, x):
        """See `peer.Layers`."""
        return tf.nn.relu(x)

    def widened(self, x, channels, stride):
        """See `peer.Layers`."""
        if stride > 1:
            x = tf.nn.avg_pool2d(x, stride, stride, "SAME")
        before = (channels - x.shape[-1]) // 2
        return tf.pad(x, ((0, 0), (0, 0), (0, 0), (before, channels - x.shape[-1] - before)))

    def head(self, x):
        """See `peer.Layers`."""
        return tf.reduce_mean(x, (1, 2)) @ self.params["head/kernel"] + self.params["head/bias"]


def cross_entropy(logits, target):
    """−Σ_j target_j log softmax(logits)_j, `[n]`."""
    return -tf.reduce_sum(target * tf.nn.log_softmax(logits), -1)


def normalized(logits):
    """Logits by the root of their mean square."""
    return logits * tf.math.rsqrt(tf.reduce_mean(tf.square(logits)) + 1e-8)


def blend(trust, label, pseudo):
    """λ y + (1 − λ) g."""
    return trust[:, None] * label + (1 - trust[:, None]) * pseudo


def decay(params):
    """½ c ‖Θ‖²."""
    return 0.5 * peer.DECAY * tf.add_n([tf.reduce_sum(tf.square(value)) for value in params.values()])


class Peer:
    """The state of a training, and its two steps."""

    def __init__(self, arrays: dict[str, np.ndarray], keys: dict[str, Any]):
        def of(group):
            return {
                name.removeprefix(group): tf.Variable(value) for name, value in arrays.items() if name.startswith(group)
            }

        self.keys, self.params, self.averages = keys, of("params/"), of("batch_stats/")
        self.momentum = {name: tf.Variable(tf.zeros_like(value)) for name, value in self.params.items()}
        self.ema = {name: tf.Variable(value) for name, value in self.params.items()}
        batch = {name.removeprefix("batch/"): value for name, value in arrays.items() if name.startswith("batch/")}
        classes = arrays["params/head/bias"].size
        self.image, self.view, self.probe = (
            tf.constant(value) for value in (batch["image"], batch["views"][:, 0], batch["probe_image"])
        )
        self.label, self.probe_label = (tf.one_hot(batch[name], classes) for name in ("label", "probe_label"))
        self.draw, self.steps = peer.draws(arrays), 0
        self.supervised, self.ieg = tf.function(self._supervised), tf.function(self._ieg)

    def step(self, case: str) -> float:
        """One step; its loss."""
        self.steps += 1
        ema = tf.constant(peer.ema_decay(self.steps), tf.float32)
        if case == "supervised":
            self.result = self.supervised(self.image, self.label, ema)
        else:
            places = [tf.constant(value) for value in self.draw()]
            self.result = self.ieg(
                self.image, self.view, self.probe, self.label, self.probe_label, ema, *places[:2], places[2]
            )
        return float(self.result["loss"].numpy())

    def found(self) -> dict[str, np.ndarray]:
        """What the last step found and left."""
        left = {"params/": self.params, "batch_stats/": self.averages, "ema/": self.ema}
        return {name: value.numpy() for name, value in self.result.items() if name != "loss"} | {
            group + name: value.numpy() for group, values in left.items() for name, value in values.items()
        }

    def _supervised(self, image, label, ema):
        with tf.GradientTape() as tape:
            layers = Layers(self.params)
            loss = tf.reduce_mean(cross_entropy(peer.network(layers, image, self.keys), label)) + decay(self.params)
        self._update(tape.gradient(loss, self.params), layers.statistics, ema)
        return {"loss": loss}

    def _ieg(self, image, view, probe, label, probe_label, ema, places, partner, share):
        size = image.shape[0]
        weights, trust = tf.fill([size], 1 / size), tf.fill([size], peer.TRUST)
        params, layers = self.params, Layers(self.params)

        # Pseudo labels, the lookahead and its gradient by ω and λ.
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch((weights, trust))
            with tf.GradientTape(persistent=True) as inner:
                logits = peer.network(layers, image, self.keys)
                view_logits = peer.network(Layers(params), view, self.keys)
                log_sum = tf.reduce_logsumexp(
                    tf.stack([tf.nn.log_softmax(normalized(one)) for one in (logits, view_logits)]), 0
                )
                pseudo = tf.stop_gradient(tf.nn.softmax(log_sum / peer.TEMPERATURE))
                noisy_loss = tf.reduce_sum(weights * cross_entropy(logits, blend(trust, label, pseudo)))
                noisy_loss += decay(params)
            gradient = inner.gradient(noisy_loss, params)
            ahead = {
                name: value - peer.META_RATE * (peer.MOMENTUM * self.momentum[name] + gradient[name])
                for name, value in params.items()
            }
            trusted_loss = tf.reduce_mean(cross_entropy(peer.network(Layers(ahead), probe, self.keys), probe_label))
            trusted_loss += decay(ahead)
        by_weights, by_trust = outer.gradient(trusted_loss, (weights, trust))
        best = tf.maximum(-by_weights, 0)
        best /= tf.reduce_sum(best) + 1e-5
        best_trust = tf.cast(by_trust < 0, tf.float32)

        # The mixed pool.
        target = tf.where((best < peer.THRESHOLD)[:, None], pseudo, label)
        pool = tf.concat([tf.gather(probe, places), image, view], 0)
        targets = tf.concat([tf.gather(probe_label, places), target, target], 0)
        of_image, of_label = share[:, None, None, None], share[:, None]
        mixed = of_image * pool + (1 - of_image) * tf.gather(pool, partner)
        mixed_target = of_label * targets + (1 - of_label) * tf.gather(targets, partner)
        with tf.GradientTape() as of_mixed:
            mixed_logits = peer.network(Layers(params), mixed, self.keys)

        # The loss of the logits, and from its gradient by these that by the parameters: no pass is made twice.
        every = [logits, view_logits, mixed_logits]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(every)
            loss = peer.SUPERVISED_SCALE * (
                tf.reduce_sum(best * cross_entropy(logits, blend(trust, label, pseudo)))
                + tf.reduce_mean(cross_entropy(logits, blend(best_trust, label, pseudo)))
            )
            trusted, *noisy = (
                tf.reduce_mean(cross_entropy(normalized(mixed_logits[part]), mixed_target[part]))
                for part in (slice(start, start + size) for start in (0, size, 2 * size))
            )
            loss += trusted + peer.UNLABELED * sum(noisy) / 2
            log_p = tf.stop_gradient(tf.nn.log_softmax(logits))
            divergence = tf.reduce_sum(tf.exp(log_p) * (log_p - tf.nn.log_softmax(view_logits)), -1)
            loss += peer.CONSISTENCY * tf.reduce_mean(divergence)
        of_logits, of_view, of_pool = tape.gradient(loss, every)
        seen = inner.gradient([logits, view_logits], params, output_gradients=[of_logits, of_view])
        pooled = of_mixed.gradient(mixed_logits, params, output_gradients=of_pool)
        total = {name: seen[name] + pooled[name] + peer.DECAY * value for name, value in params.items()}
        loss += decay(params)
        self._update(total, layers.statistics, ema)
        return {"loss": loss, "weights": best, "trust": best_trust}

    def _update(self, gradient, statistics, ema):
        for name, value in self.params.items():
            self.momentum[name].assign(peer.MOMENTUM * self.momentum[name] + gradient[name])
            value.assign_sub(peer.LEARNING_RATE * self.momentum[name])
            self.ema[name].assign(ema * self.ema[name] + (1 - ema) * value)
        for name, value in statistics.items():
            average = self.averages[name]
            average.assign(peer.NORM_MOMENTUM * average + (1 - peer.NORM_MOMENTUM) * value)


if __name__ == "__main__":
    given, model, threads = peer.arguments(__doc__)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    trained = Peer(given, model)
    peer.serve(tf.__version__, trained.step, trained.found)
