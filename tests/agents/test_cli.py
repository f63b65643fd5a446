"""How commands end: every error has a line of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from agents.cli import ConfigError, run
from data import DataError
from rlring import UsageError


@pytest.mark.parametrize("error", [ConfigError("wrong"), DataError("wrong"), UsageError("wrong"), OSError(28, "full")])
def test_an_error_does_not_stick_to_a_progress_bar(capsys, error):
    def body():
        for _ in tqdm(range(3)):
            raise error

    assert run(body) == 2
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("error: ")
    assert printed.count("\nerror: ") == 1


@pytest.mark.parametrize("ask", [lambda: jnp.zeros((2**40,)), lambda: np.zeros((2**50,))], ids=["jax", "numpy"])
def test_memory_that_is_not_there_is_one_line(capsys, ask):
    assert run(lambda: jax.block_until_ready(ask())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the memory is full (")
    assert error.count("\n") == 1


def test_an_interrupt_has_a_line_of_its_own_too(capsys):
    bar = tqdm(total=3)

    def body():
        bar.update()
        raise KeyboardInterrupt

    assert run(body) == 130
    assert "\ninterrupted; " in capsys.readouterr().err
