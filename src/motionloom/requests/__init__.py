"""What a person asks for, made ready for generation, and what is left in a folder of what was made."""

from motionloom.requests.prepared import Prepared, prepare
from motionloom.requests.sources import Given

__all__ = ["Given", "Prepared", "prepare"]
