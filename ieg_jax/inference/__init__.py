"""Predicts with a trained network, here (`trained`) or in a program that serves it (`exported`).

The module `predictions` writes the tables of the command `ieg_jax.predict`; it is not imported here.
"""

from ieg_jax.inference.exported import (
    INPUTS,
    PLATFORMS,
    STABLEHLO,
    Served,
    export,
    export_saved_model,
    export_stablehlo,
    largest_difference,
    load_saved_model,
    load_stablehlo,
)
from ieg_jax.inference.trained import SIGNATURE, Trained, load, over_training, predict, predictor, predictor_of_all

__all__ = [
    "INPUTS",
    "PLATFORMS",
    "SIGNATURE",
    "STABLEHLO",
    "Served",
    "Trained",
    "export",
    "export_saved_model",
    "export_stablehlo",
    "largest_difference",
    "load",
    "load_saved_model",
    "load_stablehlo",
    "over_training",
    "predict",
    "predictor",
    "predictor_of_all",
]
