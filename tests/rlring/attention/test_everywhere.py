"""Every feature on meshes of any names, on global arrays and inside the caller's shard_map, in float32 and bfloat16.

Against the definition in float64: float32 to 1e-5, bfloat16 to twice the error of dense attention in bfloat16; but its
log-sum-exps are those of weights that are rounded to bfloat16, as they are multiplied: 2^-8 off at most.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, attention, sharded_attention
from tests.rlring.attention.test_axes import CASES, mesh_of
from tests.rlring.attention.test_features import (
    BLOCKS,
    FEATURES,
    HEADS,
    KEY,
    KV_HEADS,
    LENGTH,
    RATE,
    SIZE,
    kept_by,
    normal,
    positions,
    reference,
    run,
)

ROWS = 4
PLACES = [(name, form) for name in CASES for form in ("global arrays", "in shard_map")]
# Each of the features in two of the places, in each of which two features meet: the product is 144 such cases.
PAIRS = [(feature, *PLACES[(n + 5 * turn) % len(PLACES)]) for n, feature in enumerate(FEATURES) for turn in range(2)]


def mask_of(window) -> Mask:
    """Packed, padded, one whole and one of two lengths; causal where there is no window."""
    position = positions(ROWS)
    rows = position[0] // 20, jnp.where(position[0] < 40, 0, -1), position[0] * 0, (position[0] < 30).astype(int)
    segment = jnp.stack(rows)
    return Mask(position, position, segment, segment, window is None, window)


def attention_on(name: str, form: str, mask: Mask, **settings):
    """Attention of a dictionary of arrays, as a model on this mesh calls it."""
    scheme, sizes, axes = CASES[name]
    mesh, config = mesh_of(sizes), AttentionConfig(scheme, **BLOCKS)
    if form == "global arrays":
        return lambda x: attention(mask=mask, config=config, mesh=mesh, axes=axes, **x, **settings)
    sequence = tuple(axis for axis in axes.sequence if axis in sizes)
    tokens = P(axes.batch or None, sequence, axes.heads)
    specs = dict.fromkeys("qkv", tokens) | {"sinks": P(axes.heads)}

    def on_shard(x, mask):
        return sharded_attention(mask=mask, config=config, axes=axes, **x, **settings)

    def attend(x):
        of_bias = P(axes.heads, *[sequence] * (x["bias"].ndim == 3)) if "bias" in x else None
        split = {key: (specs | {"bias": of_bias})[key] for key in x}
        specs_in, specs_out = (split, P(*tokens[:2])), (tokens, tokens)
        return jax.shard_map(on_shard, mesh=mesh, in_specs=specs_in, out_specs=specs_out)(x, mask)

    return attend


def parts(results, gradients) -> dict[str, np.ndarray]:
    out, lse = results
    found = {"out": out, "lse": jnp.where(jnp.isfinite(lse), lse, 0)}
    found |= {f"d_{name}": gradient for name, gradient in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "name", "form"), PAIRS)
def test_every_feature_everywhere(feature, name, form):
    settings = dict(FEATURES[feature])
    size, window, rate = (settings.pop(key, None) for key in ("size", "window", "dropout"))
    learnt = {key: settings.pop(key) for key in ("sinks", "bias") if key in settings}
    mask, kept = mask_of(window), kept_by(KEY, rows=ROWS) if rate else None
    shapes = {"q": (HEADS, SIZE), "k": (KV_HEADS, SIZE), "v": (KV_HEADS, size or SIZE), "out": (HEADS, size or SIZE)}
    drawn = {key: normal(ROWS, LENGTH, *shape) for key, shape in shapes.items()}
    d_lse = np.where((np.asarray(mask.q_segment) >= 0)[..., None], normal(ROWS, LENGTH, HEADS), 0)
    options = settings | {"return_lse": True} | ({"dropout": (RATE, KEY)} if rate else {})
    ours = attention_on(name, form, mask, **options)
    dense = partial(attention, mask=mask, config=AttentionConfig("dense"), **options)
    for dtype in (jnp.float32, jnp.bfloat16):
        d_out, *arrays = (jnp.asarray(drawn[key], dtype) for key in ("out", *"qkv"))
        x = dict(zip("qkv", arrays, strict=True)) | learnt
        with jax.enable_x64(True):
            of = partial(reference, mask=mask, kept=kept, window=window, **settings)
            exact, gradients = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), y) for y in (x, (d_out, d_lse)))
            expected = parts(*run(lambda x, of=of: of(**x), exact, gradients))
        got = parts(*run(ours, x, (d_out, d_lse)))
        own = parts(*run(lambda x: dense(**x), x, (d_out, d_lse))) if dtype == jnp.bfloat16 else None
        for part, right in expected.items():
            error, largest = np.abs(got[part] - right).max(), np.abs(right).max()
            allowed = 1e-5 * max(largest, 1e-3)
            if own is not None:
                allowed = 2**-8 if part == "lse" else 2 * np.abs(own[part] - right).max() + 1e-6 * largest
            assert error <= allowed, f"{part}, {jnp.dtype(dtype).name}"
