"""Mean waiting times in closed form: Poisson arrivals, one constant service time (M/D/1).

The oracle that simulations and recurrences are tested against. (As the start of a search for
goodput `max_rate_rps` was tried: it took as many runs as 0.9 of the capacity, since what binds is
the tail over many lengths.) Formulas: DistServe (OSDI '24), section 3.1; D is the service time of
one request without queueing, R the arrival rate.
"""

from __future__ import annotations

from math import inf


def utilisation(service_s: float, rate_rps: float) -> float:
    """The busy share of the server; from 1 on the queue grows for ever."""
    return service_s * rate_rps


def mean_wait_s(service_s: float, rate_rps: float) -> float:
    """Mean time in the queue: R·D² / (2(1 − R·D)) (Pollaczek-Khinchine); inf when overloaded."""
    busy = utilisation(service_s, rate_rps)
    return inf if busy >= 1 else rate_rps * service_s * service_s / (2 * (1 - busy))


def mean_ttft_s(service_s: float, rate_rps: float) -> float:
    """One device: D + R·D² / (2(1 − R·D))."""
    return service_s + mean_wait_s(service_s, rate_rps)


def mean_ttft_pipeline_s(service_s: float, rate_rps: float, *, stages: int = 2) -> float:
    """A pipeline of p equal stages, each D/p: D + (D/p)²·R / (2(1 − R·D/p)).

    For two stages this is D + R·D² / (4(2 − R·D)). Activations are taken to travel for free.
    """
    return service_s + mean_wait_s(service_s / stages, rate_rps)


def mean_ttft_tensor_s(service_s: float, rate_rps: float, *, speedup: float) -> float:
    """Tensor parallel, K times as fast: D/K + R·D² / (2K(K − R·D)); 1 < K < the number of GPUs."""
    return mean_ttft_s(service_s / speedup, rate_rps)


def max_rate_rps(service_s: float, mean_ttft_limit_s: float) -> float:
    """The rate at which one device's mean TTFT reaches the limit; 0 when D alone is too long.

    From D + W = L with W = R·D²/(2(1 − R·D)): R = 2(L − D) / (D² + 2D(L − D)).
    """
    slack_s = mean_ttft_limit_s - service_s
    if slack_s <= 0:
        return 0.0
    return 2 * slack_s / (service_s * service_s + 2 * service_s * slack_s)
