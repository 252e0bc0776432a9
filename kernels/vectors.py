"""Inner loops that keep a tile or a row in vector registers: products, dots of many rows, exp.

As in `simd`: explicit vector code over int64 addresses, since LLVM does not find it by itself.
Everything is summed in float32, `wide` or not.
"""

# pyright: reportCallIssue=false
# (llvmlite's stubs leave out the flags of an instruction)

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import FAST, FLOAT, LANES, each_piece, load, round_to_bfloat16, splat

_LONG = ir.IntType(64)
_SHORT = ir.IntType(32)
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
# Of Cephes' expf (Moshier, netlib.org/cephes), highest power first; 1 + r + r * r * these.
POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_EXACT = ("contract", "nsz")  # sums in the order written: the remainder of exp depends on it


def _at(builder: ir.IRBuilder, base: Any, index: Any, item: int = 4) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(_LONG, item)))


def _store(builder: ir.IRBuilder, value: Any, address: Any, align: int = 4) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=align)


def _fill(value: float, lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(FLOAT, lanes), [float(value)] * lanes)


@intrinsic(prefer_literal=True)
def product_tile(typing_context, c, c_stride, a, a_stride, b, b_stride, count, rows, vectors):  # noqa: ANN001, ANN201
    """c[i, j] = sum over k < count of a[i, k] * b[k, j] for i < rows, j < 16 * vectors.

    Float32; strides are in floats. `rows` * `vectors` accumulators stay in registers.
    """
    num_rows, num_vectors = rows.literal_value, vectors.literal_value

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        target, target_stride, left, left_stride, right, right_stride, number = arguments[:7]
        places = list(itertools.product(range(num_rows), range(num_vectors)))
        slots = {p: cgutils.alloca_once(builder, ir.VectorType(FLOAT, LANES)) for p in places}
        for place in places:
            builder.store(_fill(0.0, LANES), slots[place])
        starts = [
            _at(builder, left, builder.mul(left_stride, ir.Constant(_LONG, i)))
            for i in range(num_rows)
        ]
        with cgutils.for_range(builder, number) as loop:
            row = _at(builder, right, builder.mul(loop.index, right_stride))
            columns = [
                load(builder, builder.add(row, ir.Constant(_LONG, 4 * LANES * j)), LANES, True)
                for j in range(num_vectors)
            ]
            for i in range(num_rows):
                place = _at(builder, starts[i], loop.index)
                one = builder.load(builder.inttoptr(place, FLOAT.as_pointer()), align=4)
                factor = splat(builder, one, LANES)
                for j, column in enumerate(columns):
                    product = builder.fmul(factor, column, flags=FAST)
                    slot = slots[i, j]
                    builder.store(builder.fadd(builder.load(slot), product, flags=FAST), slot)
        for i, j in places:
            row = _at(builder, target, builder.mul(target_stride, ir.Constant(_LONG, i)))
            _store(
                builder,
                builder.load(slots[i, j]),
                builder.add(row, ir.Constant(_LONG, 4 * LANES * j)),
            )
        return context.get_dummy_value()

    numbers = [types.int64] * 7
    return types.void(*numbers, rows, vectors), codegen


def _fold_pairs(builder: ir.IRBuilder, sums: list[Any]) -> Any:
    """Vectors of 16 lanes to the one whose lane i is the sum of vector i's lanes.

    Each round halves their number: of two vectors, lanes that lie a power of two apart are
    added, the first vector's to the lower half of each group of lanes.
    """
    kind = ir.VectorType(_SHORT, LANES)
    distance = 1
    while len(sums) > 1:
        low, high = [], []
        for lane in range(LANES):
            from_second = LANES if lane & distance else 0
            low.append(from_second + (lane & ~distance))
            high.append(from_second + (lane | distance))
        folded = []
        for first, second in zip(sums[::2], sums[1::2], strict=True):
            parts = [
                builder.shuffle_vector(first, second, ir.Constant(kind, order))
                for order in (low, high)
            ]
            folded.append(builder.fadd(parts[0], parts[1], flags=FAST))
        sums, distance = folded, 2 * distance
    return sums[0]


@intrinsic(prefer_literal=True)
def dot_rows(typing_context, query, rows, scores, factor, dim, wide):  # noqa: ANN001, ANN201
    """scores[t] = factor * sum of query[:dim] * rows[t, :dim], for 16 rows that lie together.

    `dim` is a multiple of 16; `query` and `scores` are float32, rows float32 or bfloat16.
    """
    length, is_wide = dim.literal_value, bool(wide.literal_value)
    item = 4 if is_wide else 2

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        left, right, target, scale = arguments[:4]
        pieces = range(0, length, LANES)
        x = [
            load(builder, builder.add(left, ir.Constant(_LONG, 4 * p)), LANES, True) for p in pieces
        ]
        sums = []
        for t in range(LANES):
            total = None
            for p, part in zip(pieces, x, strict=True):
                place = builder.add(right, ir.Constant(_LONG, item * (t * length + p)))
                product = builder.fmul(part, load(builder, place, LANES, is_wide), flags=FAST)
                total = product if total is None else builder.fadd(total, product, flags=FAST)
            sums.append(total)
        folded = _fold_pairs(builder, sums)
        _store(builder, builder.fmul(folded, splat(builder, scale, LANES), flags=FAST), target)
        return context.get_dummy_value()

    signature = types.void(types.int64, types.int64, types.int64, types.float32, dim, wide)
    return signature, codegen


@intrinsic(prefer_literal=True)
def add_weighted_rows_twice(typing_context, acc, rows, weights, apart, count, dim, wide):  # noqa: ANN001, ANN201
    """`simd.add_weighted_rows` for two heads that share the rows, which are widened once.

    The second head's sums lie `dim`, its weights `apart` floats behind the first's. `dim` is a
    multiple of 16.
    """
    length, is_wide = dim.literal_value, bool(wide.literal_value)
    item = 4 if is_wide else 2

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        target, source, first, distance, number = arguments[:5]
        pieces = range(0, length, LANES)
        places = [
            builder.add(target, ir.Constant(_LONG, 4 * (head * length + p)))
            for head, p in itertools.product(range(2), pieces)
        ]
        slots = [cgutils.alloca_once(builder, ir.VectorType(FLOAT, LANES)) for _ in places]
        for place, slot in zip(places, slots, strict=True):
            builder.store(load(builder, place, LANES, True), slot)
        heads = (first, _at(builder, first, distance))
        with cgutils.for_range(builder, number) as loop:
            row = _at(builder, source, loop.index, item * length)
            values = [
                load(builder, builder.add(row, ir.Constant(_LONG, item * p)), LANES, is_wide)
                for p in pieces
            ]
            for head, start in enumerate(heads):
                place = builder.inttoptr(_at(builder, start, loop.index), FLOAT.as_pointer())
                factor = splat(builder, builder.load(place, align=4), LANES)
                for j, value in enumerate(values):
                    slot = slots[head * len(values) + j]
                    product = builder.fmul(value, factor, flags=FAST)
                    builder.store(builder.fadd(builder.load(slot), product, flags=FAST), slot)
        for place, slot in zip(places, slots, strict=True):
            _store(builder, builder.load(slot), place)
        return context.get_dummy_value()

    numbers = [types.int64] * 5
    return types.void(*numbers, dim, wide), codegen


def _exp(builder: ir.IRBuilder, x: Any, lanes: int) -> Any:
    """exp of a vector, arguments clamped to [-87, 88]: 2^k times a polynomial of the remainder,
    within 2 ulp."""
    for bound, sign in ((-87.0, "<"), (88.0, ">")):
        outside = builder.fcmp_ordered(sign, x, _fill(bound, lanes))
        x = builder.select(outside, _fill(bound, lanes), x)
    kind = ir.VectorType(_SHORT, lanes)
    scaled = builder.fmul(x, _fill(LOG2E, lanes))
    positive = builder.fcmp_ordered(">=", scaled, _fill(0.0, lanes))
    half = builder.select(positive, _fill(0.5, lanes), _fill(-0.5, lanes))
    power = builder.fptosi(builder.fadd(scaled, half), kind)  # cut off, so to nearest
    whole = builder.sitofp(power, x.type)
    r = builder.fsub(x, builder.fmul(whole, _fill(LN2_HIGH, lanes), flags=_EXACT), flags=_EXACT)
    r = builder.fsub(r, builder.fmul(whole, _fill(LN2_LOW, lanes), flags=_EXACT), flags=_EXACT)
    y = _fill(POLYNOMIAL[0], lanes)
    for coefficient in (*POLYNOMIAL[1:], 1.0, 1.0):
        y = builder.fmul(y, r, flags=_EXACT)
        y = builder.fadd(y, _fill(coefficient, lanes), flags=_EXACT)
    power = builder.add(power, ir.Constant(kind, [127] * lanes))
    power = builder.shl(power, ir.Constant(kind, [23] * lanes))
    return builder.fmul(y, builder.bitcast(power, x.type))


@intrinsic
def exp_row(typing_context, row, count, shift):  # noqa: ANN001, ANN201
    """row[i] = exp(row[i] - shift) in place for 16 * `count` floats; returns their sum."""

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        start, number, least = arguments
        kind = ir.VectorType(FLOAT, LANES)
        total = cgutils.alloca_once(builder, kind)
        builder.store(_fill(0.0, LANES), total)
        shift_all = splat(builder, least, LANES)
        with cgutils.for_range(builder, number) as loop:
            place = _at(builder, start, loop.index, 4 * LANES)
            x = builder.fsub(load(builder, place, LANES, True), shift_all)
            y = _exp(builder, x, LANES)
            _store(builder, y, place)
            builder.store(builder.fadd(builder.load(total), y, flags=FAST), total)
        value, result = builder.load(total), ir.Constant(FLOAT, 0.0)
        for lane in range(LANES):
            part = builder.extract_element(value, ir.Constant(_SHORT, lane))
            result = builder.fadd(result, part, flags=FAST)
        return result

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic(prefer_literal=True)
def silu_mul_row(typing_context, gate, up, out, count, wide):  # noqa: ANN001, ANN201
    """out[i] = round(gate[i] / (1 + exp(-gate[i]))) * up[i] for i < count, in the inputs' dtype."""
    is_wide = bool(wide.literal_value)
    item = 4 if is_wide else 2

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        def piece(index: Any, lanes: int) -> None:
            x, factor = (
                load(builder, _at(builder, start, index, item), lanes, is_wide)
                for start in arguments[:2]
            )
            negative = builder.fsub(_fill(0.0, lanes), x)
            below = builder.fadd(_exp(builder, negative, lanes), _fill(1.0, lanes))
            y = _as_stored(builder, builder.fdiv(x, below), lanes, is_wide)
            value = builder.fmul(y, factor)
            stored = value if is_wide else round_to_bfloat16(builder, value, lanes)
            _store(builder, stored, _at(builder, arguments[2], index, item), item)

        each_piece(builder, arguments[3], piece)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, wide), codegen


def _as_stored(builder: ir.IRBuilder, value: Any, lanes: int, wide: bool) -> Any:
    """The value after it was rounded to the dtype and widened again."""
    if wide:
        return value
    kind = ir.VectorType(_SHORT, lanes)
    bits = builder.zext(round_to_bfloat16(builder, value, lanes), kind)
    return builder.bitcast(builder.shl(bits, ir.Constant(kind, [16] * lanes)), value.type)


@intrinsic(prefer_literal=True)
def prefetch(typing_context, address, num_bytes):  # noqa: ANN001, ANN201
    """Ask for `num_bytes` (a constant) to come near, past the first cache: they may be many."""
    length = num_bytes.literal_value

    def codegen(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        kind = ir.IntType(8).as_pointer()
        of = ir.FunctionType(ir.VoidType(), [kind, *[_SHORT] * 3])
        function = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(_SHORT, number) for number in (0, 2, 1))
        for line in range(0, length, 64):
            place = builder.add(arguments[0], ir.Constant(_LONG, line))
            builder.call(function, [builder.inttoptr(place, kind), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64, num_bytes), codegen
