"""tasks: hidden goals seen from outside the simulator, and ExoRL's tasks on the suite's bodies."""

from pathlib import Path

import numpy as np
import pytest

from data.dmc import make
from data.environment_batch import EnvironmentBatch
from data.policies import POLICIES, controller
from data.tasks import goal_task, goal_task_names
from data.tasks.__main__ import main

DARK = ["point_mass-dark", "reacher-dark"]
MAPS = ["point_mass-map", "reacher-map"]


def test_goal_tasks_by_name():
    assert goal_task_names() == (*DARK, *MAPS)
    assert goal_task("point_mass-dark").name == "point_mass-dark"
    assert goal_task("walker-walk") is None


@pytest.mark.parametrize("name", DARK)
def test_the_goal_is_paid_and_never_shown(name: str):
    task = goal_task(name)
    here, there = EnvironmentBatch(name, 1), EnvironmentBatch(name, 1)
    rng = np.random.default_rng(0)
    first, second = task.sample_goal(rng), task.sample_goal(rng)
    np.testing.assert_array_equal(here.reset([3], first[None]), there.reset([3], second[None]))
    paid = []
    for _ in range(task.episode_steps):
        action = task.oracle(here.physics_states(), first)
        one, other = here.step(action), there.step(action)
        np.testing.assert_array_equal(one.observation, other.observation)
        np.testing.assert_array_equal(one.observation, here.physics_states().astype(np.float32))
        paid.append((one.reward[0], other.reward[0]))
        state = here.physics_states()[0]
        assert paid[-1] == (task.reward(state, first), task.reward(state, second))
    assert one.truncated[0]
    assert sum(p[0] for p in paid) > sum(p[1] for p in paid)


@pytest.mark.parametrize("name", DARK)
def test_a_goal_lasts_an_episode_and_the_next_one_is_drawn(name: str):
    environment = make(name)
    environment.reset(seed=0, options={"goal": [0.1, 0.1]})
    np.testing.assert_array_equal(environment.extras()["goal"], [0.1, 0.1])
    environment.reset(seed=0)
    drawn = environment.extras()["goal"]
    assert not np.array_equal(drawn, [0.1, 0.1])
    environment.reset(seed=0)
    np.testing.assert_array_equal(environment.extras()["goal"], drawn)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_the_dark_task_with_a_sign_in_sight(name: str):
    task = goal_task(name)
    dark, places = EnvironmentBatch(task.collected_on, 2), EnvironmentBatch(name, 2)
    goals, signs = np.full((2, 2), 0.1), np.eye(32)[:2]
    seen = places.reset([1, 2], goals, signs)
    np.testing.assert_array_equal(seen, np.hstack([dark.reset([1, 2], goals), signs]))
    for _ in range(task.episode_steps):
        action = task.oracle(dark.physics_states(), goals)
        want, got = dark.step(action), places.step(action)
        np.testing.assert_array_equal(got.observation, np.hstack([want.observation, signs]))
        np.testing.assert_array_equal(got.reward, want.reward)
    # Without a sign one is drawn, and the start is none the other.
    environment = make(name)
    first, second = (environment.reset(seed=seed)[0] for seed in (1, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[:-32], seen[0, :-32])
    assert np.linalg.norm(first[-32:]) == pytest.approx(32**0.5 / 2)
    assert not np.array_equal(environment.reset(seed=2)[0][-32:], first[-32:])


def test_reacher_kinematics_are_mujocos():
    environment = make("reacher-dark")
    for seed in range(5):
        environment.reset(seed=seed)
        environment.set_physics_state(np.random.default_rng(seed).uniform(-2.5, 2.5, 4))
        finger = environment._physics.named.data.geom_xpos["finger", ["x", "y"]]
        computed = goal_task("reacher-dark").hindsight_goal(environment.physics_state())
        np.testing.assert_allclose(computed, finger, atol=1e-9)


@pytest.mark.parametrize("name", DARK)
def test_everything_is_vectorised(name: str):
    task, rng = goal_task(name), np.random.default_rng(0)
    physics = rng.uniform(-0.2, 0.2, (5, 7, 4))
    goal = np.stack([task.sample_goal(rng) for _ in range(5)])
    reward = task.reward(physics, goal[:, None])
    action = task.oracle(physics, goal[:, None])
    hindsight = task.hindsight_goal(physics)
    assert (reward.shape, reward.dtype) == ((5, 7), np.float32)
    assert (action.shape, action.dtype) == ((5, 7, 2), np.float32)
    assert (hindsight.shape, hindsight.dtype) == ((5, 7, task.goal_size), np.float64)
    assert np.abs(action).max() <= 1
    for i in range(5):
        for j in range(7):
            assert reward[i, j] == task.reward(physics[i, j], goal[i])
            np.testing.assert_allclose(action[i, j], task.oracle(physics[i, j], goal[i]), atol=1e-6)
    np.testing.assert_array_equal(task.reward(physics, hindsight), 1.0)


def test_reward_at_the_edge_of_the_radius():
    task = goal_task("point_mass-dark")
    goal = np.array([0.1, 0.0])
    edge = np.array([[0.1 + task.radius - 1e-9, 0, 0, 0], [0.1 + task.radius + 1e-9, 0, 0, 0]])
    assert task.reward(edge, goal).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("name", "least", "most"), [("point_mass-dark", 7.0, 8.0), ("reacher-dark", 7.3, 8.5)])
def test_the_oracle_finds_every_goal(name: str, least: float, most: float):
    task = goal_task(name)
    batch = EnvironmentBatch(name, 100)
    batch.reset([(0, row) for row in range(100)])
    goals = np.stack([environment.extras()["goal"] for environment in batch.environments])
    total = np.zeros(100)
    for _ in range(batch.episode_steps):
        total += batch.step(task.oracle(batch.physics_states(), goals)).reward
    assert total.min() > 0
    assert least < total.mean() < most


def test_walker_flip_pays_walker_stand_scaled_by_the_turn():
    flip, stand = make("walker-flip"), make("walker-stand")
    standing = np.zeros(18)
    paid = []
    for turn in (0.0, 2.0, 20.0, -20.0):
        state = standing.copy()
        state[9 + 2] = turn  # the velocity of the joint that turns the torso
        paid.append(flip.rewards_at(state[None], None)[0] / stand.rewards_at(state[None], None)[0])
    assert paid[0] == pytest.approx(1 / 6)
    assert max(paid[1:]) > 1 / 6
    assert max(paid) == pytest.approx(1.0)
    assert min(paid) == pytest.approx(1 / 6)


def test_the_walls_of_the_maze_hold_and_its_start_follows_the_seed():
    environment = make("point_mass_maze-reach_top_right")
    starts = [environment.reset(seed=seed)[1]["physics"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    for start in starts:
        assert -0.29 <= start[0] <= -0.15
        assert 0.15 <= start[1] <= 0.29
    environment.set_physics_state(np.array([-0.15, 0.1, 0.0, 0.0]))
    for _ in range(300):
        *_, info = environment.step(np.array([1.0, 0.0]))
    assert -0.05 < info["physics"][0] < -0.02  # the wall is 0.04 m thick, the mass has a radius of 0.01 m
    # Around the wall, where 0.18 m of it end, the way is free.
    environment.set_physics_state(np.array([-0.15, 0.23, 0.0, 0.0]))
    for _ in range(300):
        *_, info = environment.step(np.array([1.0, 0.0]))
    assert info["physics"][0] > 0.15


# A task, a velocity or position of its body by index, and values of it with the rewards that ExoRL's formulas give.
EXORL = [
    ("cheetah-run_backward", 9, {-12.0: 1.0, -4.0: 0.4, 0.0: 0.0, 4.0: 0.0}),
    ("cheetah-walk", 9, {3.0: 1.0, 1.0: 0.5, 0.0: 0.0, -1.0: 0.0}),
    ("cheetah-walk_backward", 9, {-3.0: 1.0, -0.5: 0.25, 0.0: 0.0, 1.0: 0.0}),
    ("hopper-hop_backward", 7, {-2.5: 1.0, -1.5: 0.75, 0.5: 0.0}),
]


@pytest.mark.parametrize(("task", "index", "expected"), EXORL)
def test_speeds(task: str, index: int, expected: dict[float, float]):
    environment = make(task)
    state = np.zeros(environment.physics_state().size)
    for speed, reward in expected.items():
        state[index] = speed
        assert environment.rewards_at(state[None], None)[0] == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize(("domain", "index", "base"), [("cheetah", 11, 1.0), ("hopper", 9, 1.0)])
def test_flips_pay_the_turn_one_way_and_mirrored_the_other(domain: str, index: int, base: float):
    forward, backward = make(f"{domain}-flip"), make(f"{domain}-flip_backward")
    state = np.zeros(forward.physics_state().size)
    paid = []
    for turn in (-100.0, -1.0, 0.0, 1.0, 100.0):
        state[index] = turn
        paid.append([environment.rewards_at(state[None], None)[0] for environment in (forward, backward)])
    paid = np.array(paid)
    np.testing.assert_allclose(paid[:, 0], paid[::-1, 1], atol=1e-9)
    rising = paid[:, 0] if paid[-1, 0] > 0 else paid[:, 1]
    assert rising[:3].tolist() == [0.0, 0.0, 0.0]
    assert 0 < rising[3] < rising[4] == base


def test_quadruped_tasks():
    state = np.zeros(make("quadruped-stand").physics_state().size)
    state[2:4] = 5.0, 1.0  # 5 m up, upright
    assert make("quadruped-stand").rewards_at(state[None], None)[0] == pytest.approx(1.0)
    assert make("quadruped-jump").rewards_at(state[None], None)[0] == pytest.approx(1.0)
    assert make("quadruped-roll").rewards_at(state[None], None)[0] == pytest.approx(0.5)
    velocity = len(state) - 12 - 22  # positions, 22 velocities, 12 activations
    for direction in range(3):
        moving = state.copy()
        moving[velocity + direction] = -2.5
        assert make("quadruped-roll").rewards_at(moving[None], None)[0] == pytest.approx(1.0)
        assert make("quadruped-roll_fast").rewards_at(moving[None], None)[0] == pytest.approx(0.75)
    state[3:7] = 0.0, 1.0, 0.0, 0.0  # upside down
    assert make("quadruped-stand").rewards_at(state[None], None)[0] == pytest.approx(0.0)


def test_walker_spin_pays_the_turn_alone():
    environment = make("walker-spin")
    low, momentum = np.zeros(18), []
    low[0], low[1] = -1.0, 0.7  # near the floor, on its side: nothing of it stands
    for speed in (0.0, 1.0, 1000.0, -1000.0):
        state = low.copy()
        state[11] = speed
        environment.set_physics_state(state)
        momentum.append(environment._physics.named.data.subtree_angmom["torso"][1])
        paid = environment.rewards_at(state[None], None)[0]
        assert paid == pytest.approx(np.clip(momentum[-1] / 10, 0, 1), abs=1e-6)
    assert 0 < max(momentum[:2]) < 10 < max(momentum)


# Where the mass is, its velocity, and what the published formulas pay there.
MAZE = [
    ("loop", (-0.12, 0.12, 0.08, 0.08), 1.0),
    ("loop", (0.12, 0.12, 0.08, -0.08), 1.0),
    ("loop", (0.12, -0.12, -0.08, -0.08), 1.0),
    ("loop", (-0.12, -0.12, -0.08, 0.08), 1.0),
    ("loop", (-0.12, 0.12, -0.08, -0.08), 1 / 3),
    ("loop", (-0.12, 0.12, 0.055, 0.105), 2 / 3),
    ("loop", (-0.12, 0.12 + 0.03 * 2**0.5, 0.055, 0.055), 0.5),
    ("loop", (0.0, 0.0, 0.0, 0.0), 0.0),
    ("square", (0.0, 0.25, 0.05, 0.0), 0.5),
    ("square", (0.0, 0.25, -0.05, 0.0), 0.0),
    ("square", (0.25, 0.0, 0.0, -0.3), 1.0),
    ("square", (-0.25, 0.0, 0.0, 0.02), 0.2),
    ("square", (0.0, -0.25, -0.1, 0.0), 1.0),
    ("square", (0.25, 0.25, 0.1, -0.1), 0.0),
    ("square", (0.1, 0.1, 0.1, -0.1), 0.0),
    ("fast_slow", (0.0, 0.25, -0.045, 0.0), 1.0),
    ("fast_slow", (0.0, 0.25, -0.035, 0.0), 0.5),
    ("fast_slow", (0.0, 0.29, -0.045, 0.0), 0.0),
    ("fast_slow", (0.25, 0.0, 0.0, 0.095), 1.0),
    ("fast_slow", (0.25, 0.0, 0.0, 0.045), 0.0),
    ("fast_slow", (-0.25, 0.0, 0.0, -0.105), 0.5),
    ("fast_slow", (0.0, -0.25, 0.04, 0.0), 1.0),
    ("fast_slow", (0.25, 0.25, -0.045, 0.095), 0.0),
    ("reach_bottom_left_long", (-0.15, -0.15, 0.1, 0.0), 1.0),
    ("reach_bottom_left_long", (0.0, 0.25, 0.05, 0.0), 0.25),
    ("reach_bottom_left_long", (0.0, 0.25, -0.05, 0.0), -5.0),
    ("reach_bottom_left_long", (0.25, 0.1, 0.0, -0.5), 0.5),
    ("reach_bottom_left_long", (0.25, 0.1, 0.0, 0.5), -10.0),
    ("reach_bottom_left_long", (0.25, 0.25, 0.1, -0.1), 0.0),
]


@pytest.mark.parametrize("name", ["loop", "square", "fast_slow", "reach_bottom_left_long"])
def test_the_maze_of_td_jepa(name: str):
    states = np.array([state for task, state, _ in MAZE if task == name])
    paid = [reward for task, _, reward in MAZE if task == name]
    np.testing.assert_allclose(make(f"pointmass-{name}").rewards_at(states, None), paid, atol=1e-6)
    if name in ("loop", "square", "fast_slow"):
        np.testing.assert_allclose(make(f"point_mass_maze-{name}").rewards_at(states, None), paid, atol=1e-6)


def test_td_jepa_pays_from_further_away_than_exorl():
    # A gaussian that is 0.1 at one margin from the edge of the target, 0.015 m from its middle.
    for name, margin in (("point_mass_maze", 0.015), ("pointmass", 0.09)):
        distance = np.array([0.0, 0.015, 0.03, 0.105])
        states = np.stack([0.15 - distance, np.full(4, 0.15), *np.zeros((2, 4))], axis=1)
        outside = np.maximum(distance - 0.015, 0) / margin
        free, charged = (make(f"{name}-reach_top_right").rewards_at(states, a) for a in (None, np.ones((4, 2))))
        np.testing.assert_allclose(free, 0.1 ** (outside**2), atol=1e-6)
        np.testing.assert_allclose(charged, 0.8 * free, atol=1e-6)


def test_the_list_of_tasks(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "88 tasks" in said
    assert "flip* run spin* stand walk" in said
    assert all(f"  {policy} " in said for policy in POLICIES)
    assert main(["walker-wlak"]) == 2
    assert "did you mean 'walker-walk'" in capsys.readouterr().err
    assert main(["walker", "--check", "--episodes", "0"]) == 2
    assert capsys.readouterr().err == "error: --episodes must be 1 or more; got 0\n"


def test_the_check_of_tasks(capsys):
    assert main(["point_mass-dark", "point_mass-easy", "dog-fetch", "--check", "--episodes", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[0] == "| `point_mass` | dark | 4 | 2 | 4 | 16 | 0 |"
    assert rows[1] == "| `point_mass` | easy | 4 | 2 | 4 | 1000 | 0 |"
    assert rows[2].startswith("| `dog` | fetch | 232 | 38 | 210 | 1000 | no: it pays for the forces under the paws")


@pytest.mark.slow
def test_the_table_of_all_tasks_is_the_one_in_the_guide(capsys):
    assert main(["--check"]) == 0
    printed = capsys.readouterr().out
    assert printed in (Path(__file__).parents[2] / "docs/data.md").read_text()


@pytest.mark.parametrize(
    ("task", "least"),
    [("point_mass-hard", 500), ("reacher-hard", 700), ("pendulum-swingup", 500), ("cartpole-swingup", 700)],
)
def test_scripted_controllers_solve_their_task(task: str, least: float):
    environment = make(task)
    _, info = environment.reset(seed=0)
    control, total = controller(environment), 0.0
    for _ in range(environment.episode_steps):
        _, reward, _, _, info = environment.step(control(info["physics"]))
        total += reward
    assert total > least
