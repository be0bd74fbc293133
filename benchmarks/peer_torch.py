"""The supervised and the IEG step in PyTorch (eager, channels last), for comparison: `benchmarks.bench` runs it.

The same as in ieg_jax: initial weights, batch, network (with its moving averages of batch norm), losses and weight
decay, the exact meta-gradient through the momentum update by double backward, ω and λ, pseudo labels, mixup,
consistency, SGD with momentum, and the moving average of the weights. Each forward pass is made once: that of the image
and that of its view serve the pseudo labels, the lookahead and the loss, as XLA has it too, so that a step of IEG is 22
forward passes. Not there: metrics of the step. `tests/benchmarks` holds loss, ω, λ and the new weights to ours.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peer

LAYOUT = torch.channels_last


class Layers:
    """Layers over images `[n, C, H, W]`, with parameters by path; moves the averages of batch norm that it is given."""

    def __init__(self, params: dict[str, torch.Tensor], averages: dict[str, torch.Tensor] | None = None):
        self.params, self.averages = params, averages or {}

    def conv(self, x, name, stride=1):
        """See `peer.Layers`."""
        kernel = self.params[f"{name}/kernel"]
        before, behind = peer.same_padding(x.shape[-1], kernel.shape[-1], stride)
        if before == behind:
            return F.conv2d(x, kernel, stride=stride, padding=before)
        return F.conv2d(F.pad(x, (before, behind, before, behind)), kernel, stride=stride)

    def norm(self, x, name):
        """See `peer.Layers`."""
        mean, var = self.averages.get(f"{name}/mean"), self.averages.get(f"{name}/var")
        scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
        return F.batch_norm(x, mean, var, scale, bias, True, 1 - peer.NORM_MOMENTUM, peer.NORM_EPSILON)

    def relu(self, x):
        """See `peer.Layers`."""
        return F.relu(x)

    def widened(self, x, channels, stride):
        """See `peer.Layers`."""
        if stride > 1:
            x = F.avg_pool2d(x, stride)
        before = (channels - x.shape[1]) // 2
        return F.pad(x, (0, 0, 0, 0, before, channels - x.shape[1] - before))

    def head(self, x):
        """See `peer.Layers`."""
        return F.linear(x.mean((2, 3)), self.params["head/kernel"], self.params["head/bias"])


def cross_entropy(logits, target):
    """−Σ_j target_j log softmax(logits)_j, `[n]`."""
    return -(target * F.log_softmax(logits, -1)).sum(-1)


def normalized(logits):
    """Logits by the root of their mean square."""
    return logits * torch.rsqrt(logits.square().mean() + 1e-8)


def blend(trust, label, pseudo):
    """λ y + (1 − λ) g."""
    return trust[:, None] * label + (1 - trust[:, None]) * pseudo


def decay(params):
    """½ c ‖Θ‖²."""
    return 0.5 * peer.DECAY * sum(value.square().sum() for value in params.values())


def turned(value: np.ndarray, back: bool = False) -> np.ndarray:
    """A kernel from (H, W, in, out) or (in, out) to PyTorch's order of axes, or back; other arrays as they are."""
    if value.ndim == 4:
        return value.transpose((2, 3, 1, 0) if back else (3, 2, 0, 1))
    return value.T if value.ndim == 2 else value


class Peer:
    """The state of a training, and its two steps."""

    def __init__(self, arrays: dict[str, np.ndarray], keys: dict[str, Any]):
        def of(group):
            found = {name.removeprefix(group): value for name, value in arrays.items() if name.startswith(group)}
            return {name: torch.tensor(np.ascontiguousarray(turned(value))) for name, value in found.items()}

        def images(value):
            return torch.tensor(np.ascontiguousarray(value.transpose(0, 3, 1, 2))).contiguous(memory_format=LAYOUT)

        self.keys, self.averages = keys, of("batch_stats/")
        self.params = {
            name: (value.contiguous(memory_format=LAYOUT) if value.ndim == 4 else value).requires_grad_()
            for name, value in of("params/").items()
        }
        self.momentum = {name: torch.zeros_like(value) for name, value in self.params.items()}
        self.ema = {name: value.detach().clone() for name, value in self.params.items()}
        self.image, self.view = images(arrays["batch/image"]), images(arrays["batch/views"][:, 0])
        self.probe = images(arrays["batch/probe_image"])
        self.label, self.probe_label = (
            F.one_hot(torch.tensor(arrays[f"batch/{name}"]).long(), len(self.params["head/bias"])).float()
            for name in ("label", "probe_label")
        )
        self.draw, self.steps, self.result = peer.draws(arrays), 0, {}

    def step(self, case: str) -> float:
        """One step; its loss."""
        self.steps += 1
        return float(self.supervised() if case == "supervised" else self.ieg())

    def found(self) -> dict[str, np.ndarray]:
        """What the last step found and left."""
        left = {"params/": self.params, "batch_stats/": self.averages, "ema/": self.ema}
        return {name: value.numpy() for name, value in self.result.items()} | {
            group + name: turned(value.detach().numpy(), back=True)
            for group, values in left.items()
            for name, value in values.items()
        }

    def supervised(self) -> torch.Tensor:
        """Cross-entropy of the given labels."""
        logits = peer.network(Layers(self.params, self.averages), self.image, self.keys)
        loss = cross_entropy(logits, self.label).mean() + decay(self.params)
        self._update(loss)
        return loss.detach()

    def ieg(self) -> torch.Tensor:
        """The whole step of IEG."""
        params, label = self.params, self.label
        size = len(label)
        weights, trust = torch.full((size,), 1 / size), torch.full((size,), peer.TRUST)
        weights.requires_grad_()
        trust.requires_grad_()

        # Pseudo labels, the lookahead and its gradient by ω and λ.
        logits = peer.network(Layers(params, self.averages), self.image, self.keys)
        view_logits = peer.network(Layers(params), self.view, self.keys)
        with torch.no_grad():
            each = torch.stack([F.log_softmax(normalized(one), -1) for one in (logits, view_logits)])
            pseudo = F.softmax(torch.logsumexp(each, 0) / peer.TEMPERATURE, -1)
        noisy_loss = (weights * cross_entropy(logits, blend(trust, label, pseudo))).sum() + decay(params)
        gradient = torch.autograd.grad(noisy_loss, list(params.values()), create_graph=True)
        ahead = {
            name: value - peer.META_RATE * (peer.MOMENTUM * self.momentum[name] + one)
            for (name, value), one in zip(params.items(), gradient, strict=True)
        }
        trusted_loss = cross_entropy(peer.network(Layers(ahead), self.probe, self.keys), self.probe_label).mean()
        trusted_loss = trusted_loss + decay(ahead)
        by_weights, by_trust = torch.autograd.grad(trusted_loss, (weights, trust), retain_graph=True)
        with torch.no_grad():
            best = (-by_weights).clamp(min=0)
            best = best / (best.sum() + 1e-5)
            best_trust = (by_trust < 0).float()
            mixed, mixed_target = self._mixed(torch.where((best < peer.THRESHOLD)[:, None], pseudo, label))
        del gradient, ahead, trusted_loss, noisy_loss  # and with them what was kept for the second derivative

        loss = peer.SUPERVISED_SCALE * (
            (best * cross_entropy(logits, blend(trust.detach(), label, pseudo))).sum()
            + cross_entropy(logits, blend(best_trust, label, pseudo)).mean()
        )
        mixed_logits = peer.network(Layers(params), mixed, self.keys)
        trusted, *noisy = (
            cross_entropy(normalized(part), target).mean()
            for part, target in zip(mixed_logits.split(size), mixed_target.split(size), strict=True)
        )
        loss = loss + trusted + peer.UNLABELED * sum(noisy) / 2
        log_p = F.log_softmax(logits, -1).detach()
        divergence = (log_p.exp() * (log_p - F.log_softmax(view_logits, -1))).sum(-1)
        loss = loss + peer.CONSISTENCY * divergence.mean() + decay(params)
        self._update(loss)
        self.result = {"weights": best, "trust": best_trust}
        return loss.detach()

    def _mixed(self, target):
        places, partner, share = (torch.tensor(value) for value in self.draw())
        places, partner, share = places.long(), partner.long(), share.float()
        pool = torch.cat([self.probe[places], self.image, self.view]).contiguous(memory_format=LAYOUT)
        targets = torch.cat([self.probe_label[places], target, target])
        of_image, of_label = share[:, None, None, None], share[:, None]
        mixed = of_image * pool + (1 - of_image) * pool[partner]
        return mixed.contiguous(memory_format=LAYOUT), of_label * targets + (1 - of_label) * targets[partner]

    def _update(self, loss):
        gradient = torch.autograd.grad(loss, list(self.params.values()))
        decay = peer.ema_decay(self.steps)
        with torch.no_grad():
            for (name, value), one in zip(self.params.items(), gradient, strict=True):
                self.momentum[name].mul_(peer.MOMENTUM).add_(one)
                value.sub_(peer.LEARNING_RATE * self.momentum[name])
                self.ema[name].mul_(decay).add_(value, alpha=1 - decay)


if __name__ == "__main__":
    given, model, threads = peer.arguments(__doc__)
    torch.set_num_threads(threads)
    trained = Peer(given, model)
    peer.serve(torch.__version__, trained.step, trained.found)
