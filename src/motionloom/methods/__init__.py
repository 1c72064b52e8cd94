"""Methods: what one training step optimises."""

from motionloom.methods.denoise import Denoise

METHODS = {"denoise": Denoise}
"""Methods by name."""

__all__ = ["METHODS", "Denoise"]
