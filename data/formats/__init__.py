"""Other projects' files: flat HDF5 (InFOM, D4RL), Minari, metamotivo's buffers. `data.convert` is the command.

A module each. Where a format is read too it has a `Source`; no pickle is ever read.
"""
