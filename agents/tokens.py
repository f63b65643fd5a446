"""The tokenizer: embeds timesteps as tokens, and picks the features of the tokens that predict actions."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from agents.agent import Scales, Timesteps
from agents.standardizer import Standardizer

TOKENS_PER_TIMESTEP = {"fused": 1, "rsar": 4}
# Fused tokens need no positions, and without them agents generalise to longer chains: trained on 17 trajectories, the
# return with 256 rose from 2.0 to 6.5. The four rsar tokens of a timestep belong together by their positions only.
ROPE_FRACTION = {"fused": 0.0, "rsar": 1.0}


class Tokenizer(nnx.Module):
    """Embeds timesteps as tokens. The last token of each timestep predicts its action.

    The papers' token stream is R s a r R s a r ... Here it is cut after each state, so that a timestep holds the
    previous action and reward:

        rsar     | a0 r0 R1 s1 | a1 r1 R2 s2 | ...            four tokens per timestep
        fused    | [s1 a0 r0 R1] | [s2 a1 r1 R2] | ...        one token per timestep

    So acting appends whole timesteps, and training and acting share one code path. Before the first timestep of a chain
    there is no action and no reward: in rsar, these two tokens are padding (segment -1).
    """

    def __init__(
        self,
        kind: Literal["rsar", "fused"],
        scales: Scales,
        *,
        action_size: int,
        width: int,
        episode_steps: int,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        self.width = width
        self.standardized = Standardizer.of(scales)
        self.return_scale = float(scales.return_to_go)
        observation_size = self.standardized.size

        def perceptron(inputs: int) -> nnx.Sequential:
            # Two layers: with a linear embedding, returns in the dark tasks were half as high.
            return nnx.Sequential(
                nnx.Linear(inputs, width, rngs=rngs), jax.nn.gelu, nnx.Linear(width, width, rngs=rngs)
            )

        if kind == "fused":
            # "moment" is the name in checkpoints of the weights that embed a timestep as one token.
            self.moment = perceptron(observation_size + action_size + 2)
        else:
            self.action = perceptron(action_size)
            self.reward = perceptron(1)
            self.return_to_go = perceptron(1)
            self.state = perceptron(observation_size)
        self.step = nnx.Embed(episode_steps, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)

    @property
    def per_timestep(self) -> int:
        return TOKENS_PER_TIMESTEP[self.kind]

    def __call__(self, timesteps: Timesteps) -> tuple[Float[Array, "B T D"], Int[Array, "B T"], Int[Array, "B T"]]:
        """Returns the tokens of timesteps [B, M] with their positions and segments; T = M * per_timestep."""
        state = self.standardized(timesteps.observation)
        return_to_go = timesteps.return_to_go[..., None] / self.return_scale
        reward = timesteps.previous_reward[..., None]
        step = self.step(timesteps.step)
        if self.kind == "fused":
            x = self.moment(jnp.concatenate([state, timesteps.previous_action, reward, return_to_go], axis=-1)) + step
            return x, timesteps.position, timesteps.segment
        parts = [
            self.action(timesteps.previous_action),
            self.reward(reward),
            self.return_to_go(return_to_go),
            self.state(state),
        ]
        x_BMkD = jnp.stack(parts, axis=2) + step[:, :, None]
        B, M, k, D = x_BMkD.shape
        place = jnp.arange(k, dtype=timesteps.position.dtype)[None, None]
        position = timesteps.position[..., None] * k + place
        nothing = (timesteps.position == 0)[..., None] & (place < 2)
        segment = jnp.where(nothing, -1, timesteps.segment[..., None])
        return x_BMkD.reshape(B, M * k, D), position.reshape(B, M * k), segment.reshape(B, M * k)

    def action_features(self, y: Float[Array, "B T D"]) -> Float[Array, "B M D"]:
        """Returns the features of the last token of each timestep, which predict its action."""
        k = self.per_timestep
        B, T, D = y.shape
        return y.reshape(B, T // k, k, D)[:, :, -1]
