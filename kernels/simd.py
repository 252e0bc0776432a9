"""Two inner loops of attention as explicit vector code, which LLVM lowers to what the CPU has.

Numba's array indexing (negative indices, possible aliasing) keeps LLVM from using registers well:
4 times slower when measured. Addresses are int64; `dim` and `wide` are compile-time constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # of float32; narrower CPUs split a vector, leftovers of a row take 8, 4, 2, 1
FLOAT = ir.FloatType()
FAST = ("contract", "reassoc", "nsz")


def _pieces(dim: int) -> Iterator[tuple[int, int]]:
    """(offset, lanes) that cover a row of `dim` values."""
    at = 0
    for lanes in (LANES, 8, 4, 2, 1):
        while dim - at >= lanes:
            yield at, lanes
            at += lanes


def load(builder: ir.IRBuilder, address: Any, lanes: int, wide: bool) -> Any:
    """`lanes` values at an int address as float32: float32 itself, or bfloat16 widened."""
    element = FLOAT if wide else ir.IntType(16)
    pointer = builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
    loaded = builder.load(pointer, align=4 if wide else 2)
    if wide:
        return loaded
    bits = builder.zext(loaded, ir.VectorType(ir.IntType(32), lanes))
    sixteen = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [16] * lanes)
    return builder.bitcast(builder.shl(bits, sixteen), ir.VectorType(FLOAT, lanes))


def _offset(builder: ir.IRBuilder, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(ir.IntType(64), num_bytes))


def splat(builder: ir.IRBuilder, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(FLOAT, lanes)
    first = builder.insert_element(
        ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
    )
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)


def _sum_lanes(builder: ir.IRBuilder, vector: Any, lanes: int) -> Any:
    """Add a vector's lanes: fold the upper half onto the lower until one is left."""
    index = ir.IntType(32)
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        low = ir.Constant(ir.VectorType(index, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(index, lanes), list(range(lanes, 2 * lanes)))
        vector = builder.fadd(
            builder.shuffle_vector(vector, undefined, low),
            builder.shuffle_vector(vector, undefined, high),
            flags=FAST,  # pyright: ignore[reportCallIssue]
        )
    return builder.extract_element(vector, ir.Constant(index, 0))


@intrinsic(prefer_literal=True)
def dot(typing_context, a, b, dim, wide):  # noqa: ANN001, ANN201
    """Sum of a[i] * b[i]: `a` float32, `b` float32 (`wide`) or bfloat16."""
    length, is_wide = dim.literal_value, bool(wide.literal_value)
    item = 4 if is_wide else 2

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        left, right = arguments[0], arguments[1]
        sums: dict[tuple[int, int], Any] = {}
        for number, (at, lanes) in enumerate(_pieces(length)):
            x = load(builder, _offset(builder, left, 4 * at), lanes, True)
            y = load(builder, _offset(builder, right, item * at), lanes, is_wide)
            product = builder.fmul(x, y, flags=FAST)
            slot = (lanes, number % 2)
            sums[slot] = builder.fadd(sums[slot], product, flags=FAST) if slot in sums else product
        total = None
        for lanes in (LANES, 8, 4, 2, 1):
            parts = [sums[slot] for slot in sums if slot[0] == lanes]
            if not parts:
                continue
            vector = parts[0]
            if len(parts) == 2:
                vector = builder.fadd(parts[0], parts[1], flags=FAST)
            if lanes == 1:
                part = builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))
            else:
                part = _sum_lanes(builder, vector, lanes)
            total = part if total is None else builder.fadd(total, part, flags=FAST)
        return total

    return types.float32(types.int64, types.int64, dim, wide), codegen


@intrinsic(prefer_literal=True)
def add_weighted_rows(typing_context, acc, rows, weights, count, dim, wide):  # noqa: ANN001, ANN201
    """acc[:dim] += sum over t < count of weights[t] * rows[t * dim : (t + 1) * dim].

    `acc` and `weights` are float32; the accumulators stay in registers over the loop.
    """
    length, is_wide = dim.literal_value, bool(wide.literal_value)
    item = 4 if is_wide else 2
    long = ir.IntType(64)

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        target, source, factors, number = arguments[:4]
        pieces = list(_pieces(length))
        slots = []
        for at, lanes in pieces:
            slot = cgutils.alloca_once(builder, ir.VectorType(FLOAT, lanes))
            builder.store(load(builder, _offset(builder, target, 4 * at), lanes, True), slot)
            slots.append(slot)
        with cgutils.for_range(builder, number) as loop:
            row = builder.add(source, builder.mul(loop.index, ir.Constant(long, item * length)))
            place = builder.add(factors, builder.mul(loop.index, ir.Constant(long, 4)))
            weight = builder.load(builder.inttoptr(place, FLOAT.as_pointer()), align=4)
            for (at, lanes), slot in zip(pieces, slots, strict=True):
                values = load(builder, _offset(builder, row, item * at), lanes, is_wide)
                product = builder.fmul(values, splat(builder, weight, lanes), flags=FAST)
                builder.store(builder.fadd(builder.load(slot), product, flags=FAST), slot)
        for (at, lanes), slot in zip(pieces, slots, strict=True):
            pointer = builder.inttoptr(
                _offset(builder, target, 4 * at), ir.VectorType(FLOAT, lanes).as_pointer()
            )
            builder.store(builder.load(slot), pointer, align=4)
        return context.get_dummy_value()

    signature = types.void(types.int64, types.int64, types.int64, types.int64, dim, wide)
    return signature, codegen


def each_piece(builder: ir.IRBuilder, count: Any, copy: Any) -> None:
    """Emit copy(index, lanes) over [0, count): whole vectors first, then single values."""
    long = ir.IntType(64)
    whole = builder.udiv(count, ir.Constant(long, LANES))
    with cgutils.for_range(builder, whole) as loop:
        copy(builder.mul(loop.index, ir.Constant(long, LANES)), LANES)
    done = builder.mul(whole, ir.Constant(long, LANES))
    with cgutils.for_range(builder, builder.sub(count, done)) as loop:
        copy(builder.add(loop.index, done), 1)


@intrinsic(prefer_literal=True)
def widen(typing_context, source, target, count, wide):  # noqa: ANN001, ANN201
    """target[i] = source[i] for i < count: float32 from float32 (`wide`) or bfloat16."""
    is_wide = bool(wide.literal_value)
    long = ir.IntType(64)

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        def copy(index: Any, lanes: int) -> None:
            start = builder.mul(index, ir.Constant(long, 4 if is_wide else 2))
            value = load(builder, builder.add(arguments[0], start), lanes, is_wide)
            place = builder.add(arguments[1], builder.mul(index, ir.Constant(long, 4)))
            pointer = builder.inttoptr(place, ir.VectorType(FLOAT, lanes).as_pointer())
            builder.store(value, pointer, align=4)

        each_piece(builder, arguments[2], copy)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, wide), codegen


def round_to_bfloat16(builder: ir.IRBuilder, value: Any, lanes: int) -> Any:
    """float32 to bfloat16 bits, to nearest even (NaN payloads aside, as torch does)."""
    kind = ir.VectorType(ir.IntType(32), lanes)

    def constant(number: int) -> ir.Constant:
        return ir.Constant(kind, [number] * lanes)

    bits = builder.bitcast(value, kind)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    carried = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    return builder.trunc(builder.lshr(carried, constant(16)), ir.VectorType(ir.IntType(16), lanes))


@intrinsic(prefer_literal=True)
def narrow(typing_context, source, target, count, wide):  # noqa: ANN001, ANN201
    """target[i] = source[i] for i < count: float32 to float32 (`wide`) or bfloat16."""
    is_wide = bool(wide.literal_value)
    item = 4 if is_wide else 2
    element = FLOAT if is_wide else ir.IntType(16)
    long = ir.IntType(64)

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        def copy(index: Any, lanes: int) -> None:
            start = builder.mul(index, ir.Constant(long, 4))
            value = load(builder, builder.add(arguments[0], start), lanes, True)
            place = builder.add(arguments[1], builder.mul(index, ir.Constant(long, item)))
            pointer = builder.inttoptr(place, ir.VectorType(element, lanes).as_pointer())
            stored = value if is_wide else round_to_bfloat16(builder, value, lanes)
            builder.store(stored, pointer, align=item)

        each_piece(builder, arguments[2], copy)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, wide), codegen


@intrinsic
def pointer(typing_context, address):  # noqa: ANN001, ANN201
    """An int64 address as the pointer that `numba.carray` takes."""

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def as_double(typing_context, bits):  # noqa: ANN001, ANN201
    """The float whose bits `openmp.float_bits` gave."""

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), codegen
