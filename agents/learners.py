"""The updates that agents.bench times: those of our Decision Transformer, and of Hugging Face's."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from agents.agent import Scales
from agents.config import Config, validate
from agents.optimizer import make_optimizer
from agents.registry import make_agent
from agents.update import make_update, new_state
from data import ChainBatch

OBSERVATION, ACTION = 24, 6  # sizes as of the walker
WIDTH, LAYERS = 128, 3
FEED_FORWARD = 344  # gated; as many weights as a plain feed-forward layer of 4 * 128: 3 * 344 = 8 * 129


class Learner(NamedTuple):
    name: str
    weights: int
    update: Callable[[], object]  # makes one update, and waits for it


def ours(tokens: str, window: int, batch: int) -> Learner:
    settings = {
        "name": "bench",
        "data": {"tasks": ["walker-walk"], "episodes": "none", "stores": ["none"]},
        "agent": {"kind": "decision_transformer", "tokens": tokens, "loss_on": "all"},
        "model": {"width": WIDTH, "layers": LAYERS, "heads": 1, "feed_forward": FEED_FORWARD},
        "train": {"batch": batch},
        "attention": {"scheme": "blockwise"},
    }
    config = validate(Config, settings, source="bench")
    scales = Scales(np.zeros(OBSERVATION), np.ones(OBSERVATION), 1.0)
    agent = make_agent(config, scales, ACTION, window, None)
    optimizer = make_optimizer(config)
    data = jax.device_put(_batch(window, batch))
    update = make_update(agent, optimizer)
    state = [new_state(agent, optimizer, jax.random.key(0))]
    weights = sum(leaf.size for leaf in jax.tree.leaves(state[0].weights))

    def once():
        state[0], metrics = update(state[0], data)
        return float(metrics["loss/action"])

    return Learner(f"rlring, {tokens}", weights, once)


def hugging_face(window: int, batch: int) -> list[Learner]:
    """Returns Hugging Face's Decision Transformer (three tokens per timestep), or [] if it is not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        print("torch or transformers is not installed: left out", file=sys.stderr)
        return []
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(0)
    shape = transformers.DecisionTransformerConfig(
        state_dim=OBSERVATION,
        act_dim=ACTION,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=1,
        max_ep_len=max(4096, window),
        n_positions=max(1024, 3 * window),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.DecisionTransformerModel(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    data = {name: torch.from_numpy(np.asarray(values)) for name, values in _batch(window, batch)._asdict().items()}
    attended = torch.ones(batch, window, dtype=torch.long)
    # The tables of position and token embeddings are not counted.
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(("wpe.weight", "wte.weight")))

    def once():
        predicted = model(
            states=data["observation"],
            actions=data["action"],
            rewards=data["reward"][..., None],
            returns_to_go=data["return_to_go"][..., None],
            timesteps=data["step"].long(),
            attention_mask=attended,
        ).action_preds
        loss = torch.square(predicted - data["action"]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return [Learner("Hugging Face", weights, once)]


def _batch(window: int, batch: int) -> ChainBatch:
    """Returns a batch of random numbers. The cost of an update does not depend on the values."""
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return rng.normal(size=(batch, window, *sizes)).astype(np.float32)

    places = np.broadcast_to(np.arange(window, dtype=np.int32), (batch, window)).copy()
    zeros = np.zeros((batch, window), np.float32)
    return ChainBatch(
        observation=normal(OBSERVATION),
        action=np.tanh(normal(ACTION)),
        reward=normal(),
        return_to_go=normal(),
        previous_action=np.tanh(normal(ACTION)),
        previous_reward=normal(),
        step=places,
        last=zeros + 1,
        position=places,
        segment=np.zeros_like(places),
    )
