"""MotionLoom: from a folder of captioned clips to a text-to-video model that streams.

The package is a set of rooms (see ``docs/architecture.md``); nothing heavy is imported here.
"""

__version__ = "0.1.0"
