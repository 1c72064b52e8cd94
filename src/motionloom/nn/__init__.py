"""Building blocks of networks: attention, positions, norms, modulation, patching."""
