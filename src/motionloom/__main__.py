"""``python -m motionloom``: the command line, for launchers such as torchrun."""

from motionloom.cli.main import main

main()
