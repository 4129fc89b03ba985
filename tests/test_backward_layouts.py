"""How dS goes from registers through shared memory into dQ, and dQ into its rows, in the kernels' own indices.

What stmatrix, wgmma and swizzled tiles do is written down here as the PTX ISA has it; what the kernels compute from
threads is repeated from src/kernels/backward_mma.cuh, backward_kernel.cuh and fragment_rows.cuh.
"""

import numpy as np
import pytest

TILE_N, CONSUMERS, WARPGROUP = 128, 2, 128


def swizzled(address, width):
    """Where a byte lies: within 8 rows of `width` bytes the 16-byte units are exchanged."""
    return address ^ (address >> 7 & width // 16 - 1) << 4


def accumulator(thread, i):
    """(row, column) of element i of a thread's part of a 64-row product."""
    return 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (thread % 4) + i % 2


def put_ds(ds, tile_m):
    """Shared memory after every thread's stmatrix of its dS^T."""
    memory = np.full(TILE_N * tile_m, np.nan)  # elements of 2 bytes
    for warpgroup in range(CONSUMERS):
        for warp in range(4):
            fragment = np.empty((32, tile_m // 2))
            for lane in range(32):
                for i in range(tile_m // 2):
                    row, column = accumulator(32 * warp + lane, i)
                    fragment[lane, i] = ds[column, 64 * warpgroup + row]
            for step in range(tile_m // 16):
                for matrix in range(4):
                    for line in range(8):
                        lane = 8 * matrix + line  # gives this row's address
                        row, vector = 64 * warpgroup + 16 * warp + lane % 16, 2 * step + lane // 16
                        address = vector // 8 * TILE_N * 128 + row * 128 + (vector % 8 ^ row % 8) * 16
                        for j in range(4):  # lane 4 line + j holds elements 2 j and 2 j + 1 of the row
                            first = 2 * (4 * step + matrix)
                            memory[address // 2 + 2 * j:][:2] = fragment[4 * line + j, first:first + 2]
    return memory


def columns_of(memory, start, width, chunk_bytes, count, k):
    """A step's operand as wgmma reads it, MN-major: 16 rows of the contraction from `start` on, `count` columns."""
    chunk_columns = width // 2
    where = [[start + m // chunk_columns * chunk_bytes + (k + row) * width + m % chunk_columns * 2
              for m in range(count)] for row in range(16)]
    return memory[swizzled(np.array(where), width) // 2]


@pytest.mark.parametrize(("head_dim", "tile_m", "width"), [(32, 128, 64), (64, 128, 128), (96, 64, 32), (128, 64, 128)])
def test_dq(head_dim, tile_m, width):
    rng = np.random.default_rng(0)
    ds, k = rng.integers(-4, 5, (tile_m, TILE_N)), rng.integers(-4, 5, (TILE_N, head_dim))
    expected = ds @ k
    shared_ds = put_ds(ds, tile_m)
    assert not np.isnan(shared_ds).any()
    chunk_bytes = TILE_N * width
    shared_k = np.full(TILE_N * head_dim, np.nan)
    rows, columns = np.indices(k.shape)
    places = columns // (width // 2) * chunk_bytes + rows * width + columns % (width // 2) * 2
    shared_k[swizzled(places, width) // 2] = k

    share_queries = tile_m > 64
    dq_columns = head_dim if share_queries else head_dim // CONSUMERS
    result = np.full((tile_m, head_dim), np.nan)
    for consumer in range(CONSUMERS):
        ds_start = consumer * TILE_N * 128 if share_queries else 0
        k_start = 0 if share_queries else consumer * (dq_columns // (width // 2)) * chunk_bytes
        product = np.zeros((64, dq_columns))
        for step in range(0, TILE_N, 16):
            product += (columns_of(shared_ds, ds_start, 128, TILE_N * 128, 64, step).T
                        @ columns_of(shared_k, k_start, width, chunk_bytes, dq_columns, step))
        sums = np.empty((dq_columns // 8, WARPGROUP, 4))  # float4s in device memory
        for thread in range(WARPGROUP):
            for i in range(dq_columns // 2):
                sums[i // 4, thread, i % 4] = product[accumulator(thread, i)]
        first_row, first_column = 64 * consumer * share_queries, dq_columns * consumer * (not share_queries)
        for warp in range(4):
            store_fragment(result[first_row + 16 * warp:][:16, first_column:], sums[:, 32 * warp:][:, :32])
    assert np.array_equal(result, expected)


def store_fragment(rows, sums):
    """A warp's 16 rows: pairs of 8 columns by stmatrix into staging, a group of 64 columns at a time."""
    count = 4 * len(sums)
    for i in range(count // 8):
        for matrix, first in enumerate((0, 2, 4, 6)):
            for lane in range(8 * matrix, 8 * matrix + 8):  # gives the address of a row of 8
                row, vector = lane % 16, 2 * (i % 4) + lane // 16
                for j in range(4):
                    x = sums[:, 4 * (lane % 8) + j].reshape(-1)[8 * i + first:][:2]
                    column = i // 4 * 64 + 8 * vector + 2 * j
                    rows[row, column:column + 2] = x
