"""Computes whether a model fits a cluster: python -m rlring.plan --model 3b --topology v4:8x8x16 --tokens 16777216

Compiles the whole training step (forward, backward, AdamW, FSDP, remat) with the cluster's compiler, which does not
need the cluster. Prints a Markdown table of memory, operations and traffic per device. Progress is on stderr.

Memory, and whether a hop (one step of the ring) is sent during computation, come from the compiler. Times come from a
model with peak compute and one link of the torus (`links`), so the share of hidden communication is a prediction.
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
