"""Arrays on a GPU: every framework's, in as views, out as results, ordered on its streams."""

import gc
import os
import time

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the memory

from fa3 import _array

Border = _array.Border
pytestmark = pytest.mark.gpu
SLEEP = 200_000_000  # GPU cycles, about 0.1 s


def need(framework):
    """The framework with a GPU, or skip saying why."""
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch sees no CUDA device")
        return torch
    if framework == "cupy":
        return pytest.importorskip("cupy", reason="CuPy is not installed")
    if framework == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        try:
            jax.devices("cuda")
        except RuntimeError as error:
            pytest.skip(f"this JAX has no CUDA: {error}")
        return jax
    cuda = pytest.importorskip("numba.cuda", reason="Numba is not installed")
    if not cuda.is_available():
        pytest.skip("Numba finds no CUDA")
    return cuda


def make(framework, dtype="float32", shape=(3, 4)):
    """(array, address) with 0, 1, 2 … in it."""
    module = need(framework)
    values = np.arange(int(np.prod(shape))).reshape(shape)
    if framework == "torch":
        array = module.tensor(values, device="cuda").to(getattr(module, dtype))
        return array, array.data_ptr()
    if framework == "cupy":
        array = module.asarray(values.astype(dtype))
        return array, array.data.ptr
    if framework == "jax":
        with module.default_device(module.devices("cuda")[0]):
            array = module.numpy.asarray(values, dtype=dtype)
        return array, array.unsafe_buffer_pointer()
    array = module.to_device(values.astype(dtype))
    return array, array.__cuda_array_interface__["data"][0]


class Memory:
    """A view's memory for PyTorch to read and write, whatever type the result has."""

    def __init__(self, view):
        typestr = {1: "|u1", 2: "<i2", 4: "<i4"}[view.itemsize]
        strides = tuple(stride * view.itemsize for stride in view.strides)
        self.__cuda_array_interface__ = {"version": 2, "shape": view.shape, "typestr": typestr,
                                         "strides": strides, "data": (view.data, False)}

    @classmethod
    def tensor(cls, view):
        return need("torch").as_tensor(cls(view), device=f"cuda:{view.device_id}")


def write_late(border, view, value):
    """Enqueue on our stream: sleep, then fill the memory, as a kernel that takes long would."""
    torch = need("torch")
    stream = torch.cuda.default_stream(view.device_id)
    if border.stream:  # ExternalStream(0) would be a new stream, not the default one
        stream = torch.cuda.ExternalStream(border.stream, device=view.device_id)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        Memory.tensor(view).fill_(value)


CASES = [("torch", "float16"), ("torch", "bfloat16"), ("torch", "float8_e4m3fn"), ("torch", "float32"),
         ("torch", "int32"), ("cupy", "float16"), ("cupy", "float32"), ("cupy", "int32"), ("jax", "float16"),
         ("jax", "bfloat16"), ("jax", "float8_e4m3fn"), ("jax", "int32"), ("numba", "float16"),
         ("numba", "float32")]


@pytest.mark.parametrize("framework, dtype", CASES)
def test_view(framework, dtype):
    array, address = make(framework, dtype)
    border = Border(array, "q")
    view = border.view
    assert (border.framework, border.device_type, border.device_id) == (framework, 2, 0)
    assert (view.dtype, view.shape, view.strides, view.data) == (dtype, (3, 4), (4, 1), address)
    assert view.readonly == (framework == "jax")
    again = border.take(array, "k")
    assert again.data == address


@pytest.mark.parametrize("framework", ["torch", "cupy", "numba"])
def test_strided_views(framework):
    array, address = make(framework)
    view = Border(array[1:, ::2], "q").view
    assert (view.shape, view.strides, view.data) == ((2, 2), (4, 2), address + 16)
    empty, _ = make(framework, shape=(0, 4))
    assert Border(empty, "q").view.shape == (0, 4)


@pytest.mark.parametrize("framework, dtype", CASES)
def test_result(framework, dtype):
    torch = need("torch")
    array, _ = make(framework, dtype)
    border = Border(array, "q")
    output = border.empty((5, 2), dtype)
    assert (output.view.device_type, output.view.dtype, output.view.strides) == (2, dtype, (2, 1))
    write_late(border, output.view, 0)
    result = output.array()
    module = type(result).__module__.partition(".")[0]
    assert module == {"numba": "cupy", "jax": "jaxlib"}.get(framework, framework)
    assert tuple(result.shape) == (5, 2) and dtype in str(result.dtype)
    if framework == "jax":
        assert not np.asarray(result).view(np.uint8).any()
    else:
        torch.cuda.synchronize()
        assert not Memory.tensor(output.view).any()


def test_retyped_results():
    cupy = need("cupy")
    array = cupy.zeros((3, 4), "uint8")
    border = Border(array, "q", dtype="float8_e4m3fn")
    assert border.view.dtype == "float8_e4m3fn"
    output = border.empty((3, 4), "bfloat16")
    assert output.view.dtype == "bfloat16" and output.array().dtype == np.uint16


def test_cupy_bfloat16():
    cupy = need("cupy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    try:
        array = cupy.zeros((3, 4), ml_dtypes.bfloat16)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this CuPy has no bfloat16: {error}")
    border = Border(array, "q")
    assert (border.view.dtype, border.view.data) == ("bfloat16", array.data.ptr)
    assert border.empty((2,), "bfloat16").array().dtype == array.dtype


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_current_stream(framework):
    module = need(framework)
    array, _ = make(framework)
    assert Border(array, "q").stream == 0
    stream = module.cuda.Stream()
    with stream:
        border = Border(array, "q")
        assert border.stream == (stream.cuda_stream if framework == "torch" else stream.ptr) != 0
        border.empty((2,), "float32").array()
    for spelled in (stream, getattr(stream, "cuda_stream", None) or stream.ptr):
        given = Border(array, "q", stream=spelled)
        assert given.stream == border.stream and given.stream_given
        given.take(array, "k")
        given.empty((2,), "float32").array()


@pytest.mark.parametrize("other", ["torch", "cupy", "jax", "numba"])
def test_our_stream_waits_for_every_producer(other):
    """The second array is made late on its framework's own stream; what ours then does comes later still."""
    torch = need("torch")
    module = need(other)
    ours = torch.cuda.Stream()
    q, _ = make("torch")
    late = None
    if other == "torch":
        theirs = torch.cuda.Stream()
        with torch.cuda.stream(theirs):
            torch.cuda._sleep(SLEEP)
            late = torch.full((1 << 20,), 7, dtype=torch.int32, device="cuda")
            border = Border(q, "q", stream=ours)
            view = border.take(late, "k")
    elif other == "cupy":
        theirs = module.cuda.Stream(non_blocking=True)
        with torch.cuda.stream(torch.cuda.ExternalStream(theirs.ptr)):
            torch.cuda._sleep(SLEEP)
        with theirs:
            late = module.full((1 << 20,), 7, "int32")
            border = Border(q, "q", stream=ours)
            view = border.take(late, "k")
    elif other == "numba":
        theirs = module.stream()
        late = module.device_array((1 << 20,), "int32", stream=theirs)
        handle = Border(late, "q").stream
        with torch.cuda.stream(torch.cuda.ExternalStream(handle)):
            torch.cuda._sleep(SLEEP)
            Memory.tensor(Border(late, "k").view).fill_(7)
        border = Border(q, "q", stream=ours)
        view = border.take(late, "k")
    else:
        with module.default_device(module.devices("cuda")[0]):
            big = module.numpy.ones((8192, 8192), "bfloat16")
            for _ in range(30):
                big = big @ big * (1 / 8192)
            late = (big[:1024, :1024] * 7).reshape(-1).astype("int32")
        border = Border(q, "q", stream=ours)
        view = border.take(late, "k")
    with torch.cuda.stream(ours):
        read = Memory.tensor(view).clone()
    ours.synchronize()
    assert (read == 7).all()


def test_stream_wait():
    torch = need("torch")
    slow, ours = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(5 * SLEEP)
    begun = time.perf_counter()
    _array.stream_wait(ours.cuda_stream, slow.cuda_stream, 0)
    assert time.perf_counter() - begun < 0.05  # the host does not wait
    event = ours.record_event()
    assert not event.query()
    slow.synchronize()
    ours.synchronize()
    assert event.query()


def test_jax_results_come_after_our_stream():
    """JAX reads what a slow kernel on our stream writes, and what it read stays alive until then."""
    jax = need("jax")
    array, _ = make("jax", "int32", (1 << 20,))
    for value in range(5):
        border = Border(array + value, "q")
        output = border.empty((1 << 20,), "int32")
        write_late(border, output.view, value)
        result = output.array()
        del border, output
        gc.collect()
        scratch = [jax.numpy.full((1 << 20,), -1, "int32") for _ in range(4)]  # would take freed memory
        assert (np.asarray(result + 0) == value).all()
        del scratch


def test_captured_in_a_graph():
    torch = need("torch")
    q = torch.zeros(4, 8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    Border(q, "q").empty((4, 8), "float32")
    with torch.cuda.graph(graph):
        border = Border(q, "q")
        border.take(q, "k")
        out = border.empty((4, 8), "float32").array()
        out.copy_(q)
    q.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert (out == 3).all()


def test_wrong_device():
    torch = need("torch")
    border = Border(torch.zeros(2, device="cuda"), "q")
    with pytest.raises(BufferError, match=r"k: on the CPU, but q is on cuda:0"):
        border.take(np.zeros(2), "k")
    pinned = Border(torch.zeros(2).pin_memory(), "q")
    assert (pinned.device_type, pinned.stream) == (1, 0)
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: cuda:1 cannot be told from cuda:0 here")
    with pytest.raises(BufferError, match=r"k: on cuda:1, but q is on cuda:0"):
        border.take(torch.zeros(2, device="cuda:1"), "k")
    there = Border(torch.zeros(2, device="cuda:1"), "q")  # though the current device is 0
    assert there.device_id == 1 and there.empty((2,), "float32").array().device.index == 1


def test_managed_memory():
    cupy = need("cupy")
    memory = cupy.cuda.malloc_managed(64)
    array = cupy.ndarray((16,), "float32", memory)
    border = Border(array, "q")
    assert (border.device_type, border.device_id, border.view.data) == (2, 0, array.data.ptr)


@pytest.mark.parametrize("framework", ["torch", "cupy", "jax"])
def test_out_and_memory_that_comes_back(framework):
    array, address = make(framework)
    border = Border(array, "q")
    if framework == "jax":
        with pytest.raises(BufferError, match=r"^out: .* read-only"):
            border.wrap(array, "out")
        return
    output = border.wrap(array, "out")
    assert output.array() is array and output.view.data == address
