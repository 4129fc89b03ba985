"""Streams, and the CUDA Array Interface by hand, without a GPU."""

import sys
import types

import numpy as np
import pytest
from capsules import CPU, CUDA, Exporter, Interface, OldExporter

from fa3 import _array, _stream

Border = _array.Border
ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
GPU = (CUDA, 0)


# ---- streams -------------------------------------------------------------------------------------------


class Speaks:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Protocol:
    def __init__(self, handle):
        self.handle_ = handle

    def __cuda_stream__(self):
        return 0, self.handle_


@pytest.mark.parametrize("stream, handle", [
    (0, 0), (1, 0), (2, 2), (4096, 4096), (np.int64(4096), 4096), (Protocol(4096), 4096), (Protocol(1), 0),
    (Speaks(__cuda_stream__=(0, 77)), 77), (Speaks(cuda_stream=55), 55), (Speaks(ptr=66), 66),
    (Speaks(handle=Speaks(value=88)), 88), (Speaks(handle=Speaks(value=None)), 0),
])
def test_stream_handles(stream, handle):
    assert _stream.handle_of(stream) == handle
    border = Border(Exporter(ARRAY, device=GPU), "q", stream=stream)
    assert border.stream == handle and border.stream_given
    exporter = Exporter(ARRAY, device=GPU)
    border.take(exporter, "k")
    assert exporter.asked[0]["stream"] == (handle or 1)
    assert Border(ARRAY, "q", stream=stream).stream == 0  # on the CPU there is none


@pytest.mark.parametrize("stream, error", [("main", TypeError), (True, TypeError), (1.0, TypeError),
                                           (object(), TypeError), (-1, ValueError)])
def test_what_is_no_stream(stream, error):
    with pytest.raises(error, match=r"^stream: expected "):
        Border(ARRAY, "q", stream=stream)


def test_stream_of_another_device():
    stream = Speaks(cuda_stream=4096, device_index=1)
    with pytest.raises(BufferError, match=r"stream: of cuda:1, but q is on cuda:0"):
        Border(Exporter(ARRAY, device=GPU), "q", stream=stream)
    assert Border(Exporter(ARRAY, device=(CUDA, 1)), "q", stream=stream).stream == 4096


def test_dlpack_producers_are_told_our_stream():
    first, second, third = (Exporter(ARRAY, device=GPU) for _ in range(3))
    border = Border(first, "q")
    border.take(second, "k")
    border.take(third, "v")
    assert border.stream == 0
    assert [x.asked for x in (first, second, third)] == [[{"max_version": (1, 3), "stream": 1}]] * 3
    old = OldExporter(ARRAY, device=GPU, version=None)
    border.take(old, "sinks")
    assert old.asked == [{"stream": 1}]


# ---- the CUDA Array Interface --------------------------------------------------------------------------


def test_interface(owner):
    owner.device = 3
    array = Interface(ARRAY)
    border = Border(array, "q")
    view = border.view
    assert (view.shape, view.strides, view.dtype, view.itemsize) == ((3, 4), (4, 1), "float32", 4)
    assert (view.data, view.device_type, view.device_id, view.readonly) == (ARRAY.ctypes.data, 2, 3, False)
    assert view.owner is array


@pytest.mark.parametrize("changes, shape, strides", [
    ({"strides": (-16, 8), "shape": (3, 2)}, (3, 2), (-4, 2)),
    ({"strides": (0, 4)}, (3, 4), (0, 1)),
    ({"shape": ()}, (), ()),
    ({"shape": (0, 4), "data": (0, False)}, (0, 4), (4, 1)),
    ({"shape": [3, 4], "version": 2}, (3, 4), (4, 1)),
])
def test_interface_layouts(changes, shape, strides, owner):
    view = Border(Interface(ARRAY, **changes), "q").view
    assert (view.shape, view.strides) == (shape, strides)


@pytest.mark.parametrize("typestr, name", [("<f2", "float16"), ("<f4", "float32"), ("<f8", "float64"),
                                           ("|u1", "uint8"), ("<u2", "uint16"), ("<i4", "int32"), ("|b1", "bool"),
                                           ("|V2", "void16"), ("=f4", "float32"), ("<c8", "complex64")])
def test_interface_types(typestr, name, owner):
    assert Border(Interface(ARRAY, typestr=typestr), "q").view.dtype == name


def test_interface_types_that_numpy_cannot_name(owner):
    assert Border(Interface(ARRAY, typestr="<V2"), "q", dtype="bfloat16").view.dtype == "bfloat16"
    assert Border(Interface(ARRAY, typestr="|V1"), "q", dtype="float8_e4m3fn").view.dtype == "float8_e4m3fn"
    array = Interface(ARRAY, typestr="<V2")
    array.dtype = Speaks(name="bfloat16")
    assert Border(array, "q").view.dtype == "bfloat16"


@pytest.mark.parametrize("changes, error, text", [
    ({"mask": ARRAY}, TypeError, "masked arrays are not supported"),
    ({"typestr": ">f4"}, TypeError, "expected the machine's byte order, got '>f4'"),
    ({"typestr": "float"}, TypeError, "is broken"),
    ({"data": None}, TypeError, "is broken"),
    ({"shape": None}, TypeError, "is broken"),
    ({"strides": (16, 5)}, ValueError, "strides .* are not whole numbers of elements of 4"),
    ({"stream": 0}, ValueError, "stream 0 of __cuda_array_interface__ is ambiguous"),
    ({"data": (0, False)}, TypeError, "has no memory"),
    ({"data": (4097, False)}, ValueError, "address 0x1001 is not a multiple"),
    ({"shape": (1,) * 9}, ValueError, "9 dimensions"),
])
def test_interface_errors(changes, error, text, owner):
    with pytest.raises(error, match=f"^q: .*{text}"):
        Border(Interface(ARRAY, **changes), "q")


def test_interface_read_only(owner):
    border = Border(Interface(ARRAY), "q")
    array = Interface(ARRAY, data=(ARRAY.ctypes.data, True))
    assert border.take(array, "k").readonly
    with pytest.raises(BufferError, match=r"^k: .* read-only"):
        border.take(array, "k", writable=True)


@pytest.mark.parametrize("stream, ours", [(None, 0), (1, 0), (2, 2), (4096, 4096)])
def test_interface_stream_of_the_first_array(stream, ours, owner, waits):
    assert Border(Interface(ARRAY, stream=stream), "q").stream == ours
    assert waits == []


@pytest.mark.parametrize("stream, waited", [(None, []), (1, [(77, 0, 0)]), (2, [(77, 2, 0)]),
                                            (4096, [(77, 4096, 0)]), (77, [])])
def test_interface_stream_of_later_arrays(stream, waited, owner, waits):
    border = Border(Interface(ARRAY), "q", stream=77)
    border.take(Interface(ARRAY, stream=stream), "k")
    assert border.stream == 77 and waits == waited


def test_interface_device(owner):
    border = Border(Interface(ARRAY), "q")
    owner.device = 1
    with pytest.raises(BufferError, match=r"k: on cuda:1, but q is on cuda:0"):
        border.take(Interface(ARRAY), "k")
    border.take(Interface(ARRAY[:0], shape=(0, 4)), "k")  # empty: of no device
    owner.device = -1
    with pytest.raises(BufferError, match=r"k: its __cuda_array_interface__ points to host memory"):
        border.take(Interface(ARRAY), "k")


def test_interface_after_dlpack_refuses(owner):
    """CuPy's DLPack knows no bfloat16."""

    class Both(Exporter):
        @property
        def __cuda_array_interface__(self):
            return Interface(self.array, typestr="<V2").__cuda_array_interface__

        def __dlpack__(self, **options):
            raise BufferError("dtype is not supported")

        dtype = np.dtype("V2")

    assert Border(Both(ARRAY, device=GPU), "q").view.dtype == "void16"
    with pytest.raises(TypeError, match=r"q: .* cannot be shared: dtype is not supported"):
        Border(Both(ARRAY, device=(CPU, 0)), "q")


# ---- results of the CUDA Array Interface ---------------------------------------------------------------


class FakeCupy(types.ModuleType):
    """As much of CuPy as results need."""

    def __init__(self):
        super().__init__("cupy")
        self.entered = []
        self.current = 0
        cupy = self

        class Entered:
            def __init__(self, what):
                self.what = what

            def __enter__(self):
                cupy.entered.append(self.what)

            def __exit__(self, *error):
                cupy.entered.append("-")

        class Stream(Entered):
            null, ptds = Entered("null"), Entered("ptds")

            @classmethod
            def from_external(cls, stream):
                return Entered(stream.__cuda_stream__())

        self.cuda = types.SimpleNamespace(
            Device=lambda device: Entered(f"device {device}"), Stream=Stream,
            get_current_stream=lambda device: types.SimpleNamespace(ptr=cupy.current))

    def empty(self, shape, dtype):
        return Exporter(np.zeros(shape, dtype), device=GPU)


@pytest.fixture
def cupy(monkeypatch):
    module = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_results_without_cupy(owner, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match=r"q: results for Interface come back as CuPy arrays, .* pass out="):
        Border(Interface(ARRAY), "q").empty((2,), "float16")
    out = Interface(ARRAY)
    assert Border(Interface(ARRAY), "q").wrap(out, "out").array() is out


def test_results_as_cupy_arrays(owner, waits, cupy):
    output = Border(Interface(ARRAY), "q").empty((2, 3), "float16")
    assert output.view.dtype == "float16" and output.view.device_type == 2
    assert output.array().array.shape == (2, 3)
    assert cupy.entered == ["device 0", "-"] and waits == []
    output = Border(Interface(ARRAY, typestr="|u1"), "q", dtype="float8_e4m3fn").empty((2, 3), "bfloat16")
    assert output.view.dtype == "bfloat16" and output.array().array.dtype == np.uint16


def test_results_as_cupy_arrays_of_another_stream(owner, waits, cupy):
    border = Border(Interface(ARRAY, stream=4096), "q")
    output = border.empty((2,), "float16")
    assert border.stream == 4096 and cupy.entered == ["device 0", (0, 4096), "-", "-"]
    assert waits == []
    output.array()
    assert waits == [(0, 4096, 0)]  # CuPy's stream goes on behind ours
    waits.clear()
    Border(Interface(ARRAY), "q", stream=4096).empty((2,), "float16").array()
    assert waits == []  # the caller named the stream: the result is there
