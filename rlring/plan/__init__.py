"""Does this model fit that cluster? python -m rlring.plan --model 3b --topology v4:8x8x16 --tokens 16777216

Compiles the whole training step (forward, backward, AdamW, FSDP, remat) with the compiler of the cluster, without the
cluster, and prints a Markdown table: memory of a device, work, traffic. Progress is on stderr.

Memory is the compiler's word, and so is whether a hop is sent while it computes. Times are a model: peak compute and
one link of the torus (`links`), so the share of hidden communication is a prediction.
"""

from rlring.plan.command import main, publish, reported
from rlring.plan.compiled import Plan, compiled_plan, plan, search
from rlring.plan.step_cost import Request, StepCost
from rlring.plan.topology import topology_devices

__all__ = [
    "Plan",
    "Request",
    "StepCost",
    "compiled_plan",
    "main",
    "plan",
    "publish",
    "reported",
    "search",
    "topology_devices",
]
