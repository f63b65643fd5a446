"""ScoreMod: the modifications of scores before the softmax (scale, soft cap, bias) and of its weights (dropout).

    logits = cap * tanh(scale * q k^T / cap) + bias - slopes * |q_position - k_position|

They are implemented only here. Schemes and kernels pass the ScoreMod on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from rlring.attention.mask import Mask
from rlring.attention.softmax import accumulator_type, zeros
from rlring.attention.window import apart

LOG2_E = float(1.0 / np.log(2))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreMod:
    """How scores become weights. N: query heads of this device; T: queries of this device; S: keys of all devices."""

    scale: float = field(metadata={"static": True})
    soft_cap: float | None = field(default=None, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})  # the share of the weights that become 0
    slopes: Float[Array, "N"] | None = None  # ALiBi: Press et al. 2108.12409
    bias: Float[Array, "N T S"] | None = None
    seeds: UInt32[Array, "B N 2"] | None = None  # random seeds of the dropout, for each sequence and head
    sinks: Float[Array, "N"] | None = None  # logits of one more key for each head, whose value is 0

    @classmethod
    def plain(cls, head_size: int) -> "ScoreMod":
        """Returns the ScoreMod of plain softmax attention, scores / sqrt(H) (Vaswani et al. 1706.03762, equation 1)."""
        return cls(head_size**-0.5)

    @property
    def is_plain(self) -> bool:
        """Whether logits are a positive scale times scores, so that scores can be compared and masked unscaled."""
        return self.scale > 0 and self.soft_cap is None and self.slopes is None and self.bias is None

    @property
    def unit(self) -> float:
        """The factor by which logits() is multiplied to get the base-2 logarithm of an unnormalised weight."""
        return self.scale * LOG2_E if self.is_plain else LOG2_E

    @property
    def kept_share(self) -> float:
        """The share of the weights that dropout keeps."""
        return 1.0 - self.dropout

    @property
    def needs_places(self) -> bool:
        """Whether bias or dropout need the places (indices in the whole arrays) of tokens, which the mask then has."""
        return self.bias is not None or self.seeds is not None

    def logits(self, scores: Float[Array, "..."], bias: Float[Array, "..."] | None) -> Float[Array, "..."]:
        """Returns the logits, up to the constant factor that `unit` contains."""
        if self.is_plain:
            return scores
        logits = scores * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return logits if bias is None else logits + bias

    def d_scores(self, d_logits: Float[Array, "..."], scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the gradient of the scores divided by `scale`, from the gradient of the logits."""
        if self.soft_cap is None:
            return d_logits
        return d_logits * (1.0 - jnp.square(jnp.tanh(scores * (self.scale / self.soft_cap))))

    def of_heads(self, axis: str) -> "ScoreMod":
        """Returns the ScoreMod of this device's share of the heads, which are split over the mesh axis."""
        devices, device = lax.axis_size(axis), lax.axis_index(axis)

        def share(x: Array, dimension: int) -> Array:
            size = x.shape[dimension] // devices
            return lax.dynamic_slice_in_dim(x, device * size, size, dimension)

        return replace(
            self,
            slopes=None if self.slopes is None else share(self.slopes, 0),
            sinks=None if self.sinks is None else share(self.sinks, 0),
            seeds=None if self.seeds is None else share(self.seeds, 1),
            bias=None if self.bias is None else lax.all_to_all(self.bias, axis, 0, 1, tiled=True),
        )

    def cotangent(self, gradients: "ModGradients") -> "ScoreMod":
        """Returns the gradients as a ScoreMod, the structure that jax.custom_vjp requires."""
        seeds = None if self.seeds is None else np.zeros(self.seeds.shape, jax.dtypes.float0)
        slopes, bias = (
            None if x is None else found.astype(x.dtype)
            for x, found in ((self.slopes, gradients.slopes), (self.bias, gradients.bias))
        )
        return replace(self, slopes=slopes, bias=bias, seeds=seeds)

    def specs(self, per_head: P, *, bias: P, seeds: P | None = None) -> "ScoreMod":
        """Returns the PartitionSpecs of its arrays, in a ScoreMod: `per_head` for slopes and sinks, `bias`, `seeds`."""
        specs = {"slopes": per_head, "sinks": per_head, "bias": bias, "seeds": seeds}
        return replace(self, **{name: spec for name, spec in specs.items() if getattr(self, name) is not None})

    def padded(self, queries: int, more_keys: int) -> "ScoreMod":
        """Returns the ScoreMod with its bias padded to `queries` queries and by `more_keys` keys."""
        if self.bias is None:
            return self
        more = ((0, 0), (0, queries - self.bias.shape[1]), (0, more_keys))
        return replace(self, bias=jnp.pad(self.bias, more))

    def no_gradients(self) -> "ModGradients":
        """Returns ModGradients of zeros."""
        parts = (self.slopes, self.bias)
        return ModGradients(*(None if x is None else zeros(x.shape, accumulator_type(x.dtype), x) for x in parts))

    def padded_gradients(self, gradients: "ModGradients") -> "ModGradients":
        """Returns gradients padded to the shapes of this ScoreMod, a result of padded()."""
        if self.bias is None:
            return gradients
        more = [(0, size - given) for size, given in zip(self.bias.shape, gradients.bias.shape, strict=True)]
        return gradients._replace(bias=jnp.pad(gradients.bias, more))

    def cut_gradients(self, gradients: "ModGradients") -> "ModGradients":
        """Returns gradients cut to the shapes of this ScoreMod: the inverse of padded_gradients()."""
        if self.bias is None:
            return gradients
        _, queries, keys = self.bias.shape
        return gradients._replace(bias=gradients.bias[:, :queries, :keys])


class ModGradients(NamedTuple):
    """Gradients of a ScoreMod, at least float32; None for parts that it does not have."""

    slopes: Float[Array, "N"] | None = None
    bias: Float[Array, "N T S"] | None = None


class RowTerms(NamedTuple):
    """The parts of a ScoreMod that belong to some rows (rows.py); None for parts that it does not have."""

    slopes: Float[Array, "R G"] | None = None
    seeds: UInt32[Array, "R G 2"] | None = None
    bias: Float[Array, "R G Q S"] | None = None

    def repeated(self, times: int) -> "RowTerms":
        """Returns the terms with each row repeated `times` times."""
        return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


class Tile(NamedTuple):
    """The mask, bias and dropout of the scores [R, Q, S] of one block; Q = G * size."""

    mod: ScoreMod
    visible: Bool[Array, "R Q S"] | None  # None: every query sees every key
    bias: Float[Array, "R Q S"] | None = None  # including that of ALiBi slopes
    keep: Bool[Array, "R Q S"] | None = None  # the weights that dropout keeps
    distance: Float[Array, "R G size S"] | None = None  # |q_position - k_position|

    @classmethod
    def of(
        cls,
        mod: ScoreMod,
        terms: RowTerms,
        mask: Mask,
        q: Float[Array, "R Q H"],
        *,
        is_masked: bool,
        per_row: Callable[[Shaped[Array, "m size S"]], Shaped[Array, "R #G size S"]] | None = None,
    ) -> "Tile":
        """Returns the tile of these queries and keys.

        Args:
            per_row: expands arrays of the mask's m rows to R rows. None: R // m neighbouring rows share a mask.
        """
        (rows, queries, _), (masks, size) = q.shape, mask.q_position.shape

        def flat(x: Shaped[Array, "R #G size S"]) -> Shaped[Array, "R Q S"]:
            return jnp.broadcast_to(x, (rows, queries // size, *x.shape[2:])).reshape(rows, queries, -1)

        def of_neighbours(x: Shaped[Array, "m size S"]) -> Shaped[Array, "R 1 size S"]:
            return jnp.broadcast_to(x[:, None], (masks, rows // masks, *x.shape[1:])).reshape(rows, 1, *x.shape[1:])

        per_row = per_row or of_neighbours
        dtype = accumulator_type(q.dtype)
        bias, distance, keep = terms.bias, None, None
        if terms.slopes is not None:
            distance = per_row(apart(mask.q_position[:, :, None], mask.k_position[:, None, :])).astype(dtype)
            linear = -terms.slopes[:, :, None, None].astype(dtype) * distance
            bias = linear if bias is None else linear + bias.astype(dtype)
        if terms.seeds is not None:
            places = jnp.broadcast_arrays(mask.q_place[:, :, None], mask.k_place[:, None, :])
            bits = _bits(terms.seeds, *(per_row(x).astype(jnp.uint32) for x in places))
            keep = flat(bits < np.uint32(min(round(mod.kept_share * 2**32), 2**32 - 1)))
        visible = flat(per_row(mask.visible())) if is_masked else None
        return cls(mod, visible, None if bias is None else flat(bias.astype(dtype)), keep, distance)

    def logits(self, scores: Float[Array, "R Q S"]) -> Float[Array, "R Q S"]:
        """Returns ScoreMod.logits() of the scores, with -inf for keys that are not visible."""
        logits = self.mod.logits(scores, self.bias)
        return logits if self.visible is None else jnp.where(self.visible, logits, -jnp.inf)

    def kept(self, weights: Float[Array, "R Q S"]) -> Float[Array, "R Q S"]:
        """Returns the weights with dropped ones set to 0; they are not yet divided by `kept_share`."""
        return weights if self.keep is None else jnp.where(self.keep, weights, 0)

    def gradients(self, d_logits: Float[Array, "R Q S"], terms: RowTerms) -> RowTerms:
        """Returns the gradients of `terms`, from which the tile was made."""
        slopes = bias = None
        if terms.slopes is not None:
            each = d_logits.reshape(*terms.slopes.shape, -1, d_logits.shape[2])
            slopes = (each * -self.distance).sum((2, 3))
        if terms.bias is not None:
            bias = d_logits.reshape(terms.bias.shape)
        return RowTerms(slopes, None, bias)


def _bits(
    seeds: UInt32[Array, "R G 2"], q_place: UInt32[Array, "R 1 size S"], k_place: UInt32[Array, "R 1 size S"]
) -> UInt32[Array, "R G size S"]:
    """Returns random bits that depend only on seeds and places: Threefry with the places as its counter."""

    def of_head(q_place, k_place, seed):
        counter = jnp.concatenate([q_place.reshape(-1), k_place.reshape(-1)])
        return threefry_2x32(seed, counter)[: q_place.size].reshape(q_place.shape)

    of_row = jax.vmap(of_head, in_axes=(None, None, 0))
    return jax.vmap(of_row)(q_place[:, 0], k_place[:, 0], seeds)
