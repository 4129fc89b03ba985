"""DLPack by hand: capsules of every version and device, and the C exchange API."""

import gc

import numpy as np
import pytest
from capsules import (
    CPU,
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    IS_COPIED,
    READ_ONLY,
    ROCM,
    Exporter,
    OldExporter,
    exchange_type,
    name_of,
)

from fa3 import _array

Border = _array.Border
ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
GPU = (CUDA, 0)


# ---- capsules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, kind", [((1, 0), Exporter), ((1, 3), Exporter), ((1, 9), Exporter),
                                           (None, Exporter), (None, OldExporter)])
def test_capsule_is_consumed_and_deleted_once(version, kind):
    exporter = kind(ARRAY, version=version)
    view = Border(exporter, "q").view
    assert (view.shape, view.strides, view.dtype, view.data) == ((3, 4), (4, 1), "float32", ARRAY.ctypes.data)
    assert np.array_equal(view.numpy(), ARRAY)
    assert name_of(exporter.capsule) == ("used_dltensor_versioned" if version else "used_dltensor")
    array = view.numpy()
    exporter.capsule = None
    del view
    gc.collect()
    assert exporter.deleted == 0  # the NumPy array still reads that memory
    del array
    gc.collect()
    assert exporter.deleted == 1


def test_asked_for_the_newest_version_and_no_stream_on_the_cpu():
    exporter = Exporter(ARRAY)
    Border(exporter, "q")
    assert exporter.asked == [{"max_version": (1, 3)}]


@pytest.mark.parametrize("device", [None, 1, (1,), (1, None), "cpu"])
def test_device_that_is_none(device):
    with pytest.raises(TypeError, match=r"q: __dlpack_device__ of capsules.Exporter gave .*, needs \(device_type, "):
        Border(Exporter(ARRAY, device=device), "q")


def test_capsule_of_an_unknown_major_version_stays_its_producers():
    exporter = Exporter(ARRAY, version=(2, 0))
    with pytest.raises(BufferError, match=r"q: DLPack 2\.0 is not supported"):
        Border(exporter, "q")
    assert name_of(exporter.capsule) == "dltensor_versioned" and exporter.deleted == 0


def test_capsule_that_was_used():
    exporter = Exporter(ARRAY)
    Border(exporter, "q")
    for given in (exporter.capsule, None, 17):
        again = type("Again", (Exporter,), {"__dlpack__": lambda self, given=given, **options: given})(ARRAY)
        with pytest.raises(TypeError, match=r"q: __dlpack__ of .*Again gave no fresh DLPack capsule"):
            Border(again, "q")


def test_deleted_once_when_the_array_is_refused():
    exporter = Exporter(ARRAY, dtype=(2, 32, 4))  # four lanes
    with pytest.raises(TypeError, match=r"q: unsupported dtype \(DLPack's code 2, 32 bits, 4 lanes\)"):
        Border(exporter, "q")
    gc.collect()
    assert exporter.deleted == 1


@pytest.mark.parametrize("dtype", [(5, 64, 1), (3, 64, 1), (10, 12, 1), (17, 4, 1), (200, 8, 1), (2, 12, 1)])
def test_types_without_a_meaning(dtype):
    with pytest.raises(TypeError, match="q: unsupported dtype"):
        Border(Exporter(ARRAY, dtype=dtype), "q")


@pytest.mark.parametrize("dtype, name", [((2, 16, 1), "float16"), ((4, 16, 1), "bfloat16"),
                                         ((10, 8, 1), "float8_e4m3fn"), ((12, 8, 1), "float8_e5m2"),
                                         ((6, 8, 1), "bool"), ((0, 64, 1), "int64"), ((1, 8, 1), "uint8")])
def test_types(dtype, name):
    view = Border(Exporter(ARRAY, dtype=dtype), "q").view
    assert (view.dtype, view.itemsize) == (name, dtype[1] // 8)


def test_no_strides_and_an_offset():
    view = Border(Exporter(ARRAY, null_strides=True, offset=64), "q").view
    assert (view.strides, view.data) == ((4, 1), ARRAY.ctypes.data)


@pytest.mark.parametrize("flags", [READ_ONLY, IS_COPIED])
def test_flags(flags):
    border = Border(np.zeros(1), "q")
    assert border.take(Exporter(ARRAY, flags=flags), "k").readonly
    with pytest.raises(BufferError, match=r"^k: .* read-only"):
        border.take(Exporter(ARRAY, flags=flags), "k", writable=True)
    assert not border.take(Exporter(ARRAY), "k", writable=True).readonly


@pytest.mark.parametrize("error", [BufferError, TypeError, ValueError, NotImplementedError])
def test_a_producers_refusal_names_the_argument(error):
    class Refuses(Exporter):
        def __dlpack__(self, **options):
            raise error("not me")

    with pytest.raises(TypeError, match=r"^k: this .*Refuses cannot be shared: not me"):
        Border(np.zeros(1), "q").take(Refuses(ARRAY), "k")


def test_other_errors_of_a_producer_pass():
    class Fails(Exporter):
        def __dlpack__(self, **options):
            raise OSError("the GPU is on fire")

    with pytest.raises(OSError, match=r"on fire") as raised:
        Border(Fails(ARRAY), "q")
    assert raised.value.__notes__ == ["raised by __dlpack__ of fa3's argument q"]


def test_results_for_an_unknown_framework():
    assert type(Border(Exporter(ARRAY), "q").empty((2,), "float16").array()) is np.ndarray

    class Home:
        @staticmethod
        def from_dlpack(array):
            return "mine", array

    class Namespaced(Exporter):
        def __array_namespace__(self):
            return Home

    output = Border(Namespaced(ARRAY), "q").empty((2,), "float16")
    assert output.array()[0] == "mine" and output.array()[1].dtype == np.float16


# ---- devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, seen", [((CPU, 0), (1, 0)), ((CPU, 1), (1, 0)), ((CUDA_HOST, 0), (1, 0)),
                                          ((CUDA, 3), (2, 3)), ((CUDA_MANAGED, 0), (2, 5))])
def test_devices(device, seen, owner):
    owner.device = 5  # where the managed pages are
    border = Border(Exporter(ARRAY, device=device), "q")
    assert (border.device_type, border.device_id) == seen
    assert (border.view.device_type, border.view.device_id) == seen


def test_devices_that_are_not_cuda():
    with pytest.raises(BufferError, match=r"q: on a device of DLPack's type 10"):
        Border(Exporter(ARRAY, device=(ROCM, 0)), "q")


@pytest.mark.parametrize("first, other, text", [
    ((CUDA, 0), (CUDA, 1), "k: on cuda:1, but q is on cuda:0"),
    ((CUDA, 0), (CPU, 0), "k: on the CPU, but q is on cuda:0"),
    ((CPU, 0), (CUDA, 2), "k: on cuda:2, but q is on the CPU"),
    ((CUDA, 0), (CUDA_MANAGED, 0), "k: on cuda:4, but q is on cuda:0"),
])
def test_wrong_device(first, other, text, owner):
    owner.device = 4
    border = Border(Exporter(ARRAY, device=first), "q")
    for writable in (False, True):
        with pytest.raises(BufferError, match=text):
            border.take(Exporter(ARRAY, device=other), "k", writable=writable)
    view = border.take(Exporter(ARRAY, device=other), "k", same_device=False)
    assert view.device_type == (1 if other[0] == CPU else 2)


def test_memory_of_a_gpu_is_not_numpys():
    view = Border(Exporter(ARRAY, device=(CUDA, 1)), "q").view
    with pytest.raises(BufferError, match=r"memory of cuda:1 is not NumPy's"):
        view.numpy()
    assert not hasattr(view, "__array_interface__")


def test_no_memory():
    class Hollow(Exporter):
        def __dlpack__(self, **options):
            capsule = super().__dlpack__(**options)
            self._kept[-1][0].tensor.data = None
            return capsule

    with pytest.raises(TypeError, match=r"q: this .*Hollow has no memory"):
        Border(Hollow(ARRAY), "q")
    assert Border(Hollow(ARRAY[:0]), "q").view.shape == (0, 4)


def test_misaligned_address_on_a_gpu():
    with pytest.raises(ValueError, match=r"q: address 0x.* is not a multiple of an element's 4 bytes"):
        Border(Exporter(np.frombuffer(bytes(9), np.uint8)[1:].view("f4"), device=GPU), "q")


# ---- the exchange API ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lend", [True, False])
@pytest.mark.parametrize("newer", [True, False])
def test_exchange(lend, newer):
    kind = exchange_type(lend=lend, newer=newer)
    array = kind(ARRAY)
    border = Border(array, "q")
    assert (border.view.shape, border.view.data, border.view.strides) == ((3, 4), ARRAY.ctypes.data, (4, 1))
    assert array.asked == ([] if lend else [{}])
    output = border.empty((2, 5), "float16")
    assert type(output.array()) is kind
    output.view.numpy()[...] = 3
    assert (output.array().array == 3).all()
    del border
    gc.collect()
    assert array.deleted == (0 if lend else 1)


def test_exchange_of_an_unknown_version_only():
    kind = exchange_type()
    kind.tables[0].major = 2
    array = kind(ARRAY)
    assert np.array_equal(Border(array, "q").view.numpy(), ARRAY)
    assert array.asked == [{"max_version": (1, 3)}]  # by __dlpack__ instead


def test_exchange_refusals():
    kind = exchange_type()
    border = Border(kind(ARRAY), "q")
    kind.failing = True
    with pytest.raises(TypeError, match=r"^k: this .*Exchanged cannot be shared: no reason given$"):
        border.take(kind(ARRAY), "k")
    with pytest.raises(MemoryError, match=r"^out: .*Exchanged's allocator failed"):
        border.empty((3,), "float32")


def test_exchange_current_stream(waits):
    kind = exchange_type()
    kind.stream = 4096
    border = Border(kind(ARRAY, device=GPU), "q")
    border.take(kind(ARRAY, device=GPU), "k")
    assert border.stream == 4096 and not border.stream_given and waits == []
    other = exchange_type()
    other.stream = 8192
    border.take(other(ARRAY, device=GPU), "v")
    border.take(other(ARRAY, device=GPU), "sinks")
    assert waits == [(4096, 8192, 0)]  # once for all that this producer has enqueued
    border.empty((2,), "float32")
    assert len(waits) == 1


def test_exchange_given_stream(waits):
    kind = exchange_type()
    kind.stream = 1
    border = Border(kind(ARRAY, device=(CUDA, 2)), "q", stream=4096)
    assert border.stream == 4096 and waits == [(4096, 0, 2)]
    waits.clear()
    border.empty((2,), "float32")
    assert waits == [(4096, 0, 2)]  # behind the last user of that memory
    waits.clear()
    kind.stream = 0
    assert Border(kind(ARRAY, device=GPU), "q", stream=1).stream == 0 and waits == []
