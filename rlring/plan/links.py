"""When the link hides the ring: how many tokens a device needs so that a hop computes longer than its keys travel.

Ring Attention (2310.01889, section 3 and Table 2). In a hop c queries meet c keys: 4 N H c^2 operations in the forward,
while 2 K H c numbers of two bytes travel, so the transfer is hidden from c = (K / N) * F / B tokens a device, where F
are operations a second and B bytes a second one way. Batch, head size and the number of devices cancel.

What the paper assumes, and what of it holds here:

- compute and link both run at their full rate. At half the peak half the tokens are enough, at half the link twice;
- as many key/value heads as query heads, K = N. Grouped heads cut the traffic, and c, by N / K;
- every query sees every key. Under a causal mask in the zigzag order a hop computes half of that: twice the tokens;
- the forward alone. Our backward computes 10 N H c^2 operations while keys, values and, in float32, their gradients
  travel: 1.2 times the tokens in bfloat16;
- nothing but keys and values travels. Their positions and segments are 8 bytes a token here, which we neglect too;
- for TPUs, all links of a chip at once. A hop goes to one neighbour, over one link of the torus; NVLink behind a switch
  gives one neighbour all of its bandwidth.

The "sequence" of Table 2 is 6 c: the six blocks that a device holds at once. It is about memory; hops hide from c on.
"""

from typing import NamedTuple

NUMBER_BYTES = 2  # bfloat16, as the peaks below
GRADIENT_BYTES = 4  # gradients of keys and values travel in float32
BLOCKS_HELD = 6  # of c tokens each, on a device: Table 1


class Link(NamedTuple):
    """How fast a device computes, and sends to the next one."""

    device: str
    name: str
    flops: float  # dense bfloat16 peak, operations a second
    bandwidth: float  # bytes a second, one way
    source: str


# As the paper has them. Its InfiniBand row divides 312 by 12.5 to 24.5 (it is 24.96); the other figures are exact.
TABLE_2 = (
    # and NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950): 312 TFLOPS bfloat16, NVLink 600 GB/s.
    Link("A100", "NVLink", 312e12, 300e9, "Table 2, datasheet"),
    Link("A100", "InfiniBand", 312e12, 12.5e9, "Table 2"),
    Link("TPU v3", "ICI", 123e12, 112e9, "Table 2"),
    Link("TPU v4", "ICI", 275e12, 268e9, "Table 2"),
    Link("TPU v5e", "ICI", 196e12, 186e9, "Table 2"),
)

# NVIDIA quotes NVLink in both directions together, and peaks of Hopper with sparsity: both are halved here. Google
# quotes ICI in both directions and over all ports together: one port, one way, is 1 / (2 * ports) of it.
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
    """Returns the tokens a device from which on the transfer of a hop takes no longer than its compute.

    The defaults are the paper's block c = F / B. peak_share is the part of the peak that the compute reaches.
    """
    # For c = 1, and without the head size, which is in both.
    numbers = 2 * kv_heads
    travelling = numbers * (NUMBER_BYTES + GRADIENT_BYTES) if is_backward else numbers * NUMBER_BYTES
    operations = (10 if is_backward else 4) * heads * (0.5 if is_causal else 1.0)
    return travelling / link.bandwidth * link.flops * peak_share / operations


def links_table(heads: int = 1, kv_heads: int = 1) -> str:
    """Returns the Markdown table of all links, in thousands of tokens a device."""
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
