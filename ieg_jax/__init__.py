"""IEG: training that is robust to severe label noise, given a tiny trusted set."""

__version__ = "0.1.0"
__all__ = ["IEGClassifier", "TrustedSplit"]


def __getattr__(name: str):
    """Imports these when they are asked for: with the classifier come jax and TensorFlow."""
    if name == "IEGClassifier":
        from ieg_jax.classifier import IEGClassifier

        return IEGClassifier
    if name == "TrustedSplit":
        from ieg_jax.model_selection import TrustedSplit

        return TrustedSplit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
