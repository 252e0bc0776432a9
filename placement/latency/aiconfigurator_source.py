"""Step times from NVIDIA's kernel database, where `aiconfigurator-core` is installed.

The one place that knows the package, an optional extra whose project is being archived: nothing
depends on it. Its database is asked for a grid of steps, which become a profile like a measured
one, so the planner interpolates and extrapolates it as it does its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ...engine.errors import InvalidConfig
from .phase_latency import NoLatency, Phase, PhaseLatency
from .step_profile import ProfilePoint, StepProfile

PACKAGE = "aiconfigurator_core"
SYSTEMS = {
    "a100-80g": "a100_sxm",
    "b200": "b200_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "l40s": "l40s",
}
BACKENDS = ("vllm", "trtllm", "sglang")  # whose kernels, the first that the database knows
PROMPTS = ((1, 0), (1, 4096), (4, 0))  # prompts in a step, context of each
PROMPT_TOKENS = tuple(2**i for i in range(4, 15))  # of one prompt
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 1024, 4096, 16384)


class AiconfiguratorLatency:
    """Step times of one model on one kind of hardware. Is a `LatencySource`."""

    def __init__(self, *, model: Path, name: str, hardware: str) -> None:
        """`model` is a folder with config.json. Raises InvalidConfig without the package, and for
        hardware that its database does not hold."""
        self._config = _module("config")
        self._models = _module("models")
        self._databases = _module("perf_database")
        if hardware not in SYSTEMS:
            raise InvalidConfig(
                "latency.source",
                f"aiconfigurator's database holds no {hardware}",
                f"use latency.source: sheet, or hardware out of {sorted(SYSTEMS)}",
            )
        self._path = str(model if model.is_dir() else model.parent)
        self._name = name
        self._hardware = hardware
        self._profiles: dict[int, StepProfile] = {}

    def phase(
        self, phase: Phase, tensor_parallel: int = 1, pipeline_parallel: int = 1
    ) -> PhaseLatency:
        """A pipeline is divided from its tensor parallelism's one stage."""
        profile = self._profiles.get(tensor_parallel)
        if profile is None:
            profile = self._profiles[tensor_parallel] = self.profile(tensor_parallel)
        return profile.phase(phase, tensor_parallel, pipeline_parallel)

    def profile(self, tensor_parallel: int) -> StepProfile:
        """The database's answers on the grid. Raises NoLatency for what it has no kernels for."""
        try:
            points = self._points(tensor_parallel)
        except Exception as error:  # whatever a foreign library raises for a shape it lacks
            raise NoLatency(
                f"aiconfigurator, {self._name} on {self._hardware}",
                f"nothing for tensor parallel {tensor_parallel}: {error}",
                "use latency.source: sheet",
            ) from error
        return StepProfile(
            hardware=self._hardware,
            model=self._name,
            dtype="auto",
            origin=f"{self._database[2]}, not measured by us",
            points=tuple(points),
        )

    def _points(self, tp: int) -> list[ProfilePoint]:
        prefill_s, decode_s = self._steps(tp)
        prompts = [
            ProfilePoint(
                phase="prefill",
                tp=tp,
                pp=1,
                new_tokens=tokens,
                context=context,
                batch=batch,
                seconds=prefill_s(batch, tokens, context),
            )
            for batch, context in PROMPTS
            for tokens in PROMPT_TOKENS
        ]
        rows = [
            ProfilePoint(
                phase="decode",
                tp=tp,
                pp=1,
                new_tokens=1,
                context=context,
                batch=batch,
                seconds=decode_s(batch, context),
            )
            for batch in ROWS
            for context in CONTEXTS
        ]
        return prompts + rows

    def _steps(
        self, tp: int
    ) -> tuple[Callable[[int, int, int], float], Callable[[int, int], float]]:
        """Seconds of a prefill step of (batch, tokens, context) and of a decode step of (batch,
        context)."""
        backend, database, _ = self._database
        runtime = self._config.RuntimeConfig
        shape = self._config.ModelConfig(tp_size=tp, pp_size=1, moe_tp_size=tp, moe_ep_size=1)
        model = self._models.get_model(self._path, shape, backend)
        engine = _module("backends.factory").get_backend(backend)

        def prefill_s(batch: int, tokens: int, context: int) -> float:
            asked = runtime(batch_size=batch, isl=tokens + context, prefix=context, osl=1)
            return engine.run_static_latency_only(model, database, asked, "static_ctx") / 1e3

        def decode_s(batch: int, context: int) -> float:
            asked = runtime(batch_size=batch, isl=context, osl=2)
            return engine.run_static_latency_only(model, database, asked, "static_gen") / 1e3

        return prefill_s, decode_s

    @cached_property
    def _database(self) -> tuple[str, Any, str]:
        """(backend, its database, where from)."""
        system = SYSTEMS[self._hardware]
        for backend in BACKENDS:
            version = self._databases.get_latest_database_version(system, backend)
            found = self._databases.get_database(system, backend, version) if version else None
            if found is not None:
                return backend, found, f"aiconfigurator-core's database, {backend} {version}"
        raise InvalidConfig(
            "latency.source",
            f"aiconfigurator's database holds nothing of {BACKENDS} for {system}",
            "use latency.source: sheet",
        )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"{PACKAGE}.sdk.{name}")
    except ImportError as error:
        raise InvalidConfig(
            "latency.source",
            f"aiconfigurator needs a package that is not here ({error})",
            "pip install 'phasewise[aiconfigurator]' (82 MB), or use latency.source: sheet",
        ) from error
