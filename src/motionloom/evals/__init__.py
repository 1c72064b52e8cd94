"""Judges: what a model can do, in numbers."""
