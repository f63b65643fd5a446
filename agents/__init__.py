"""Offline reinforcement learning on rlring: return-conditioned Transformers trained on chains of whole trajectories."""

import data as data  # before all that takes long to import: it answers Ctrl-C meanwhile
