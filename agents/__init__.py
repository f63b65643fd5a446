"""Offline reinforcement learning on rlring: return-conditioned Transformers trained on chains of whole trajectories."""
