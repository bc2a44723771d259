"""What each primitive is: one row, with all that jaxprune knows of it by its name.

A new primitive gets a row here, and a rule in ``jaxprune/rules`` for what it does to axes. No other
file compares a primitive's name: it asks for the row, ``primitives.of(step)``. A primitive that has
no row is opaque, costs nothing that is known and is merged with nothing.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(enum.Enum):
    """The family of a primitive: members are read, coupled and evaluated alike."""

    __hash__ = object.__hash__  # An enum hashes its name anew each time.

    ELEMENTWISE = "a function of entries; axes pass"
    TYPE = "what may differ from device to device changes, entries do not"
    RESHARDING = "where entries lie changes"
    EACH = "operands pass one by one"
    TIE = "the second operand passes"
    BITCAST = "bits are read as another type"
    EFFECT = "values are only looked at"
    TRANSPOSE = "axes change places"
    SQUEEZE = "axes of size 1 go"
    BROADCAST = "entries are repeated along new axes"
    RESHAPE = "axes are split and merged"
    CONCATENATE = "operands follow each other along an axis"
    SPLIT = "an axis is cut into results"
    SLICE = "a part of each axis stays"
    PAD = "axes are padded"
    STACK = "operands are stacked along a new axis"
    UNSTACK = "an axis is dealt to results"
    TILE = "axes are repeated"
    REVERSE = "axes are turned round"
    FRESH = "an array comes from nothing"
    REDUCTION = "axes are reduced by a known operation"
    POSITION = "the position of an extreme entry along axes"
    FOLD = "axes are reduced by a program"
    CUMULATIVE = "entries are combined with those before them"
    SORT = "entries are moved along an axis by their values"
    CONTRACTION = "products of two operands are summed"
    RAGGED = "products whose rows belong to groups are summed"
    CONVOLUTION = "products of windows are summed"
    GATHER = "windows are read at indices"
    SCATTER = "windows are written at indices"
    DYNAMIC_SLICE = "one window is read at a computed place"
    DYNAMIC_UPDATE = "one window is written at a computed place"
    POOL = "windows are reduced by a known operation"
    WINDOW_FOLD = "windows are reduced by a program"
    POOL_GRADIENT = "windows pick an entry"
    MATRIX = "linear algebra on the last axes"
    SOLVE = "a triangular system is solved"
    FFT = "lines are transformed"
    ATTENTION = "a fused attention kernel"
    RANDOM = "random numbers are drawn"
    KEYS = "random keys are made"
    COLLECTIVE = "devices exchange entries"
    INLINED = "a program that the tape inlines"
    REMAT = "a program that the backward pass runs again"
    CUSTOM_JVP = "a program with a forward derivative of its own"
    CUSTOM_VJP = "a program with a backward derivative of its own"
    SHARDS = "a program that each device runs on its parts"
    LOOP = "a program that runs a known number of times"
    WHILE = "a program that runs while another says so"
    BRANCH = "one of several programs"
    KERNEL = "a kernel, one primitive for any program"
    SIZE = "a size becomes a number"
    OTHER = "no rule, only a cost"
    OPAQUE = "neither a rule nor a cost: state, and what Python computes"
    UNKNOWN = "no row"


CUSTOM = {Kind.CUSTOM_JVP, Kind.CUSTOM_VJP}
CALLS = {*CUSTOM, Kind.REMAT}  # These hold one program and run it once, on their own operands.
CONTROL = {Kind.LOOP, Kind.WHILE, Kind.BRANCH}


class Flops(enum.Enum):
    """How many FLOPs a primitive takes; ``jaxprune/costs/flops.py`` has the formulas."""

    UNKNOWN = "not known, counted as none"
    NONE = "none"
    RESULT = "one per entry of the result"
    OPERAND = "one per entry of the operand"
    UPDATE = "one per entry that is written"
    SORT = "n log2 n per row"
    WINDOW = "one per entry of a window and result"
    WINDOW_GRADIENT = "one per entry of a window and operand"
    CONTRACTION = "two per product"
    RAGGED = "two per product, each row with one group"
    CONVOLUTION = "two per product, apart from zeros that dilation inserts"
    FFT = "5 n log2 n"
    ESTIMATE = "what the kernel says of itself"


class Passes(enum.Flag):
    """What a primitive hands on unchanged, entry by entry, from its first operand."""

    NOTHING = 0
    SUM = enum.auto()  # a sum, up to its type and layout
    STREAM = enum.auto()  # a residual stream, up to its type and layout
    WEIGHT = enum.auto()  # a weight at the same places, up to its sign


SUM, STREAM, WEIGHT = Passes.SUM, Passes.STREAM, Passes.WEIGHT
ANY = -1  # Any operand may be meant.


class Row(NamedTuple):
    """What is known of one primitive.

    Attributes:
      kind: its family.
      flops: how many FLOPs it takes.
      fused: whether a compiler merges it into its neighbors, so that it moves no memory itself.
      runs: whether a compiler runs anything for it; a product reads its operand in another order.
      passes: what it hands on unchanged.
      combine: the operation that joins its operands or the positions that it reduces.
      neutral: the operand that is the result where all others are zero; ``ANY`` of them, or None.
      zeros: what makes its result zero: "any" zero operand, a zero in the "first", or one in the
        first of a "quotient"; "" where the primitive itself is asked.
      finite: whether value and derivative are finite at a real zero, whatever the others are.
      poles: the one operand whose zeros can make infinities; None where each can.
      root: whether it is a square root, or one over it.
      core: how many axes at the end of its operands make up one problem of linear algebra.
    """

    kind: Kind
    flops: Flops
    fused: bool = False
    runs: bool = True
    passes: Passes = Passes.NOTHING
    combine: str | None = None
    neutral: int | None = None
    zeros: str = ""
    finite: bool = False
    poles: int | None = None
    root: bool = False
    core: int = 0


merged = functools.partial(Row, fused=True)
moved = functools.partial(merged, flops=Flops.NONE)
entrywise = functools.partial(merged, Kind.ELEMENTWISE, Flops.RESULT)
relabeled = functools.partial(merged, Kind.ELEMENTWISE, Flops.NONE)
anchor = functools.partial(Row, fused=False)  # it reads and writes memory
uncounted = functools.partial(anchor, flops=Flops.UNKNOWN)

ROWS: dict[str, Row] = {
    # Functions of entries.
    "abs": entrywise(finite=True),
    "acos": entrywise(),
    "acosh": entrywise(),
    "add": entrywise(combine="sum", neutral=ANY, finite=True),
    "add_any": entrywise(neutral=ANY, finite=True),
    "and": entrywise(zeros="any"),
    "asin": entrywise(finite=True),
    "asinh": entrywise(finite=True),
    "atan": entrywise(finite=True),
    "atan2": entrywise(),
    "atanh": entrywise(),
    "bessel_i0e": entrywise(finite=True),
    "bessel_i1e": entrywise(finite=True),
    "cbrt": entrywise(),
    "ceil": entrywise(finite=True),
    "clamp": entrywise(finite=True),
    "clz": entrywise(),
    "complex": relabeled(finite=True),
    "conj": entrywise(finite=True),
    "convert_element_type": relabeled(finite=True, passes=SUM | STREAM | WEIGHT),
    "copy": relabeled(runs=False, neutral=0, finite=True, passes=SUM | STREAM | WEIGHT),
    "cos": entrywise(finite=True),
    "cosh": entrywise(finite=True),
    "digamma": entrywise(),
    "div": entrywise(combine="quotient", zeros="quotient", poles=1),
    "eq": entrywise(),
    "eq_to": entrywise(),
    "erf": entrywise(finite=True),
    "erf_inv": entrywise(finite=True),
    "erfc": entrywise(finite=True),
    "exp": entrywise(finite=True),
    "exp2": entrywise(finite=True),
    "expm1": entrywise(finite=True),
    "floor": entrywise(finite=True),
    "ge": entrywise(),
    "gt": entrywise(),
    "igamma": entrywise(),
    "igamma_grad_a": entrywise(),
    "igammac": entrywise(),
    "imag": relabeled(finite=True),
    "integer_pow": entrywise(),
    "is_finite": entrywise(),
    "layout_constraint": relabeled(),
    "le": entrywise(),
    "le_to": entrywise(),
    "lgamma": entrywise(),
    "log": entrywise(),
    "log1p": entrywise(finite=True),
    "log2": entrywise(),
    "logistic": entrywise(finite=True),
    "lt": entrywise(),
    "lt_to": entrywise(),
    "max": entrywise(finite=True),
    "min": entrywise(finite=True),
    "mul": entrywise(combine="prod", zeros="any", finite=True),
    "mulhi": entrywise(zeros="any"),
    "name": relabeled(runs=False, finite=True, passes=STREAM | WEIGHT),
    "ne": entrywise(),
    "neg": entrywise(finite=True, passes=WEIGHT),
    "nextafter": entrywise(),
    "not": entrywise(),
    "one_minus_square": entrywise(),
    "or": entrywise(neutral=ANY),
    "polygamma": entrywise(),
    "polynomial": entrywise(),
    "population_count": entrywise(),
    "pow": entrywise(poles=0),
    "real": relabeled(finite=True),
    "reciprocal": entrywise(),
    "reduce_precision": relabeled(finite=True, passes=SUM | WEIGHT),
    "regularized_incomplete_beta": entrywise(),
    "rem": entrywise(zeros="quotient", poles=1),
    "round": entrywise(finite=True),
    "rsqrt": entrywise(root=True),
    "select_n": entrywise(finite=True),
    "shift_left": entrywise(zeros="first"),
    "shift_right_arithmetic": entrywise(zeros="first"),
    "shift_right_logical": entrywise(zeros="first"),
    "sign": entrywise(finite=True),
    "sin": entrywise(finite=True),
    "sinh": entrywise(finite=True),
    "sqrt": entrywise(root=True),
    "square": entrywise(finite=True),
    "stage": entrywise(),
    "stop_gradient": relabeled(runs=False, finite=True, passes=WEIGHT),
    "sub": entrywise(combine="difference", neutral=0, finite=True),
    "tan": entrywise(finite=True),
    "tanh": entrywise(finite=True),
    "with_memory_space_constraint": relabeled(),
    "xla_metadata_value": entrywise(),
    "xor": entrywise(),
    "zeta": entrywise(),
    # What may differ from device to device of a shard_map changes; entries stay as they are.
    "vary_unreduced_cast": merged(Kind.TYPE, Flops.RESULT, zeros="first"),
    "vary_unreduced_cast_p": merged(Kind.TYPE, Flops.RESULT, zeros="first"),
    "reduced_vary_cast_p": merged(Kind.TYPE, Flops.RESULT, zeros="first"),
    "reduced_vary_cast": merged(Kind.TYPE, Flops.RESULT, zeros="first"),
    "preduced": merged(Kind.TYPE, Flops.RESULT, zeros="first"),
    "pvary": moved(Kind.TYPE, zeros="first", passes=WEIGHT),
    # Only where entries lie changes.
    "reshard": moved(Kind.RESHARDING, passes=WEIGHT),
    "sharding_constraint": moved(Kind.RESHARDING, runs=False, passes=WEIGHT),
    # Operands pass one by one.
    "optimization_barrier": moved(Kind.EACH),
    "device_put": moved(Kind.EACH),
    # The second operand only carries an order of evaluation.
    "tie": uncounted(Kind.TIE),
    # Bits are read as another type.
    "bitcast_convert_type": moved(Kind.BITCAST),
    # These only look at values.
    "debug_callback": uncounted(Kind.EFFECT),
    "debug_print": uncounted(Kind.EFFECT),
    "dce_sink": uncounted(Kind.EFFECT),
    # Layout: entries are moved.
    "transpose": moved(Kind.TRANSPOSE, runs=False, passes=SUM | STREAM),
    "squeeze": moved(Kind.SQUEEZE, runs=False, passes=SUM),
    "broadcast_in_dim": moved(Kind.BROADCAST, runs=False, passes=SUM),
    "reshape": moved(Kind.RESHAPE, runs=False, passes=SUM | STREAM),
    "concatenate": moved(Kind.CONCATENATE),
    "split": moved(Kind.SPLIT),
    "slice": moved(Kind.SLICE),
    "pad": moved(Kind.PAD),
    "stack": moved(Kind.STACK),
    "unstack": moved(Kind.UNSTACK),
    "tile": moved(Kind.TILE),
    "rev": moved(Kind.REVERSE),
    # Arrays come from nothing.
    "iota": moved(Kind.FRESH),
    "empty": moved(Kind.FRESH),
    "zeros_like": moved(Kind.FRESH),
    # Reductions, cumulative sums, sorting.
    "reduce_sum": merged(Kind.REDUCTION, Flops.OPERAND, combine="sum"),
    "reduce_max": merged(Kind.REDUCTION, Flops.OPERAND, combine="max"),
    "reduce_min": merged(Kind.REDUCTION, Flops.OPERAND, combine="min"),
    "reduce_prod": merged(Kind.REDUCTION, Flops.OPERAND, combine="prod"),
    "reduce_or": merged(Kind.REDUCTION, Flops.OPERAND, combine="or"),
    "reduce_and": merged(Kind.REDUCTION, Flops.OPERAND, combine="and"),
    "reduce_xor": merged(Kind.REDUCTION, Flops.OPERAND),
    "argmax": merged(Kind.POSITION, Flops.OPERAND),
    "argmin": merged(Kind.POSITION, Flops.OPERAND),
    "reduce": merged(Kind.FOLD, Flops.OPERAND),
    "cumsum": anchor(Kind.CUMULATIVE, Flops.OPERAND, combine="sum"),
    "cumprod": anchor(Kind.CUMULATIVE, Flops.OPERAND),
    "cummax": anchor(Kind.CUMULATIVE, Flops.OPERAND),
    "cummin": anchor(Kind.CUMULATIVE, Flops.OPERAND),
    "cumlogsumexp": anchor(Kind.CUMULATIVE, Flops.OPERAND),
    "sort": anchor(Kind.SORT, Flops.SORT),
    "top_k": anchor(Kind.SORT, Flops.SORT),
    "approx_top_k": anchor(Kind.SORT, Flops.SORT),
    # Contractions.
    "dot_general": anchor(Kind.CONTRACTION, Flops.CONTRACTION),
    "ragged_dot_general": anchor(Kind.RAGGED, Flops.RAGGED),
    "conv_general_dilated": anchor(Kind.CONVOLUTION, Flops.CONVOLUTION),
    # Indexing.
    "gather": anchor(Kind.GATHER, Flops.NONE),
    "scatter": moved(Kind.SCATTER),
    "scatter-add": merged(Kind.SCATTER, Flops.UPDATE),
    "scatter-sub": merged(Kind.SCATTER, Flops.UPDATE),
    "scatter-mul": merged(Kind.SCATTER, Flops.UPDATE),
    "scatter-min": merged(Kind.SCATTER, Flops.UPDATE),
    "scatter-max": merged(Kind.SCATTER, Flops.UPDATE),
    "dynamic_slice": moved(Kind.DYNAMIC_SLICE),
    "dynamic_update_slice": moved(Kind.DYNAMIC_UPDATE),
    # Pooling and its gradients.
    "reduce_window_sum": anchor(Kind.POOL, Flops.WINDOW, combine="sum"),
    "reduce_window_max": anchor(Kind.POOL, Flops.WINDOW, combine="max"),
    "reduce_window_min": anchor(Kind.POOL, Flops.WINDOW, combine="min"),
    "reduce_window": anchor(Kind.WINDOW_FOLD, Flops.WINDOW),
    "select_and_scatter_add": anchor(Kind.POOL_GRADIENT, Flops.WINDOW_GRADIENT),
    "select_and_gather_add": uncounted(Kind.POOL_GRADIENT),
    # Linear algebra and transforms.
    "cholesky": uncounted(Kind.MATRIX, core=2),
    "cholesky_update": uncounted(Kind.MATRIX, core=2),
    "eig": uncounted(Kind.MATRIX, core=2),
    "eigh": uncounted(Kind.MATRIX, core=2),
    "geqp3": uncounted(Kind.MATRIX, core=2),
    "geqrf": uncounted(Kind.MATRIX, core=2),
    "hessenberg": uncounted(Kind.MATRIX, core=2),
    "householder_product": uncounted(Kind.MATRIX, core=2),
    "lu": uncounted(Kind.MATRIX, core=2),
    "ormqr": uncounted(Kind.MATRIX, core=2),
    "qr": uncounted(Kind.MATRIX, core=2),
    "schur": uncounted(Kind.MATRIX, core=2),
    "svd": uncounted(Kind.MATRIX, core=2),
    "symmetric_product": uncounted(Kind.MATRIX, core=2),
    "tridiagonal": uncounted(Kind.MATRIX, core=2),
    "lu_pivots_to_permutation": uncounted(Kind.MATRIX, core=1),
    "tridiagonal_solve": uncounted(Kind.MATRIX, core=1),
    "triangular_solve": uncounted(Kind.SOLVE, core=2),
    "fft": anchor(Kind.FFT, Flops.FFT),
    # Fused attention.
    "dot_product_attention_fwd": uncounted(Kind.ATTENTION),
    "dot_product_attention_fwd_wrapper": uncounted(Kind.ATTENTION),
    "dot_product_attention_bwd": uncounted(Kind.ATTENTION),
    "dot_product_attention_bwd_wrapper": uncounted(Kind.ATTENTION),
    # Random numbers and their keys.
    "random_bits": uncounted(Kind.RANDOM),
    "random_gamma": uncounted(Kind.RANDOM),
    "rng_bit_generator": uncounted(Kind.RANDOM),
    "random_seed": moved(Kind.KEYS),
    "random_wrap": moved(Kind.KEYS),
    "random_unwrap": moved(Kind.KEYS),
    "random_split": moved(Kind.KEYS),
    "random_clone": moved(Kind.KEYS),
    "random_fold_in": moved(Kind.KEYS),
    # Collectives.
    "psum": uncounted(Kind.COLLECTIVE, combine="sum"),
    "psum_invariant": uncounted(Kind.COLLECTIVE, combine="sum"),
    "pmax": uncounted(Kind.COLLECTIVE, combine="max"),
    "pmin": uncounted(Kind.COLLECTIVE, combine="min"),
    "ppermute": uncounted(Kind.COLLECTIVE),
    "pbroadcast": moved(Kind.COLLECTIVE),
    "axis_index": moved(Kind.COLLECTIVE),
    "all_gather": uncounted(Kind.COLLECTIVE),
    "all_gather_invariant": uncounted(Kind.COLLECTIVE),
    "reduce_scatter": uncounted(Kind.COLLECTIVE),
    "all_to_all": uncounted(Kind.COLLECTIVE),
    # Equations that hold programs.
    "jit": uncounted(Kind.INLINED),
    "closed_call": uncounted(Kind.INLINED),
    "custom_vmap_call": uncounted(Kind.INLINED),
    "composite": uncounted(Kind.INLINED),
    "remat2": uncounted(Kind.REMAT),
    "custom_jvp_call": uncounted(Kind.CUSTOM_JVP),
    "custom_vjp_call": uncounted(Kind.CUSTOM_VJP),
    "shard_map": uncounted(Kind.SHARDS),
    "scan": uncounted(Kind.LOOP),
    "while": uncounted(Kind.WHILE),
    "cond": uncounted(Kind.BRANCH),
    # Kernels, each of which is one primitive for any program.
    "pallas_call": anchor(Kind.KERNEL, Flops.ESTIMATE),
    "ffi_call": uncounted(Kind.KERNEL),
    # A size that is a name becomes a number.
    "dim_as_value": uncounted(Kind.SIZE),
    # References are read and written, or Python computes.
    "get": uncounted(Kind.OPAQUE),
    "swap": uncounted(Kind.OPAQUE),
    "addupdate": uncounted(Kind.OPAQUE),
    "pure_callback": uncounted(Kind.OPAQUE),
    "io_callback": uncounted(Kind.OPAQUE),
    # Known by their cost alone.
    "broadcast_to": moved(Kind.OTHER),
    "create_token": moved(Kind.OTHER),
    "empty2": moved(Kind.OTHER),
    "relayout": moved(Kind.OTHER),
}

NO_ROW = uncounted(Kind.UNKNOWN)


def row(name: str) -> Row:
    """The row of a primitive of this name, ``NO_ROW`` where there is none."""
    return ROWS.get(name, NO_ROW)


def of(step: Any) -> Row:
    """The row of a step of a tape, or of an equation of a jaxpr."""
    return ROWS.get(getattr(step, "eqn", step).primitive.name, NO_ROW)


def kind(step: Any) -> Kind:
    """The family of a step's or an equation's primitive."""
    return ROWS.get(getattr(step, "eqn", step).primitive.name, NO_ROW).kind


def entry(step: Any, table: Mapping[str, Any]) -> Any:
    """What another table has by the name of a step's or an equation's primitive, or None."""
    return table.get(getattr(step, "eqn", step).primitive.name)


def names(*kinds: Kind) -> list[str]:
    """The primitives of some families."""
    return [name for name, found in ROWS.items() if found.kind in kinds]
