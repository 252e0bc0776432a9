"""Step times from a model's shape and a hardware sheet alone.

Each matrix product takes the larger, softly, of its arithmetic and its reading of weights; then
come activations, two all-reduces a layer under tensor parallelism, attention over pairs, and KV
read a token of context. The sheet's eight coefficients scale the terms. Nothing here was timed:
`PhaseLatency.origin` says whose measurements the coefficients come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import Hardware
from .model_shape import ModelShape
from .phase_latency import KnotStepTime, Limits, NoLatency, Phase, PhaseLatency

SOFTNESS = 4.0  # of the larger of two: (x^4 + y^4)^(1/4), 19% above either where they are equal
ACTIVATION_BYTES = 2.0
KNOTS = tuple(
    sorted({int(2 ** (i / 2)) for i in range(31)} | {96, 160, 192, 224, 320, 384, 448})
)  # 1 to 32,768
NETWORK_HOP_S = 20e-6  # from node to node, before the first byte; assumed
HOP_S = 10e-6  # to hand a stage's activations on, before the first byte


def matrix_s(
    tokens: float, reads: float, weights: float, weight_bytes: float, hardware: Hardware
) -> float:
    """A product of `tokens` rows with `weights` parameters, of which `reads` come from memory."""
    shares = hardware.coefficients
    compute_s = 2 * tokens * weights / (hardware.flops * shares.matmul)
    read_s = reads * weight_bytes / (hardware.memory_bandwidth * shares.weight_read)
    return (compute_s**SOFTNESS + read_s**SOFTNESS) ** (1 / SOFTNESS)


def layer_s(shape: ModelShape, tokens: float, tensor_parallel: int, hardware: Hardware) -> float:
    """Mean over the layers, on one device, without attention's own products and all-reduces."""
    tp = tensor_parallel
    widths = shape.num_heads + 2 * max(shape.num_kv_heads, min(tp, shape.num_heads))
    heads = shape.head_dim * shape.hidden / tp
    products = [
        (tokens, widths * heads, widths * heads),
        (tokens, shape.num_heads * heads, shape.num_heads * heads),
    ]
    dense = 1 - shape.moe_layers / shape.num_layers
    width = shape.intermediate if dense else shape.experts_per_token * shape.expert_intermediate
    mlp = shape.hidden * shape.intermediate / tp * dense
    if mlp:
        products += [(tokens, n * mlp, n * mlp) for n in (shape.mlp_matrices - 1, 1)]
    if shape.experts:
        share = (1 - dense) / tp
        expert = shape.expert_params * share
        read = shape.touched_experts(tokens) * expert
        products.append((tokens, read, shape.experts_per_token * expert))
        shared = shape.mlp_matrices * shape.hidden * shape.shared_intermediate * share
        if shared:
            products.append((tokens, shared, shared))
    seconds = sum(matrix_s(t, r, w, shape.weight_bytes, hardware) for t, r, w in products)
    row = ACTIVATION_BYTES * (
        12 * shape.hidden + 3 * (width + shape.num_heads * shape.head_dim) / tp
    )
    traffic_s = tokens * row / (hardware.memory_bandwidth * hardware.coefficients.weight_read)
    return seconds + traffic_s + hardware.coefficients.layer_s


def all_reduce_s(
    num_bytes: float, tensor_parallel: int, hardware: Hardware, domain: int = 0
) -> float:
    """A ring over `tensor_parallel` devices: every one sends 2(n − 1)/n of the bytes.

    `domain`: devices that reach each other at full speed, 0 for all. A ring that leaves it crosses
    the network, over the ports of all of its devices there at once.
    """
    if tensor_parallel == 1:
        return 0.0
    shares, width_s = hardware.coefficients, hardware.link_bandwidth
    fixed_s = shares.all_reduce_s
    if domain and tensor_parallel > domain:
        width_s = min(width_s, domain * hardware.network_bandwidth)
        fixed_s += 2 * (-(-tensor_parallel // domain) - 1) * NETWORK_HOP_S
    sent = 2 * (tensor_parallel - 1) / tensor_parallel * num_bytes
    return fixed_s + sent / (width_s * shares.all_reduce)


@dataclass(frozen=True, kw_only=True, slots=True)
class RooflineLatency:
    """Step times of one shape on one kind of hardware. Is a `LatencySource`."""

    shape: ModelShape
    hardware: Hardware
    domain: int = 0  # devices that reach each other at full speed; 0: all

    def phase(
        self, phase: Phase, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> PhaseLatency:
        """Any phase: prefill and decode differ in their features only."""
        if not self.shape.divides(tensor_parallel, pipeline_parallel):
            raise NoLatency(
                f"{self.shape.name} at tensor parallel {tensor_parallel}, "
                f"pipeline parallel {pipeline_parallel}",
                f"{self.shape.num_heads} heads and {self.shape.num_layers} layers do not divide",
                "use divisors of both",
            )
        stages = tuple(
            self._stage(tensor_parallel, pipeline_parallel, i) for i in range(pipeline_parallel)
        )
        return PhaseLatency(
            hardware=self.hardware.name,
            model=self.shape.name,
            phase=phase,
            tensor_parallel=tensor_parallel,
            stages=stages,
            limits=Limits(new_tokens=KNOTS[-1], decode_rows=KNOTS[-1]),
            origin=f"computed; its coefficients: {self.hardware.origin['coefficients']}",
        )

    def _stage(self, tp: int, pp: int, number: int) -> KnotStepTime:
        shape, hardware, shares = self.shape, self.hardware, self.hardware.coefficients
        layers = shape.num_layers / pp
        hidden_bytes = ACTIVATION_BYTES * shape.hidden
        last = number == pp - 1
        head = shape.vocab * shape.hidden / tp if last else 0.0
        head_s = head * shape.weight_bytes / (hardware.memory_bandwidth * shares.weight_read)
        curve = []
        for tokens in KNOTS:
            hop_s = 0.0 if last else self._hop_s(tokens * hidden_bytes, tp, pp, number)
            one_s = layer_s(shape, tokens, tp, hardware)
            one_s += 2 * all_reduce_s(tokens * hidden_bytes, tp, hardware, self.domain)
            curve.append(shares.step_s / pp + layers * one_s + head_s + hop_s)
        copies = max(1, tp // shape.num_kv_heads)
        kv = shape.kv_bytes_per_token * copies / tp / pp
        pair = 4 * layers * shape.num_heads * shape.head_dim / tp  # two products, two flops each
        return KnotStepTime(
            KNOTS,
            curve,
            attention_s=pair / (hardware.flops * shares.attention),
            decode_row_s=2 * head / (hardware.flops * shares.matmul),
            decode_context_s=kv / (hardware.memory_bandwidth * shares.kv_read),
        )

    def _hop_s(self, num_bytes: float, tp: int, pp: int, number: int) -> float:
        """Activations to the next stage, each device to its counterpart. As many stages as a
        domain holds lie in one; between domains the network carries them."""
        within = self.domain // tp or 1
        if self.domain and tp * pp > self.domain and (number + 1) % within == 0:
            return NETWORK_HOP_S + num_bytes / self.hardware.network_bandwidth
        return HOP_S + num_bytes / self.hardware.link_bandwidth
