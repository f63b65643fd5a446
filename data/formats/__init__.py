"""File formats of other projects: flat HDF5 (InFOM, D4RL), Minari and metamotivo's buffers; used by `data.convert`.

Each format has a module that writes it. Flat HDF5 and Minari can also be read, through a `Source`. No pickle is read.
"""
