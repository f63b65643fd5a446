"""One rule for the scale of observations: what never, or hardly ever, moved in the data decides no action."""

import numpy as np
import pytest

from agents.agent import Scales
from agents.registry import make_agent
from agents.standardizer import LIMIT, Standardizer
from agents.train import describe
from data import TrajectoryStore
from data.store_writer import write_store


@pytest.mark.parametrize(("contact", "kind"), [(0.0, "agentic_transformer"), (0.0, "bc"), (1e-5, "bc")])
def test_a_sensor_that_never_moved_decides_no_action(tiny, dataset, tmp_path, contact, kind):
    """A touch sensor in data without (or with hardly any) touch, which then reads log1p(1 N)."""
    old, episodes = TrajectoryStore.open(dataset[1]), []
    for episode in range(40):
        one = old.trajectory(episode)
        one.observation[:, 0] = 0.0
        one.observation[:1, 0] = contact
        episodes.append(one)
    store = write_store(
        tmp_path / "touch.h5", episodes, task=old.task, source="test", goal="hindsight", keep_physics=True
    )
    config = tiny(f"agent.kind={kind}")
    scales = describe(config, [store]).scales
    if not contact:
        assert scales.observation_std[0] == 1.0
    assert make_agent(config, scales, 2, 16, None).graph is not None
    touch = np.asarray(Standardizer.of(scales)(np.array([np.log1p(1.0), 0, 0, 0], np.float32)))[0]
    assert 0 < touch <= (LIMIT if contact else 1.0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e10, -3e38, np.inf])
def test_any_number_stays_within_the_limit(value):
    one = Standardizer.of(Scales(np.array([0.5]), np.array([1e-5]), 1.0))
    assert np.abs(np.asarray(one(np.array([value], np.float32)))).max() <= LIMIT
