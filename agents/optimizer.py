"""The optimizer of a run: AdamW with gradient clipping, warm-up and a cosine or constant rate; and target networks."""

from collections.abc import Mapping

import jax
import optax

from agents.config import Config, OptimizerConfig


def schedule(settings: OptimizerConfig, updates: int) -> optax.Schedule:
    """Returns the learning rate schedule of a run of `updates` updates. A constant schedule does not depend on them."""
    if settings.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, settings.learning_rate, max(1, settings.warmup))
    warmup = min(settings.warmup, updates // 2)
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, updates, settings.learning_rate / 100
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019) after clipping by the global norm. Vectors (norms, biases) have no
    weight decay."""
    settings = config.optimizer

    def decayed(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.adamw(
            schedule(settings, config.train.updates),
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decayed,
        ),
    )


def with_target(optimizers: Mapping[str, optax.GradientTransformation], rate: float) -> optax.GradientTransformation:
    """Returns the optimizer of a dict of weights, with one optimizer per network. The weights "target" move by a share
    `rate` towards the updated weights "critic"; gradients of "target" are ignored."""

    def init(params):
        return {name: one.init(params[name]) for name, one in optimizers.items()}

    def update(gradients, state, params=None):
        assert params is not None
        both = {name: one.update(gradients[name], state[name], params[name]) for name, one in optimizers.items()}
        changes = {name: change for name, (change, _) in both.items()}
        critic = optax.apply_updates(params["critic"], changes["critic"])
        changes["target"] = jax.tree.map(lambda own, other: rate * (other - own), params["target"], critic)
        return changes, {name: after for name, (_, after) in both.items()}

    return optax.GradientTransformation(init, update)
