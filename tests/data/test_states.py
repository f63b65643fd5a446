"""Many states at once: the bits of one after the other, of rewards, of observations and of whole episodes."""

from itertools import product

import numpy as np
import pytest

from data.collect import roll_out
from data.dmc import make
from data.open_loop import can_play
from data.policies import POLICIES
from data.states import PAID_AT_ONCE, SHOWN_AT_ONCE
from data.tasks.catalogue import task_names

QUICK = (
    "cheetah-flip",
    "point_mass-hard",
    "point_mass_maze-reach_top_left",
    "quadruped-jump",
    "walker-flip",
    "walker-run",
)


def marked(tasks):
    return [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in sorted(tasks)]


def some_states(environment, count):
    """Where random actions lead, each state thrown about further, so that every branch of a reward is met."""
    random, states, actions = np.random.default_rng(0), [], []
    for index in range(count):
        if index % 20 == 0:
            environment.reset(seed=index)
        actions.append(random.uniform(-1, 1, environment.action_space.shape[0]).astype(np.float32))
        state = environment.step(actions[-1])[-1]["physics"]
        states.append(state + random.normal(scale=(index % 5) * 0.5, size=state.size))
    return np.array(states), np.array(actions)


@pytest.mark.parametrize("task", marked(PAID_AT_ONCE))
def test_rewards_are_those_of_one_state_after_the_other(task, monkeypatch):
    environment = make(task)
    states, actions = some_states(environment, 60)
    states, actions = np.tile(states, (18, 1))[:1001], np.tile(actions, (18, 1))[:1001]  # more than go at once
    for taken, count in product((actions, None), (1, 1001)):
        at_once = environment.rewards_at(states[:count], None if taken is None else taken[:count])
        with monkeypatch.context() as patch:
            patch.setattr("data.states.PAID_AT_ONCE", frozenset())
            one_by_one = environment.rewards_at(states[:60], None if taken is None else taken[:60])
        np.testing.assert_array_equal(at_once[:60], one_by_one[:count])
        assert at_once.shape == (count,)
    assert len(set(one_by_one.tolist())) > 1


@pytest.mark.parametrize("task", marked(SHOWN_AT_ONCE))
def test_a_whole_episode_is_the_one_of_its_steps(task, monkeypatch):
    """Observations, rewards, states and extras; from several seeds, and with every policy that plans."""
    assert can_play(task)
    environment = make(task, episode_steps=60)
    for index, policy in enumerate(("uniform", "repeat", "pink")):
        whole = roll_out(environment, policy, 0, index)
        with monkeypatch.context() as patch:
            patch.setattr("data.collect.can_play", lambda task: False)
            stepped = roll_out(environment, policy, 0, index)
        for name in ("observation", "action", "reward", "discount", "physics"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(stepped, name), err_msg=name)
        assert whole.extras.keys() == stepped.extras.keys()
        for key, values in whole.extras.items():
            np.testing.assert_array_equal(values, stepped.extras[key])
        assert whole.source == stepped.source


def test_the_tasks_exist_and_keep_going():
    assert set(task_names()) >= PAID_AT_ONCE | SHOWN_AT_ONCE
    assert not can_play("quadruped-walk"), "its observation holds forces, which follow from contacts"
    assert {"uniform", "repeat", "pink"} <= POLICIES.keys()
