"""IEG: training that is robust to severe label noise, given a tiny trusted set."""

__version__ = "0.1.0"
