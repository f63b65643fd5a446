"""Computes how many tokens per device the ring needs so that communication is hidden behind computation.

Ring Attention (2310.01889, section 3 and Table 2). In a hop (one step of the ring) a device computes attention of its c
queries over c keys, 4 N H c^2 operations in the forward pass, and sends 2 K H c numbers of two bytes. So the transfer
is hidden if each device has at least c = (K / N) * F / B tokens, where F is operations per second and B is bytes per
second in one direction. Batch, head size and the number of devices cancel.

The paper's assumptions, and how they hold here:

- Compute and link run at their full rate. At half the compute, half the tokens are enough; at half the bandwidth, twice
  as many are needed.
- There are as many key/value heads as query heads, K = N. Grouped heads reduce the traffic, and c, by N / K.
- Every query sees every key. With a causal mask in zigzag order a hop computes half as much: twice the tokens.
- Only the forward pass counts. The backward of rlring computes 10 N H c^2 operations and sends keys, values and, in
  float32, their gradients: 1.2 times the tokens in bfloat16.
- Only keys and values are sent. Here 8 bytes per token of positions and segments are sent too, and are neglected.
- A TPU uses all links of a chip at once. Here a hop goes to one neighbour, over one link of the torus. NVLink behind a
  switch gives one neighbour its whole bandwidth.

The "sequence" of Table 2 is 6 c, because a device holds six blocks at once. It concerns memory: c tokens are enough to
hide a hop.
"""

from typing import NamedTuple

NUMBER_BYTES = 2  # bfloat16, like the peaks below
GRADIENT_BYTES = 4  # gradients of keys and values are sent in float32
BLOCKS_HELD = 6  # blocks of c tokens that a device holds: Table 1


class Link(NamedTuple):
    """The compute rate of a device and the bandwidth of its link to the next device."""

    device: str
    name: str
    flops: float  # dense bfloat16 peak, operations per second
    bandwidth: float  # bytes per second in one direction
    source: str


# The figures of the paper. Its InfiniBand row gives 312 / 12.5 as 24.5 (it is 24.96); the other figures are exact.
TABLE_2 = (
    # and NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950): 312 TFLOPS bfloat16, NVLink 600 GB/s.
    Link("A100", "NVLink", 312e12, 300e9, "Table 2, datasheet"),
    Link("A100", "InfiniBand", 312e12, 12.5e9, "Table 2"),
    Link("TPU v3", "ICI", 123e12, 112e9, "Table 2"),
    Link("TPU v4", "ICI", 275e12, 268e9, "Table 2"),
    Link("TPU v5e", "ICI", 196e12, 186e9, "Table 2"),
)

# NVIDIA states NVLink bandwidth as the sum of both directions, and peaks of Hopper with sparsity: both are halved here.
# Google states ICI bandwidth as the sum of both directions and all ports: one port in one direction has 1 / (2 * ports)
# of it.
DATASHEETS = (
    # NVIDIA DGX A100 datasheet: eight ConnectX-6, 200 Gb/s HDR each, for eight GPUs.
    Link("A100", "InfiniBand HDR", 312e12, 25e9, "datasheet"),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOPS bfloat16 with sparsity, NVLink 900 GB/s.
    Link("H100", "NVLink", 989e12, 450e9, "datasheet"),
    # NVIDIA DGX H100 datasheet: eight ConnectX-7, 400 Gb/s NDR each, for eight GPUs.
    Link("H100", "InfiniBand NDR", 989e12, 50e9, "datasheet"),
    # NVIDIA H200 datasheet, SXM: compute and NVLink as the H100.
    Link("H200", "NVLink", 989e12, 450e9, "datasheet"),
    # NVIDIA DGX H200 datasheet: network as the DGX H100.
    Link("H200", "InfiniBand NDR", 989e12, 50e9, "datasheet"),
    # cloud.google.com/tpu/docs/v3: 123 TFLOPs. Links: 4 at 70 GB/s, Jouppi et al. 2304.01433, Table 4.
    Link("TPU v3", "one ICI link", 123e12, 70e9, "ISCA 2023"),
    # cloud.google.com/tpu/docs/v4: 275 TFLOPs. Links: 6 at 50 GB/s, Jouppi et al. 2304.01433, Table 4.
    Link("TPU v4", "one ICI link", 275e12, 50e9, "ISCA 2023"),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 400 GB/s over 4 ports.
    Link("TPU v5e", "one ICI link", 197e12, 50e9, "datasheet"),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 1,200 GB/s; a 3D torus has 6 ports.
    Link("TPU v5p", "one ICI link", 459e12, 100e9, "datasheet"),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 800 GB/s over 4 ports.
    Link("TPU v6e", "one ICI link", 918e12, 100e9, "datasheet"),
)


def hidden_from(
    link: Link,
    *,
    heads: int = 1,
    kv_heads: int = 1,
    peak_share: float = 1.0,
    is_causal: bool = False,
    is_backward: bool = False,
) -> float:
    """Returns the smallest number of tokens per device with which a hop's transfer takes no longer than its compute.

    The defaults give the paper's block c = F / B. `peak_share` is the share of the peak that the compute reaches.
    """
    # Both for c = 1 and without the head size, which cancels.
    numbers = 2 * kv_heads
    travelling = numbers * (NUMBER_BYTES + GRADIENT_BYTES) if is_backward else numbers * NUMBER_BYTES
    operations = (10 if is_backward else 4) * heads * (0.5 if is_causal else 1.0)
    return travelling / link.bandwidth * link.flops * peak_share / operations


def links_table(heads: int = 1, kv_heads: int = 1) -> str:
    """Returns a Markdown table of `hidden_from` for all links, in thousands of tokens per device."""
    columns = "device", "link", "TFLOP/s", "GB/s one way", "block c", "sequence 6c", "causal forward", "causal backward"
    lines = [f"| {' | '.join(columns)} | source |", f"| --- | --- |{' ---: |' * 6} --- |"]
    for link in TABLE_2 + DATASHEETS:
        block = hidden_from(link, heads=heads, kv_heads=kv_heads)
        forward = hidden_from(link, heads=heads, kv_heads=kv_heads, is_causal=True)
        backward = hidden_from(link, heads=heads, kv_heads=kv_heads, is_causal=True, is_backward=True)
        tokens = " | ".join(f"{x / 1e3:.1f}k" for x in (block, BLOCKS_HELD * block, forward, backward))
        speeds = f"{link.flops / 1e12:.0f} | {link.bandwidth / 1e9:g}"
        lines.append(f"| {link.device} | {link.name} | {speeds} | {tokens} | {link.source} |")
    note = (
        f"Tokens a device from which a hop of the ring hides its transfer: bfloat16 at full peak, {heads} query heads "
        f"over {kv_heads} key/value heads. Block c and sequence 6c: Table 2 of 2310.01889, every query sees every key. "
        "Causal: the zigzag order."
    )
    return "\n".join([*lines, "", note])
