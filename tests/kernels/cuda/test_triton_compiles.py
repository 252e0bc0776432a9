"""Every kernel compiles for sm_90, spills no register and moves 16 bytes an access.

No GPU is needed: Triton brings the assembler. What it cannot show is speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from phasewise.kernels.cuda import (
    activations,
    append,
    decode_rows,
    experts,
    logits,
    norms,
    philox,
    sampling,
)
from phasewise.kernels.cuda.decode_attention import DecodeTiling, decode_kernel, join_kernel
from phasewise.kernels.cuda.prefill_attention import PrefillTiling, prefill_kernel
from phasewise.kernels.cuda.transfer import copy_kernel
from phasewise.tests.kernels.cuda.compiled import compile_for_hopper

HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    instructions: tuple[str, ...] = ()  # that must be there
    most_registers: int = 255


def padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def attention_constants(dim: int, fp8: bool, soft_cap: float) -> dict[str, Any]:
    return {
        "HEADS": HEADS,
        "KV_HEADS": KV_HEADS,
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK_SIZE": BLOCK_SIZE,
        "HEAD_STRIDE": head_stride(dim, fp8),
        "SOFT_CAP": soft_cap,
        "FP8": fp8,
        "WIDE": False,
    }


def head_stride(dim: int, fp8: bool) -> int:
    return BLOCK_SIZE * (dim + fp8)


def pool_types(fp8: bool) -> dict[str, str]:
    return {"kv": "*fp8e4nv", "scales": "*u8"} if fp8 else {"kv": "*bf16", "scales": "*bf16"}


def decode_case(dim: int, *, fp8: bool = False, soft_cap: float = 0.0, split: bool = True) -> Case:
    tiling = DecodeTiling.of(dim, fp8=fp8)
    types = {"out": "*fp32" if split else "*bf16", "log_sums": "*fp32" if split else "*i32"}
    types |= {"q": "*bf16", **pool_types(fp8), "tables": "*i32", "lengths": "*i32"}
    types |= {"q_stride": "i32:16", "table_stride": "i32:16", "scale": "fp32"}
    types |= {"window": "i32", "num_splits": "i32"}
    constants = {"GROUP_PAD": 16, "TILE": tiling.tile, "SPLIT": split}
    return Case(
        name=f"decode, dim {dim}{', fp8' * fp8}{', cap' * bool(soft_cap)}",
        kernel=decode_kernel,
        arguments=types,
        constants=attention_constants(dim, fp8, soft_cap) | constants,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        instructions=("LDGSTS.E.BYPASS.128", "HMMA"),
        most_registers=168,  # three programs of four warps a multiprocessor
    )


def prefill_case(
    dim: int, *, fp8: bool = False, soft_cap: float = 0.0, windowed: bool = False
) -> Case:
    tiling = PrefillTiling.of(dim)
    types = {"out": "*bf16", "q": "*bf16", **pool_types(fp8), "tables": "*i32"}
    types |= {"token_starts": "*i32", "lengths": "*i32"}
    types |= {"q_stride": "i32:16", "out_stride": "i32:16", "table_stride": "i32:16"}
    types |= {"scale": "fp32", "window": "i32", "num_rows": "i32"}
    group = HEADS // KV_HEADS
    constants = {"GROUP_PAD": group, "POSITIONS": tiling.rows // group, "TILE": tiling.tile}
    return Case(
        name=f"prefill, dim {dim}{', fp8' * fp8}{', cap' * bool(soft_cap)}{', window' * windowed}",
        kernel=prefill_kernel,
        arguments=types,
        constants=attention_constants(dim, fp8, soft_cap) | constants | {"WINDOWED": windowed},
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        instructions=("LDGSTS.E.BYPASS.128", "HGMMA"),
    )


def rope_case(*, fp8: bool) -> Case:
    types = {"qkv": "*bf16", **pool_types(fp8), "slots": "*i64", "positions": "*i64"}
    types |= {"angles": "*fp32", "q_weight": "*bf16", "k_weight": "*bf16", "eps": "fp32"}
    sizes = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HALF": 64, "HALF_PAD": 64, "TAKEN": 8}
    return Case(
        name=f"rope, norm and append{', fp8' * fp8}",
        kernel=append.rope_append_kernel,
        arguments=types | {"qkv_stride": "i32:16"},
        constants=sizes
        | {"BLOCK_SIZE": 16, "HEAD_STRIDE": head_stride(128, fp8), "FP8": fp8}
        | {"NORMED": True, "ROTATED": True, "INTERPRETED": False},
        options={"num_warps": 2, "enable_fp_fusion": False},
        instructions=("LDG.E.128", "STG.E.128"),
    )


def append_cases() -> list[Case]:
    sizes = {"KV_HEADS": KV_HEADS, "DIM": 128, "DIM_PAD": 128, "BLOCK_SIZE": BLOCK_SIZE}
    sizes |= {"HEADS_PAD": KV_HEADS, "INTERPRETED": False}
    types = {"k": "*bf16", "v": "*bf16", "k_stride": "i32:16", "v_stride": "i32:16"}
    return [
        *(
            Case(
                name=f"append{', fp8' * fp8}",
                kernel=append.append_kernel,
                arguments=types | pool_types(fp8) | {"slots": "*i64"},
                constants=sizes | {"HEAD_STRIDE": head_stride(128, fp8), "FP8": fp8},
                options={"num_warps": 4},
                instructions=("LDG.E.128", "STG.E.64" if fp8 else "STG.E.128"),
            )
            for fp8 in (False, True)
        ),
        rope_case(fp8=False),
        rope_case(fp8=True),
    ]


def copy_case() -> Case:
    strides = ["source_layer", "target_layer", "source_block", "target_block"]
    types = {"source": "i64:16", "target": "i64:16", "source_blocks": "*i64"}
    types |= {"target_blocks": "*i32", "words": "i32:16"}
    return Case(
        name="copy of blocks",
        kernel=copy_kernel,
        arguments=types | dict.fromkeys(strides, "i64:16"),
        constants={"WORD": 8, "ALIGNED": True, "TILE": 2048}
        | {"SOURCE_DENSE": False, "TARGET_DENSE": False},
        options={"num_warps": 8},
        instructions=("LDG.E.128", "STG.E.128"),
    )


def row_cases() -> list[Case]:
    sizes = {"DIM": 4096, "DIM_PAD": 4096, "ADDED": True}
    types = {"out": "*bf16", "x": "*bf16", "residual": "*bf16", "weight": "*bf16", "eps": "fp32"}
    wide = ("LDG.E.128", "STG.E.128")
    return [
        Case(
            name="rms norm",
            kernel=norms.rms_norm_kernel,
            arguments=types,
            constants=sizes,
            options={"num_warps": 8},
            instructions=wide,
        ),
        Case(
            name="rms norm alone",
            kernel=norms.rms_norm_kernel,
            arguments={name: kind for name, kind in types.items() if name != "residual"},
            constants=sizes | {"residual": None, "ADDED": False},
            options={"num_warps": 8},
            instructions=wide,
        ),
        Case(
            name="layer norm",
            kernel=norms.layer_norm_kernel,
            arguments=types | {"bias": "*bf16"},
            constants=sizes,
            options={"num_warps": 8},
            instructions=wide,
        ),
        Case(
            name="silu times up",
            kernel=activations.silu_mul_kernel,
            arguments={"out": "*bf16", "gate_up": "*bf16", "stride": "i32:16"},
            constants={"DIM": 14336, "TILE": 1024},
            instructions=wide,
        ),
        Case(
            name="relu",
            kernel=activations.relu_kernel,
            arguments={"out": "*bf16", "x": "*bf16", "size": "i32:16"},
            constants={"TILE": 1024},
            instructions=wide,
        ),
    ]


def expert_case(slots_per_expert: int) -> Case:
    tiling = experts.ExpertTiling.of(slots_per_expert)
    types = {"out": "*bf16", "x": "*bf16", "weights": "*bf16", "rows": "*i32", "starts": "*i32"}
    types |= {"factors": "*fp32", "num_experts": "i32", "x_stride": "i32:16"}
    constants = {"SLOTS": tiling.slots, "COLUMNS": tiling.columns, "DEPTH": tiling.depth}
    return Case(
        name=f"expert product, {slots_per_expert} slots each",
        kernel=experts.grouped_matmul_kernel,
        arguments=types,
        constants=constants | {"OUT_DIM": 14336, "IN_DIM": 4096, "SCALED": True, "WIDE": False},
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        instructions=("LDGSTS.E.BYPASS.128", "HGMMA" if tiling.slots >= 64 else "HMMA"),
    )


def sampling_cases() -> list[Case]:
    large, bits = {"TILE": 4096}, {"ID_BITS": (128_256).bit_length()}
    rows = {"stride": "i32:16", "vocab": "i32"}
    columns = {"floors": "*i64", "top_k": "*i64", "top_p": "*fp64", "vocab": "i32:16"}
    columns |= {"seeds": "*i64", "positions": "*i64"}
    maxima = {"logits": "*fp32", "maxima": "*fp32"}
    return [
        Case(
            name="argmax",
            kernel=sampling.argmax_kernel,
            arguments=rows | maxima | {"token_ids": "*i64"},
            constants=large,
            options={"num_warps": 16},
        ),
        Case(
            name="keys",
            kernel=sampling.keys_kernel,
            arguments=rows | maxima | {"keys": "*i64", "temperatures": "*fp64"},
            constants=large | bits,
            options={"num_warps": 8},
        ),
        Case(
            name="draw",
            kernel=sampling.draw_kernel,
            arguments={"token_ids": "*i64", "keys": "*i64", **columns},
            constants=bits | {"TILE": 2048, "SOME": False, "temperatures": None},
            options={"num_warps": 16},
            instructions=("LDG.E.128",),
            most_registers=128,
        ),
        Case(
            name="draw of rows that are not greedy",
            kernel=sampling.draw_kernel,
            arguments={"token_ids": "*i64", "keys": "*i64", **columns}
            | {"positions": "*i32", "temperatures": "*fp64"},
            constants=bits | {"TILE": 2048, "SOME": True},
            options={"num_warps": 16},
            instructions=("LDG.E.128",),
            most_registers=128,
        ),
        Case(
            name="uniforms",
            kernel=philox.uniforms_kernel,
            arguments={"out": "*fp64", "seeds": "*i64", "positions": "*i64", "size": "i32"},
            constants={"TILE": 128},
        ),
    ]


def logits_cases() -> list[Case]:
    cell = {"logits": "*fp32", "rows": "*i64", "ids": "*i64", "stride": "i32:16", "size": "i32"}
    penalties = dict.fromkeys(("repetition", "frequency", "presence", "counts"), "*fp32")
    return [
        Case(
            name="bias",
            kernel=logits.add_bias_kernel,
            arguments=cell | {"bias": "*fp32"},
            constants={"TILE": 256},
        ),
        Case(
            name="suppress",
            kernel=logits.suppress_kernel,
            arguments=cell,
            constants={"TILE": 256},
        ),
        Case(
            name="penalties",
            kernel=logits.penalise_kernel,
            arguments=cell | penalties,
            constants={"TILE": 256},
            options={"enable_fp_fusion": False},
        ),
    ]


def resident_cases() -> list[Case]:
    """What moves the state of decoding rows on."""
    columns = {"columns": "*i64", "num_rows": "i32", "max_rows": "i32:16"}
    tables = {"tables": "*i32"}
    located = {"kv_slots": "*i64", "lengths": "*i32", "angles": "*i64", "table_stride": "i32:16"}
    chosen = {"reported": "*i64", "token_ids": "*i64", "maxima": "*fp32"}
    return [
        Case(
            name="changes of rows",
            kernel=decode_rows.apply_changes_kernel,
            arguments=columns | tables | {"changes": "*i64", "num_entries": "i32"},
            constants={"FIELDS": decode_rows.NUM_FIELDS, "TILE": 256},
        ),
        Case(
            name="places of rows",
            kernel=decode_rows.locate_kernel,
            arguments=columns | tables | located,
            constants={"BLOCK_SIZE": BLOCK_SIZE, "TILE": 256},
        ),
        Case(
            name="rows a token on",
            kernel=decode_rows.advance_kernel,
            arguments=columns | chosen,
            constants={"TILE": 256},
        ),
    ]


def join_case() -> Case:
    types = {"out": "*bf16", "parts": "*fp32", "log_sums": "*fp32", "num_splits": "i32"}
    return Case(
        name="join of splits",
        kernel=join_kernel,
        arguments=types,
        constants={"DIM": 128, "DIM_PAD": 128, "MAX_SPLITS": 64},
        instructions=("LDG.E.128",),
    )


CASES = [
    decode_case(80, split=False),
    decode_case(128),
    decode_case(128, fp8=True),
    join_case(),
    prefill_case(96, windowed=True),
    prefill_case(128),
    *append_cases(),
    copy_case(),
    *row_cases(),
    expert_case(8),
    expert_case(256),
    *sampling_cases(),
    *logits_cases(),
    *resident_cases(),
]

SLOW_CASES = [
    decode_case(64),
    decode_case(64, fp8=True),
    decode_case(256, soft_cap=50.0),
    decode_case(256, fp8=True),
    prefill_case(64),
    prefill_case(128, fp8=True),
    prefill_case(256, soft_cap=50.0),
    prefill_case(256, fp8=True),
]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in CASES),
        *(pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_a_kernel_compiles_for_hopper_without_spills(case: Case) -> None:
    options = {"enable_fp_fusion": True, **case.options}
    compiled = compile_for_hopper(case.kernel, case.arguments, case.constants, **options)
    print(f"{case.name}: {compiled.registers} registers, {compiled.shared_bytes} bytes shared")
    assert not compiled.spills, compiled.stack_bytes
    assert compiled.registers <= case.most_registers
    assert compiled.shared_bytes <= 227 * 1024, "what an sm_90 block may have"
    missing = [name for name in case.instructions if not compiled.count(name)]
    assert not missing


@pytest.mark.slow
def test_a_kernel_that_spills_is_found_out() -> None:
    case = prefill_case(128)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    assert compile_for_hopper(case.kernel, case.arguments, case.constants, **options).spills
