"""Offline reinforcement learning on rlring: return-conditioned Transformers trained on chains of whole trajectories."""

import data as data  # first: it handles Ctrl-C while the slow imports run
