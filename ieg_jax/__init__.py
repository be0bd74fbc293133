"""IEG: training that is robust to severe label noise, given a tiny trusted set."""

__version__ = "0.1.0"
__all__ = ["IEGClassifier"]


def __getattr__(name: str):
    """Imports the classifier when it is asked for: jax and TensorFlow come with it."""
    if name == "IEGClassifier":
        from ieg_jax.classifier import IEGClassifier

        return IEGClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
