"""Keys and values into FP8 tiles, a row at a time, and tiles back into rows. Numba, CPU.

What the bytes mean is in `fp8`; its `append` and `gather` are the readable versions, and these
give the same bytes.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# (an intrinsic is called without its typing context)

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import FLOAT, LANES, narrow, pointer, widen

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_REBIAS = 120  # float32's exponent bias less e4m3's


def _all(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _splat(builder: ir.IRBuilder, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(FLOAT, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    places = ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), places)


@intrinsic(prefer_literal=True)
def widen_e4m3(typing_context, source, target, scale, dim):  # noqa: ANN001, ANN201
    """target[j] = e4m3 value of byte source[j] under scale byte `scale`, j < dim: float32, exact.

    The bits of a byte, moved to where float32 has them, are its value times 2^-120; that holds for
    subnormals too. One product takes that and the scale back, unless 2^120 times the scale is too
    large for float32.
    """
    length = dim.literal_value

    def piece(builder: ir.IRBuilder, arguments: Any, at: int, lanes: int, factors: Any) -> None:
        codes, wide = ir.VectorType(_BYTE, lanes), ir.VectorType(_INT, lanes)
        here = builder.add(arguments[0], ir.Constant(_LONG, at))
        loaded = builder.load(builder.inttoptr(here, codes.as_pointer()), align=1)
        # The sign comes out five bits wide; four of them are cleared.
        moved = builder.shl(builder.sext(loaded, wide), _all(wide, 20))
        moved = builder.and_(moved, _all(wide, 0x87FFFFFF))
        values = builder.bitcast(moved, ir.VectorType(FLOAT, lanes))
        for factor in factors:
            values = builder.fmul(values, _splat(builder, factor, lanes))
        there = builder.add(arguments[1], ir.Constant(_LONG, 4 * at))
        vector = ir.VectorType(FLOAT, lanes).as_pointer()
        builder.store(values, builder.inttoptr(there, vector), align=4)

    def row(builder: ir.IRBuilder, arguments: Any, factors: Any) -> None:
        at = 0
        for lanes in (LANES, 8, 4, 2, 1):
            while length - at >= lanes:
                piece(builder, arguments, at, lanes, factors)
                at += lanes

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        exponent = builder.zext(arguments[2], _INT)
        with builder.if_else(
            builder.icmp_unsigned("<", exponent, ir.Constant(_INT, 255 - _REBIAS))
        ) as (usual, huge):
            with usual:
                row(builder, arguments, [_power(builder, exponent, _REBIAS)])
            with huge:
                rebias = ir.Constant(FLOAT, 2.0**_REBIAS)
                row(builder, arguments, [rebias, _power(builder, exponent, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint8, dim), codegen


def _power(builder: ir.IRBuilder, exponent: Any, more: int) -> Any:
    """2 ** (exponent - 127 + more) as float32; inf where that is 2 ** 128."""
    biased = builder.add(exponent, ir.Constant(_INT, more))
    return builder.bitcast(builder.shl(biased, ir.Constant(_INT, 23)), FLOAT)


@njit  # without fast math: every rounding counts
def _quantise(x, bits, shifted, shifted_bits, codes) -> int:  # noqa: ANN001
    """`x` (overwritten) as e4m3 bytes in `codes`; gives the scale byte. `bits` is x's own."""
    largest = np.int32(0)
    for j in range(len(x)):
        largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))
    if largest >= np.int32(0x7F800000):
        for j in range(len(x)):
            codes[j] = 0
        return 255
    exponent = max(((largest + np.int32(0x1FFFFF)) >> np.int32(23)) - np.int32(8), np.int32(1))
    inverse = np.float32(math.ldexp(1.0, int(127 - exponent)))
    for j in range(len(x)):
        x[j] *= inverse
        shifted[j] = abs(x[j]) + np.float32(16384.0)  # whose steps are e4m3's smallest
    for j in range(len(x)):
        size = bits[j] & np.int32(0x7FFFFFFF)
        even = size + np.int32(0x7FFFF) + ((size >> np.int32(20)) & np.int32(1))
        normal = (even >> np.int32(20)) - np.int32(960)
        subnormal = shifted_bits[j] - np.int32(0x46800000)
        code = normal if size >= np.int32(0x3C800000) else subnormal  # from 2**-6 on
        codes[j] = np.uint8(code | ((bits[j] >> np.int32(24)) & np.int32(0x80)))
    return int(exponent)


@functools.cache
def append_body(head_dim: int, block_size: int, tile_bytes: int, wide: bool) -> Body:
    """Quantise the keys and values of `qkv` into their slots; `wide`: from float32, else bfloat16.

    Pack: threads, tokens, heads, KV heads, qkv, layer, slots (int64), scratch (2 dim floats each).
    """
    dim, size, tile, item = head_dim, block_size, tile_bytes, 4 if wide else 2

    def body(p):  # noqa: ANN001, ANN202
        num_tokens, num_heads, kv_heads, qkv_at, kv_at = p[1], p[2], p[3], p[4], p[5]
        slots = carray(pointer(p[6]), (num_tokens,), np.int64)
        thread = thread_num()
        row_at = p[7] + 8 * thread * dim
        x = carray(pointer(row_at), (dim,), np.float32)
        bits = carray(pointer(row_at), (dim,), np.int32)
        shifted = carray(pointer(row_at + 4 * dim), (dim,), np.float32)
        shifted_bits = carray(pointer(row_at + 4 * dim), (dim,), np.int32)
        width = (num_heads + 2 * kv_heads) * dim
        for i in range(num_tokens * thread // p[0], num_tokens * (thread + 1) // p[0]):
            block, place = slots[i] // size, slots[i] % size
            for side in range(2 * kv_heads):
                widen(qkv_at + item * (i * width + (num_heads + side) * dim), row_at, dim, wide)
                tile_at = kv_at + tile * (block * 2 * kv_heads + side)
                codes = carray(pointer(tile_at + place * dim), (dim,), np.uint8)
                scales = carray(pointer(tile_at + size * dim), (size,), np.uint8)
                scales[place] = np.uint8(_quantise(x, bits, shifted, shifted_bits, codes))

    return Body(cfunc(BODY, cache=True)(body))


@functools.cache
def gather_body(head_dim: int, block_size: int, tile_bytes: int, wide: bool) -> Body:
    """Blocks as a dense [2, kv_heads, blocks * block_size, head_dim]: float32, else bfloat16.

    Pack: threads, blocks, KV heads, layer, table (int64), target, scratch (dim floats each).
    """
    dim, size, tile, item = head_dim, block_size, tile_bytes, 4 if wide else 2

    def body(p):  # noqa: ANN001, ANN202
        num_blocks, kv_heads, kv_at, out_at = p[1], p[2], p[3], p[5]
        table = carray(pointer(p[4]), (num_blocks,), np.int64)
        thread = thread_num()
        row_at = p[6] + 4 * thread * dim
        for i in range(num_blocks * thread // p[0], num_blocks * (thread + 1) // p[0]):
            for side in range(2 * kv_heads):
                tile_at = kv_at + tile * (table[i] * 2 * kv_heads + side)
                scales = carray(pointer(tile_at + size * dim), (size,), np.uint8)
                target = out_at + item * dim * size * (side * num_blocks + i)
                for t in range(size):
                    if wide:
                        widen_e4m3(tile_at + t * dim, target + 4 * dim * t, scales[t], dim)
                    else:
                        widen_e4m3(tile_at + t * dim, row_at, scales[t], dim)
                        narrow(row_at, target + 2 * dim * t, dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))


def append_rows(qkv: Tensor, kv: Tensor, slots: np.ndarray, threads: int) -> None:
    """Quantise the keys and values of qkv [tokens, (heads + 2 kv_heads) * dim] into `slots`."""
    kv_heads, size, dim = kv.shape[2:]
    scratch = np.empty(2 * dim * threads, np.float32)
    append_body(dim, size, kv.stride(2), qkv.dtype == torch.float32).run(
        threads,
        len(qkv),
        qkv.shape[1] // dim - 2 * kv_heads,
        kv_heads,
        qkv.data_ptr(),
        kv.data_ptr(),
        slots.ctypes.data,
        scratch.ctypes.data,
    )


def gather_rows(kv: Tensor, blocks: Tensor, dtype: torch.dtype, threads: int) -> Tensor:
    """The values of `blocks` (int64), in order, as [2, kv_heads, positions, dim] of a dtype."""
    kv_heads, size, dim = kv.shape[2:]
    blocks = blocks.contiguous()
    out = torch.empty((2, kv_heads, len(blocks) * size, dim), dtype=dtype)
    scratch = np.empty(dim * threads, np.float32)
    gather_body(dim, size, kv.stride(2), dtype == torch.float32).run(
        threads,
        len(blocks),
        kv_heads,
        kv.data_ptr(),
        blocks.data_ptr(),
        out.data_ptr(),
        scratch.ctypes.data,
    )
    return out
