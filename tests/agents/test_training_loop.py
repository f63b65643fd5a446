"""The loop alone: when it reads metrics, logs, saves and ends."""

import json

import pytest
from tqdm import tqdm

from agents.cli import Diverged
from agents.config import TrainConfig
from agents.training_loop import Loop, run_updates
from rlring.language_model import TrainState


@pytest.fixture
def run(tmp_path):
    """Gives a function `(losses, first=0, stop=None, ...)` that runs updates of these losses and returns what happened;
    the state counts them."""

    def make(losses, *, first=0, stop=None, **train):
        happened = []
        loop = Loop(
            tmp_path,
            TrainConfig(updates=len(losses), **train),
            batches=((update, losses[update]) for update in range(first, len(losses))),
            update=lambda state, loss: (TrainState(state.weights + 1, None), {"loss": loss}),
            loss="loss",
            log=lambda logged, bar: happened.append(("log", logged.update + 1, logged.metrics["loss"])),
            save=lambda done, state, loss: happened.append(("save", done, state.weights, loss)),
            stops=lambda done: done == stop,
        )
        with tqdm(disable=True) as bar:
            state, done = run_updates(loop, TrainState(first, None), first, bar)
        assert state.weights == done
        return done, happened

    return make


def test_what_is_logged_and_saved(run):
    done, happened = run([7.0, 6.0, 5.0, 4.0, 3.0], log_every=2, checkpoint_every=3)
    assert done == 5
    assert happened == [
        ("log", 2, 6.0),
        ("save", 3, 3, 6.0),  # of the first, the second and the third loss
        ("log", 4, 4.0),
        ("log", 5, 3.0),  # the last update is logged and saved whatever its number
        ("save", 5, 5, 3.5),
    ]


def test_it_goes_on_and_stops_where_it_is_asked_to(run):
    done, happened = run([9.0] * 9, first=4, stop=6, log_every=100, checkpoint_every=100)
    assert done == 6
    assert happened == [("log", 6, 9.0), ("save", 6, 6, 9.0)]


@pytest.mark.parametrize(("bad", "update", "saved"), [(0, 1, 0), (3, 4, 2)])
def test_what_is_no_number_is_never_saved(run, tmp_path, bad, update, saved):
    losses = [1.0] * 6
    losses[bad] = float("nan")
    good = f"its last good checkpoint is of update {saved}" if saved else "it has no checkpoint yet"
    with pytest.raises(Diverged, match=rf"loss is not a number after update {update} of .*\({good}\)"):
        run(losses, log_every=100, checkpoint_every=2)
    assert json.loads((tmp_path / "diverged.json").read_text()) == {"update": update, "what": "loss"}
