"""Does this config fit that cluster? python -m agents.plan CONFIG.toml --topology v4:4x4x4 [section.key=value ...]

Compiles the update of `agents.train` for the cluster, which need not be there, on chains of the config's stores
(missing ones are made first). It is `rlring.plan` for an agent.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from agents.agent_config import VALUE_KINDS
from agents.cli import ConfigError, run
from agents.config import Config, load
from agents.datasets import open_stores
from agents.registry import make_agent
from agents.train import describe
from agents.update import make_update, new_state
from data import ChainBatch
from rlring import make_mesh
from rlring.cli import Parser, check_json
from rlring.language_model import LanguageModelConfig
from rlring.plan import Plan, Request, StepCost, compiled_plan, publish, reported, topology_devices
from rlring.plan.topology import EXAMPLES
from rlring.sharding import TOKENS, state_sharding


def plan(config: Config, topology: str) -> Plan:
    """Returns the compiler's memory use and costs of an update.

    Operations are counted for the Transformer only, without the tokenizer and the action head.

    Raises:
        ConfigError: the agent is bc, value-based or recurrent, or the mesh of the config has another number of devices.
        UsageError: the topology does not exist.
    """
    lacking = {"recurrent": "attention", **dict.fromkeys(("bc", *VALUE_KINDS), "context")}.get(config.agent.kind)
    if lacking is not None:
        raise ConfigError(f"agent.kind '{config.agent.kind}' has no {lacking} to plan for. Plan for a transformer.")
    devices, sizes = topology_devices(topology), config.mesh
    if len(devices) != sizes.devices:
        raise ConfigError(
            f"the mesh of the config is {sizes.data} x {sizes.ring} x {sizes.ulysses} = {sizes.devices} devices; "
            f"{topology} has {len(devices)}. Add mesh.ring={len(devices) // (sizes.data * sizes.ulysses)}."
        )
    mesh = make_mesh(**sizes.model_dump(), devices=devices)
    with redirect_stdout(sys.stderr):  # progress goes to stderr, so that stdout holds the table only
        stores = open_stores(config.data)
    meta = describe(config, stores)
    agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, mesh)
    sampler, optimizer = agent.sampler(stores), agent.optimizer()

    shapes = jax.eval_shape(partial(new_state, agent, optimizer), jax.random.key(0))
    sharding = state_sharding(shapes, mesh, fsdp=config.model.fsdp)
    shapes = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, sharding)
    order = agent.timestep_order(sampler.timesteps)
    places = sampler.timesteps if order is None else len(order)

    def field(one: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = config.train.batch, places, *one.shape[2:]
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=NamedSharding(mesh, TOKENS))

    batch = ChainBatch(*map(field, sampler.sample(0, np.arange(1), np.arange(1))))
    update = make_update(agent, optimizer, mesh, sharding, accumulate=config.train.accumulate)
    request = Request(
        config.name,
        topology,
        places * agent.tokens_per_timestep,
        sizes.data,
        sizes.ring,
        sizes.ulysses,
        config.train.batch,
        config.model.remat,
    )
    transformer = LanguageModelConfig(0, config.model.transformer_config(rope_fraction=1.0))
    cost = StepCost.of(transformer, request, sum(x.size for x in jax.tree.leaves(shapes.weights)))
    return reported(request, lambda: compiled_plan(request, cost, update.lower(shapes, batch)))


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.plan", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.width=128")
    parser.add_argument("--topology", required=True, metavar="T", help=f"such as {', '.join(EXAMPLES)}")
    parser.add_argument("--json", type=Path, metavar="F", help="also write everything to this file")
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        check_json(arguments.json)
        config = load(Config, arguments.config, arguments.overrides)
        jax.config.update("jax_platforms", "cpu")  # nothing runs on devices: a local TPU is left alone
        publish([plan(config, arguments.topology)], ["python", "-m", "agents.plan", *argv], arguments.json)

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
