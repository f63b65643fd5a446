"""How fast attention is, and how much it holds: python -m rlring.bench [--schemes ring ...] [--lengths 4096 ...]

Prints a Markdown table; --peers instead one of other libraries beside ours over twelve masks, --traffic what the
compiled programs send, and when the links of known devices hide the ring. Progress is on stderr. `timing` says how it
is measured, `candidates` what, `peers` and `masks` beside whom and over what, `traffic` what is counted beside which
formula, `rlring.plan.links` what the model of the links assumes.
"""

from rlring.bench.command import main

__all__ = ["main"]
