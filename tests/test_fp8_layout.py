"""P and V of 8 bits, byte by byte: what the kernel's own index maths does, against the layouts that PTX documents.

Instructions are played in NumPy as the PTX ISA describes them: the fragments of wgmma's accumulator and of its A
operand, ldmatrix.trans, prmt, stmatrix, and the swizzled K-major tile that a descriptor names.
"""

import ctypes

import numpy as np
import pytest
from compilers import HERE, host_library

LANES = range(32)
STEP_KEYS, GROUP_DIMS = 32, 16  # of one ldmatrix.x4 and one stmatrix.x4


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return host_library(tmp_path_factory.mktemp("host"), "fp8_layout", [HERE / "host" / "fp8_layout.cpp"],
                        f"-I{HERE / 'host' / 'lane'}", "-Wno-unknown-pragmas")


def place_in_a_operand(lane, register, byte):
    """(row, place of the contraction) of an e4m3 A fragment: wgmma m64nNk32, rows of one warp."""
    return lane // 4 + 8 * (register % 2), 4 * (lane % 4) + byte + 16 * (register // 2)


def column_of_accumulator(lane, index):
    """(row, column) of element `index` of wgmma's fp32 accumulator, rows of one warp."""
    return lane // 4 + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * (lane % 4) + index % 2


def e4m3(code):
    return np.ldexp(code, -9) if code < 8 else np.ldexp(8 + code % 8, code // 8 - 10)


@pytest.mark.parametrize("tile_n", [64, 96, 128])
def test_probabilities_meet_their_keys(host, tile_n):
    """Every column's P lies, in the A operand, at the place where the transposed V has that key."""
    words = (ctypes.c_uint32 * (tile_n // 8))()
    for lane in LANES:
        scores = np.empty(tile_n // 2, np.float32)
        for index in range(tile_n // 2):
            _, column = column_of_accumulator(lane, index)
            scores[index] = np.log2(e4m3(1 + column % 96))  # small enough for the fast way
        assert host.pack_probabilities(tile_n, scores.ctypes.data_as(ctypes.c_void_p), words) == 1
        for word, value in enumerate(words):
            for byte in range(4):
                _, place = place_in_a_operand(lane, word % 4, byte)
                key = 32 * (word // 4) + place // 16 * 16 + host.key_at_place(place % 16)
                assert value >> 8 * byte & 255 == 1 + key % 96, (lane, word, byte)


def test_rows_of_probabilities_do_not_mix(host):
    words = (ctypes.c_uint32 * 12)()
    rows = np.array([column_of_accumulator(0, index)[0] for index in range(48)])
    scores = np.where(rows == 0, 0, -2).astype(np.float32)  # 1 in the first row, 1/4 in the other
    assert host.pack_probabilities(96, scores.ctypes.data_as(ctypes.c_void_p), words) == 1
    for word, value in enumerate(words):
        row, _ = place_in_a_operand(0, word % 4, 0)
        assert value == (0x38383838 if row == 0 else 0x28282828)


def test_every_key_has_one_place(host):
    assert sorted(host.key_at_place(place) for place in range(16)) == list(range(16))


def swizzled(offset, width):
    """Where TMA and wgmma keep a byte of a tile whose rows are `width` bytes wide: bits 4-6 with bits 7-9."""
    return offset ^ (offset >> 3 & (width - 16))


def turning_lanes(host, chunk_bytes):
    words = (ctypes.c_uint32 * 4)()
    lanes = []
    for lane in LANES:
        host.turning_lane(lane, chunk_bytes, words)
        lanes.append(tuple(words))
    return np.array(lanes, np.int64).T


def load_matrices_transposed(memory, addresses):
    """ldmatrix.x4.trans: each lane's four words, as (matrix, lane, byte)."""
    matrices = np.stack([memory[a:a + 16] for a in addresses]).reshape(4, 8, 8, 2)  # matrix, row, element, byte
    return matrices.transpose(0, 2, 1, 3).reshape(4, 32, 4)  # lane 4 i + j: element i of rows 2 j and 2 j + 1


def store_matrices(memory, addresses, words):
    """stmatrix.x4 of (matrix, lane, byte): each quad's words are a row."""
    for address, row in zip(addresses, words.reshape(32, 16), strict=True):
        memory[address:address + 16] = row


def byte_perm(x, y, selectors):
    both = np.concatenate([x, y], axis=1)
    return np.stack([both[np.arange(32), selectors >> 4 * byte & 7] for byte in range(4)], axis=1)


def turn(host, loaded, keys, dims, chunk_bytes):
    """src/kernels/forward_transpose.cuh's loop over one block."""
    source, target, evens, odds = turning_lanes(host, chunk_bytes)
    turned = np.full(keys * dims, -1, np.int64)
    for step in range(keys // STEP_KEYS):
        for group in range(dims // GROUP_DIMS):
            column = group * GROUP_DIMS
            start = column // chunk_bytes * keys * chunk_bytes
            addresses = (start + source ^ column % chunk_bytes) + step * STEP_KEYS * chunk_bytes
            x = load_matrices_transposed(loaded, addresses)
            out = np.stack([byte_perm(x[0], x[1], evens), byte_perm(x[0], x[1], odds),
                            byte_perm(x[2], x[3], evens), byte_perm(x[2], x[3], odds)])
            store_matrices(turned, target + step * dims * STEP_KEYS + group * GROUP_DIMS * STEP_KEYS, out)
    return turned


@pytest.mark.parametrize(("dims", "chunk_bytes"), [(32, 32), (64, 64), (80, 128), (96, 128), (128, 128), (192, 64),
                                                   (256, 128)])
@pytest.mark.parametrize("keys", [64, 96, 128])
def test_turned_values_lie_where_the_product_reads_them(host, keys, dims, chunk_bytes):
    loaded = np.full(-(-dims // chunk_bytes) * keys * chunk_bytes, -2, np.int64)
    for key in range(keys):  # as TMA brings it: [chunk][key][chunk_bytes], swizzled
        for dim in range(dims):
            offset = key * chunk_bytes + dim % chunk_bytes
            loaded[dim // chunk_bytes * keys * chunk_bytes + swizzled(offset, chunk_bytes)] = 1000 * key + dim
    turned = turn(host, loaded, keys, dims, chunk_bytes)
    for step in range(keys // STEP_KEYS):  # as a descriptor reads it: [dim][32 places], K-major, 32 bytes of swizzle
        for dim in range(dims):
            for place in range(STEP_KEYS):
                key = step * STEP_KEYS + place // 16 * 16 + host.key_at_place(place % 16)
                found = turned[step * dims * STEP_KEYS + swizzled(dim * STEP_KEYS + place, 32)]
                assert found == 1000 * key + dim, (step, dim, place)


@pytest.mark.parametrize("chunk_bytes", [32, 64, 128])
def test_turning_meets_no_bank_twice(host, chunk_bytes):
    """The 8 rows of each matrix lie in different 16-byte columns of the 128 bytes that the banks are wide."""
    source, target, *_ = turning_lanes(host, chunk_bytes)
    for addresses in (target, *([source] if chunk_bytes == 128 else [])):
        for matrix in addresses.reshape(4, 8):
            assert len(set(matrix // 16 % 8)) == 8


def test_turned_tile(host):
    sizes = (ctypes.c_int * 4)()
    host.turned_tile(sizes)
    assert list(sizes) == [80 * 32, 16 * 32, 80 * 96, 80 * 32 // 16]
