"""Measures time and memory of attention: python -m rlring.bench [--schemes ring ...] [--lengths 4096 ...]

Prints a Markdown table, and progress on stderr. With --peers it compares rlring with other libraries over twelve masks
instead. With --traffic it prints the bytes that compiled programs send, and when the links of known devices hide the
communication of the ring.

`timing` describes the measurement and `candidates` what is measured; `peers` and `masks` the other libraries and the
masks; `traffic` what is counted and the formulas; `rlring.plan.links` the assumptions about links.
"""

from rlring.bench.command import main

__all__ = ["main"]
