"""IEG: training that is robust to severe label noise, given a tiny trusted set."""

__version__ = "0.1.0"
__all__ = ["IEGClassifier", "TrustedScorer", "TrustedSplit", "from_nnx"]


def __getattr__(name: str):
    """Imports these when they are asked for: with the classifier come jax and TensorFlow."""
    if name == "IEGClassifier":
        from ieg_jax.classifier import IEGClassifier

        return IEGClassifier
    if name in ("TrustedScorer", "TrustedSplit"):
        from ieg_jax import model_selection

        return getattr(model_selection, name)
    if name == "from_nnx":
        from ieg_jax.models.from_nnx import from_nnx

        return from_nnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
