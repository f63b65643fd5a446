"""The optimizer of a run: AdamW, clipped, warmed up, then a cosine or a constant rate."""

import optax

from agents.config import Config, OptimizerConfig


def schedule(own: OptimizerConfig, updates: int) -> optax.Schedule:
    """Returns the learning rate by update, of so many. A constant one does not depend on how many."""
    if own.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, own.learning_rate, max(1, own.warmup))
    warmup = min(own.warmup, updates // 2)
    return optax.warmup_cosine_decay_schedule(0.0, own.learning_rate, warmup, updates, own.learning_rate / 100)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019) behind clipping by the global norm; no decay on vectors (norms,
    biases)."""
    own = config.optimizer

    def decayed(params):
        import jax

        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(own.gradient_clip),
        optax.adamw(schedule(own, config.train.updates), b2=own.beta2, weight_decay=own.weight_decay, mask=decayed),
    )
