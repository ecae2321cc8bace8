"""Which forms of the InfoNCE kernels ship."""

from umer1_kernels.infonce_block import options, tile_arguments
from umer1_kernels.infonce_gradients import LABEL_WIDTH, gradient_tiles, label_gradients
from umer1_kernels.infonce_sweep import COMBINE_DEPTH, COMBINE_SIZE, combine_parts, sweep_tiles
from umer1_kernels.infonce_tiles import Tile, tiles_of
from umer1_kernels.variants import Variant

_STRIDES = ("query_stride", "columns_stride", "gradient_stride")
_TYPES = (
    dict.fromkeys(("row_parts", "column_parts", "positive", "row_lse", "column_lse", "temperature"), "*fp32")
    | dict.fromkeys(("parts", "combined", "positive_gradient", "grad_query", "grad_columns"), "*fp32")
    | dict.fromkeys(("labels", "row_ids", "column_ids", "order"), "*i64")
    | dict.fromkeys(("num_rows", "num_columns", "width", "column_offset", "size", "blocks", "combined_stride"), "i32")
    | dict.fromkeys(_STRIDES, "i32")
    | dict.fromkeys(("factor", "weight"), "fp32")
)


def _variant(name: str, kernel, embeddings: dict[str, str], constexprs: dict, options: dict[str, int]) -> Variant:
    """embeddings: the types of what is read or written in the inputs' dtype."""
    types = {name: kind for name, kind in (_TYPES | embeddings).items() if name in kernel.arg_names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in ("width", *_STRIDES)]
    return Variant(
        name=f"{kernel.__name__} {name}",
        kernel=kernel,
        types=types,
        constexprs=dict(TEMPERATURE_TENSOR=True, **constexprs),
        divisible_by_16=tuple(aligned),
        options=options,
    )


def _tile_variant(kernel, tile: Tile, dtype: str, bulk_copies: bool, **more) -> Variant:
    embeddings = dict.fromkeys(("query", "columns", "gradient"), f"*{dtype}")
    if bulk_copies:
        shapes = dict(
            query=(tile.rows, tile.inner), columns=(tile.columns, tile.inner), gradient=(tile.rows, tile.columns)
        )
        embeddings = {name: f"tensordesc<{dtype}[{rows},{columns}]>" for name, (rows, columns) in shapes.items()}
    constexprs = dict(TMA=bulk_copies, LABELS=True, IDS=True, SYMMETRIC=True, **more) | tile_arguments(tile)
    name = f"{tile.rows}x{tile.columns}x{tile.inner} {dtype} {'bulk copies' if bulk_copies else 'pointers'}"
    return _variant(name, kernel, embeddings, constexprs | dict(INTERPRET=False), options(tile))


def variants(arch: int) -> list[Variant]:
    """What is launched, with all options on, which takes the most registers.

    Left out: fp16, whose code is bf16's but for the conversions; for GPUs other than Hopper all but the largest tile,
    and bulk copies or pointers, whichever is the exception there; the smallest fp32 tile.
    """
    found = []
    for itemsize, dtype in ((2, "bf16"), (4, "fp32")):
        largest, *smaller = tiles_of(arch)[itemsize]
        forms = [(largest, arch >= 90)]
        if arch == 90:
            forms += [(largest, False), *((tile, True) for tile in (smaller if itemsize == 2 else smaller[:1]))]
        for tile, bulk_copies in forms:
            found.append(_tile_variant(sweep_tiles, tile, dtype, bulk_copies, STATISTICS=True))
            found.append(_tile_variant(gradient_tiles, tile, dtype, bulk_copies))
    if arch != 90:
        return found
    sizes = dict(SIZE=COMBINE_SIZE, DEPTH=COMBINE_DEPTH)
    found.append(_variant("sums", combine_parts, {}, dict(CONTINUE=True, KINDS=5, **sizes), {}))
    embeddings = dict(query="*bf16", columns="*bf16")
    return [*found, _variant("bf16", label_gradients, embeddings, dict(WIDTH=LABEL_WIDTH), {})]
