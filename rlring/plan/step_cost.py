"""Operations and traffic of a device in a training step, computed from the shapes; the share of hidden traffic."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlring.language_model import LanguageModelConfig
from rlring.plan.hlo_schedule import Transfer
from rlring.plan.links import GRADIENT_BYTES, NUMBER_BYTES, Link
from rlring.remat import Remat


@dataclass(frozen=True)
class Request:
    """The model, cluster, mesh and batch of a plan."""

    model: str  # a preset of rlring.language_model
    topology: str  # see topology_devices
    tokens: int  # of one sequence
    data: int
    ring: int
    ulysses: int
    rows: int  # sequences in a batch
    remat: Remat


@dataclass(frozen=True)
class StepCost:
    """Operations and traffic of a device in a training step, computed from the shapes.

    Fields with the names of fields of `Plan` have the same meaning.
    """

    parameters: int
    flops: float
    computed_flops: float
    ring_bytes: float
    gather_bytes: float
    hop_flops: float  # of one ring step of the forward, with a causal mask in zigzag order
    hop_bytes: float  # keys and values sent in one ring step

    @classmethod
    def of(cls, config: LanguageModelConfig, request: Request, parameters: int) -> "StepCost":
        model = config.transformer
        D, N, K, H, F = model.sizes
        layers, tokens = model.layers, request.rows * request.tokens
        devices = request.data * request.ring * request.ulysses
        matrices = layers * (D * H * (2 * N + 2 * K) + 3 * D * F)
        again = {"none": (0, 0), "attention": (1, 0), "all": (1, 1), "offload": (1, 1)}[request.remat]
        dense = 2 * tokens * matrices
        head = 2 * tokens * D * config.vocabulary
        attended = layers * request.rows * 4 * N * H * request.tokens**2 / 2
        flops = 3 * (dense + head) + 3.5 * attended
        # The backward recomputes the tiled loss and the blocks of attention under every remat policy.
        computed = flops + head + again[0] * dense + again[1] * attended
        # During attention a device holds c tokens, for its share of the heads (Ulysses copies heads if there are few).
        c = request.rows / request.data * request.tokens / request.ring
        numbers = 2 * c * max(K, request.ulysses) / request.ulysses * H
        hops = request.ring - 1
        hop = numbers * NUMBER_BYTES
        # Gradients take one step more than keys, to return to the device that holds the keys.
        gradients = (hops + 1 if hops else 0) * numbers * GRADIENT_BYTES
        ring = layers * (hops * hop * (2 + again[1]) + gradients)
        gathers = parameters * NUMBER_BYTES * (1 - 1 / devices) * (3 if model.fsdp else 0)
        hop_flops = 4 * N / request.ulysses * H * c * request.tokens / request.ring / 2
        return cls(parameters, flops / devices, computed / devices, ring, gathers, hop_flops, hop)

    def hidden_share(self, link: Link, transfers: Sequence[Transfer]) -> float:
        """Returns the share of the ring's communication time that is hidden behind the compute of its steps.

        `transfers` are the ring's permutes in the compiled program; only those that it schedules during compute can be
        hidden.
        """
        if not transfers:
            return 1.0
        forward_s, keys_s = self.hop_flops / link.flops, self.hop_bytes / link.bandwidth
        gradients_s = keys_s * GRADIENT_BYTES / NUMBER_BYTES

        def share(which) -> float:
            # A long ring is a loop inside the loop over layers, except for its first and last steps.
            which = [x for x in which if "/while/" in x.source.rpartition("shard_map")[2]] or list(which)
            sent = sum(x.bytes for x in which)
            return sum(x.bytes for x in which if x.is_hidden) / sent if sent else 1.0

        forward = share([x for x in transfers if not x.is_backward]), keys_s, forward_s
        backward = share([x for x in transfers if x.is_backward]), keys_s + gradients_s, 2.5 * forward_s
        hidden = sum(min(scheduled * sent, compute) for scheduled, sent, compute in (forward, backward))
        return hidden / (forward[1] + backward[1])
