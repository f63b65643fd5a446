"""Texts for byte-level associative recall, of the form of line retrieval (LongChat, Li et al. 2023).

Every line gives the value of a key, and is followed by a question about any line so far, with its answer:

    AB7 / ?AB7 / CDk / ?AB7 / EF0 / ?CDk / ...        / is a newline; A, B, C ... are any of 128 bytes
"""

from typing import NamedTuple

import numpy as np

from rlring.language_model import NO_TARGET

LETTERS = np.arange(128, 256, dtype=np.uint8)  # a key is a pair of letters
KEYS = len(LETTERS) ** 2
VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
LINE, QUESTION = len(b"AB7\n"), len(b"?AB7\n")
TOKENS = LINE + QUESTION  # bytes of a line and its question
ANSWER = LINE + len(b"?AB")  # offset of the answer from the start of the line


class Texts(NamedTuple):
    """bytes: the texts [B, T+1]. answers: the targets [B, T], the next byte where it is an answer, else NO_TARGET."""

    bytes: np.ndarray
    answers: np.ndarray


def texts(seed: int, update: int, rows: int, lines: int) -> Texts:
    """Returns the `rows` texts of `lines` lines of an update, a pure function of the arguments."""
    made = [_text(np.random.default_rng((seed, update, row)), lines) for row in range(rows)]
    whole = np.pad(np.stack(made).astype(np.int32), ((0, 0), (0, 1)), constant_values=ord("\n"))
    is_answer = np.arange(1, lines * TOKENS + 1) % TOKENS == ANSWER
    return Texts(whole, np.where(is_answer, whole[:, 1:], NO_TARGET))


def _text(random: np.random.Generator, lines: int) -> np.ndarray:
    keys = np.stack(np.divmod(random.choice(KEYS, lines, replace=False), len(LETTERS)), 1)
    values = VALUES[random.integers(0, len(VALUES), (lines, 1))]
    asked = random.integers(0, np.arange(lines) + 1)  # any line so far

    def letter(of: bytes) -> np.ndarray:
        return np.full((lines, 1), ord(of), np.uint8)

    line = [LETTERS[keys], values, letter(b"\n")]
    question = [letter(b"?"), LETTERS[keys[asked]], values[asked], letter(b"\n")]
    return np.concatenate([*line, *question], 1).ravel()
