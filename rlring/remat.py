"""Rematerialisation policies of TransformerConfig.remat: what the backward pass recomputes."""

from collections.abc import Callable
from typing import Literal

import jax

from rlring.errors import UsageError
from rlring.sharding import GATHERED

Remat = Literal["none", "attention", "all", "offload"]
BLOCK_INPUT = "block_input"
HOST = "pinned_host"


def checkpointed(
    layer: Callable, remat: Remat, *, fsdp: bool, device: jax.Device | None, static_argnums=()
) -> Callable:
    """Returns the layer with a rematerialisation policy for its backward pass.

    "none" keeps all activations, but no gathered weights. "attention" keeps the outputs of attention, so that the ring
    runs once. "all" keeps only the input of the block. "offload" is like "all", and moves this input to the memory of
    the host.

    Raises:
        UsageError: an unknown policy, or "offload" on a CPU.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none" if not fsdp:
            return layer
        case "none":
            policy = policies.save_anything_except_these_names(GATHERED)
        case "attention":
            policy = policies.save_only_these_names("attention_out", "attention_lse")
        case "all":
            policy = policies.nothing_saveable
        case "offload":
            _check_host_memory(device or jax.devices()[0])
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[BLOCK_INPUT],
                offload_src="device",
                offload_dst=HOST,
            )
        case _:
            raise UsageError(f"there is no remat policy {remat!r}. Choose one of none, attention, all, offload.")
    return jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=static_argnums)


def _check_host_memory(device: jax.Device) -> None:
    if device.platform == "cpu":
        raise UsageError(
            "remat 'offload' moves the inputs of blocks from the device to its host; on a CPU the two are the same "
            "memory. Use remat 'all'."
        )
