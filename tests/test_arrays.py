"""Arrays of the installed frameworks on the CPU: in as views, out as results."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest

from fa3 import _array, _frameworks

Border = _array.Border

DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "float32", "float64", "int32", "int64", "uint8", "bool")
FRAMEWORKS = ("numpy", "torch", "jax")
TYPED = [(framework, dtype) for framework in FRAMEWORKS for dtype in DTYPES
         if framework != "jax" or dtype not in ("float64", "int64")]  # JAX has these only in its x64 mode


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def values(shape, dtype):
    return np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(numpy_dtype(dtype))


def make(framework, array):
    """The array in a framework, on the CPU."""
    if framework == "numpy":
        return array
    if framework == "torch":
        torch = pytest.importorskip("torch")
        storage = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}.get(array.dtype.name)
        tensor = torch.from_numpy(array.view(storage) if storage else array)
        return tensor.view(getattr(torch, array.dtype.name)) if storage else tensor
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.numpy.asarray(array)


def type_of(framework):
    return {"numpy": lambda: np.ndarray, "torch": lambda: pytest.importorskip("torch").Tensor,
            "jax": lambda: pytest.importorskip("jax").Array}[framework]()


def same(result, expected):
    return result.dtype == expected.dtype and np.array_equal(result.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("framework, dtype", TYPED)
def test_view(framework, dtype):
    expected = values((2, 3, 4), dtype)
    array = make(framework, expected)
    border = Border(array, "q")
    view = border.view
    assert border.framework == framework
    assert (border.device_type, border.device_id, border.stream) == (1, 0, 0)
    assert (view.dtype, view.itemsize, view.ndim) == (dtype, expected.itemsize, 3)
    assert (view.shape, view.strides) == ((2, 3, 4), (12, 4, 1))
    assert view.readonly == (framework == "jax")
    assert same(view.numpy(), expected)
    assert view.numpy().flags.writeable == (framework != "jax")
    if framework == "torch":
        assert view.data == array.data_ptr()
    elif framework == "jax":
        assert view.data == array.unsafe_buffer_pointer()
    else:
        assert view.data == array.__array_interface__["data"][0]


@pytest.mark.parametrize("framework, dtype", TYPED)
def test_result_in_the_callers_framework(framework, dtype):
    border = Border(make(framework, values((2, 3), dtype)), "q")
    output = border.empty((3, 2), dtype)
    assert output.view.shape == (3, 2) and output.view.strides == (2, 1) and not output.view.readonly
    expected = values((3, 2), dtype)
    output.view.numpy()[...] = expected
    array = output.array()
    assert isinstance(array, type_of(framework))
    assert output.array() is array
    assert same(Border(array, "out").view.numpy(), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1), (2, 1, 1, 1, 1, 1, 1, 3)])
def test_shapes(framework, shape):
    border = Border(make(framework, values(shape, "float32")), "q")
    assert border.view.shape == shape
    assert border.view.numpy().shape == shape
    assert Border(border.empty(shape, "float32").array(), "out").view.shape == shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_strides(framework, dtype):
    base = values((4, 5, 6), dtype)
    for make_view in (lambda x: x[1::2, :, ::3], lambda x: x.T, lambda x: x[:, 2], lambda x: x[:, :, 1:2]):
        expected = make_view(base)
        if framework == "torch":
            pytest.importorskip("torch")
            array = make("torch", base)
            array = array.permute(2, 1, 0) if expected.shape == (6, 5, 4) else make_view(array)
        else:
            array = expected
        view = Border(array, "q").view
        assert view.shape == expected.shape
        assert view.strides == tuple(stride // base.itemsize for stride in expected.strides)
        assert same(view.numpy().copy(), expected.copy())


def test_negative_and_zero_strides():
    base = values((4, 5), "float32")
    view = Border(base[::-1, ::-2], "q").view
    assert view.strides == (-5, -2)
    assert np.array_equal(view.numpy(), base[::-1, ::-2])
    row = np.broadcast_to(base[0], (3, 5))
    view = Border(row, "q").view
    assert view.strides == (0, 1) and view.readonly


def test_strides_off_the_elements():
    packed = np.zeros(3, [("value", "i4"), ("more", "u1")])["value"]
    with pytest.raises(ValueError, match=r"q: strides of .* bytes are not whole numbers of elements"):
        Border(packed, "q")
    unaligned = np.frombuffer(bytes(9), np.uint8)[1:].view("f4")
    assert Border(unaligned, "q").view.dtype == "float32"


def test_views_keep_the_memory():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(1000)
    gone = weakref.ref(tensor)
    view = Border(tensor, "q").view
    del tensor
    gc.collect()
    assert gone() is not None and view.numpy().sum() == 1000
    del view
    gc.collect()
    assert gone() is None
    array = Border(torch.full((1000,), 2.0), "q").view.numpy()
    gc.collect()
    assert array.sum() == 2000


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_nothing_leaks(framework):
    array = make(framework, values((2, 3), "float32"))

    def call():
        border = Border(array, "q")
        border.take(array, "k")
        border.empty((2, 3), "float32").array()

    call()
    gc.collect()
    before = sys.getrefcount(array)
    for _ in range(20):
        call()
    gc.collect()
    assert sys.getrefcount(array) == before


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 1.5, [1.0, 2.0], (1,), "text", b"bytes", bytearray(4),
                                   memoryview(b"1234"), np.float32(1), object(), np.ndarray])
def test_not_an_array(thing):
    text = r"^q: expected an array \(DLPack or __cuda_array_interface__\), got "
    with pytest.raises(TypeError, match=text):
        Border(thing, "q")


@pytest.mark.parametrize("dtype", [">f4", "c8", "M8[s]", "O", "S3", "U2", "V4", "i4,f4", "g"])
def test_numpy_dtypes_without_a_meaning(dtype):
    with pytest.raises(TypeError, match=r"q: "):
        Border(np.zeros(4, dtype), "q")


@pytest.mark.parametrize("module", [None, 1, property(lambda self: "numpy")])
def test_types_of_no_module(module):
    with pytest.raises(TypeError, match=r"^q: expected an array \(DLPack or __cuda_array_interface__\), got Odd$"):
        Border(type("Odd", (), {"__module__": module})(), "q")
    array = np.ones(3).view(type("Odd", (np.ndarray,), {"__module__": module}))
    assert Border(array, "q").framework == "numpy"


def test_masked_arrays():
    with pytest.raises(TypeError, match=r"q: a numpy.MaskedArray may be masked"):
        Border(np.ma.zeros(3), "q")


def test_too_many_dimensions():
    with pytest.raises(ValueError, match=r"q: 9 dimensions"):
        Border(np.zeros((1,) * 9), "q")


def odd_tensors():
    """PyTorch's tensors that are not plain memory, by name."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3, 4)
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return {"fake": fake, "meta": torch.empty(2, device="meta"), "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(), "nested": ragged,
            "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "zero": torch._efficientzerotensor(3), "negative": torch._neg_view(torch.ones(2)),
            "imaginary": torch.ones(2, dtype=torch.complex64).conj().imag,
            "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
            "quantised": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which, exchange", [
    *((which, True) for which in ("fake", "meta", "sparse", "csr", "nested", "jagged", "zero", "negative",
                                  "imaginary", "conjugate", "quantised")),
    *((which, False) for which in ("meta", "zero", "negative", "imaginary", "conjugate", "quantised")),
])
def test_torch_tensors_that_are_not_plain_memory(which, exchange):
    tensor = odd_tensors()[which]
    if not exchange:
        tensor = without_exchange(tensor)
    with pytest.raises(TypeError, match=r"^q: ") as raised:
        border = Border(tensor, "q")
        if which in ("conjugate", "quantised"):  # a dtype that no function of fa3 takes
            raise TypeError(f"q: dtype {border.view.dtype}")
    assert "\n" not in str(raised.value)


def without_exchange(tensor):
    """The tensor as a PyTorch without DLPack's exchange API would have it."""
    import torch

    class Older(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    return tensor.as_subclass(Older)


def test_torch_without_the_exchange_api():
    torch = pytest.importorskip("torch")
    for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float32"):
        tensor = torch.arange(6.0).reshape(2, 3).to(getattr(torch, dtype)).T
        border = Border(without_exchange(tensor), "q")
        view = border.view
        assert (view.dtype, view.shape, view.strides) == (dtype, (3, 2), (1, 3))
        assert view.data == tensor.data_ptr() and border.framework == "torch"
        output = border.empty((4,), dtype)
        assert output.array().dtype == tensor.dtype and output.view.data == output.array().data_ptr()


def test_torch_vmap():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"q: this torch.Tensor cannot be shared"):
        torch.func.vmap(lambda x: Border(x, "q"))(torch.ones(2, 3))


def test_torch_gradients_and_subclasses():
    torch = pytest.importorskip("torch")

    class Mine(torch.Tensor):
        pass

    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert Border(parameter, "q").view.data == parameter.data_ptr()
    assert Border(torch.ones(2).as_subclass(Mine), "q").view.shape == (2,)
    result = Border(parameter * 2, "q").empty((2,), "float32").array()
    assert type(result) is torch.Tensor and not result.requires_grad


def test_no_memory_left():
    torch = pytest.importorskip("torch")
    border = Border(torch.ones(2), "q")
    with pytest.raises(MemoryError):
        border.empty((1 << 50,), "float32")
    assert border.empty((2,), "float32").array().shape == (2,)


def test_jax_tracers_and_deleted_arrays():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"q: a jax.\w*Tracer is being traced"):
        jax.jit(lambda x: Border(x, "q"))(jax.numpy.ones(3))
    array = jax.numpy.ones(3) + 1
    array.delete()
    with pytest.raises(TypeError, match=r"q: .* it was deleted"):
        Border(array, "q")
    with pytest.raises(TypeError, match=r"q: expected an array"):
        Border(jax.random.key(0), "q")


# ---- writing -------------------------------------------------------------------------------------------


def test_writable():
    border = Border(np.zeros(3), "q")
    array = np.ones(3)
    border.take(array, "k_cache", writable=True).numpy()[0] = 5
    assert array[0] == 5
    array.flags.writeable = False
    border.take(array, "k_cache")
    with pytest.raises(BufferError, match=r"^k_cache: this numpy.ndarray is read-only"):
        border.take(array, "k_cache", writable=True)
    with pytest.raises(BufferError, match=r"^out: .* read-only"):
        border.wrap(array, "out")


def test_jax_arrays_are_not_written():
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        array = jax.numpy.zeros(3)
    with pytest.raises(BufferError, match=r"^out: .* read-only"):
        Border(array, "q").wrap(array, "out")


def test_elements_that_share_memory_are_not_written():
    torch = pytest.importorskip("torch")
    border = Border(torch.zeros(3), "q")
    with pytest.raises(ValueError, match=r"out: dimension 0 has stride 0"):
        border.wrap(torch.zeros(1).expand(3), "out")
    assert border.wrap(torch.zeros(1, 3).expand(1, 3), "out").view.shape == (1, 3)


def test_wrap_returns_the_callers_array():
    array = np.zeros((2, 3), "float16")
    output = Border(array, "q").wrap(array, "out")
    assert output.array() is array
    assert output.view.data == array.ctypes.data


# ---- dtype= --------------------------------------------------------------------------------------------


def spellings(name):
    found = [name, getattr(ml_dtypes, name), np.dtype(getattr(ml_dtypes, name))]
    for framework in ("torch", "jax.numpy"):
        if framework.partition(".")[0] in sys.modules:
            found.append(getattr(sys.modules[framework], name))
    return found


@pytest.mark.parametrize("storage, name", [("uint16", "bfloat16"), ("uint8", "float8_e4m3fn")])
def test_retyped(storage, name):
    expected = values((2, 3), name)
    for spelled in spellings(name):
        border = Border(expected.view(storage), "q", dtype=spelled)
        assert border.view.dtype == name and same(border.view.numpy(), expected)
        view = border.take(expected.view(storage), "k", dtype=spelled)
        assert view.dtype == name
        assert border.take(expected, "k", dtype=spelled).dtype == name  # one that knows its own type
        assert border.take(expected.view(storage), "seqused_k").dtype == storage


def test_results_of_retyped_arrays():
    border = Border(np.zeros((2, 3), "uint8"), "q", dtype="float8_e4m3fn")
    output = border.empty((2, 3), "bfloat16")
    assert output.view.dtype == "bfloat16" and output.view.numpy().dtype == ml_dtypes.bfloat16
    assert output.array().dtype == np.uint16
    out = np.zeros((2, 3), "uint16")
    assert border.wrap(out, "out").view.dtype == "bfloat16"
    assert border.empty((2,), "float16").array().dtype == np.float16
    torch = pytest.importorskip("torch")  # has a name for the type, whatever its caller used
    border = Border(torch.zeros(2, 3, dtype=torch.uint8), "q", dtype="float8_e4m3fn")
    assert border.empty((2, 3), "bfloat16").array().dtype == torch.bfloat16


@pytest.mark.parametrize("found, said", [("float32", "bfloat16"), ("uint8", "bfloat16"),
                                         ("uint16", "float8_e4m3fn"), ("uint16", "float16"),
                                         ("int16", "bfloat16")])
def test_retyping_that_makes_no_sense(found, said):
    with pytest.raises(TypeError, match=f"k: dtype= says {said}, but the array is {found}"):
        Border(np.zeros(2), "q").take(np.zeros(2, found), "k", dtype=said)
    with pytest.raises(TypeError, match=r"dtype: expected the name of a dtype"):
        Border(np.zeros(2), "q", dtype=3.5)


# ---- frameworks together -------------------------------------------------------------------------------


def test_arrays_of_several_frameworks_in_one_call():
    expected = values((2, 3), "bfloat16")
    for first in FRAMEWORKS:
        border = Border(make(first, expected), "q")
        for other in FRAMEWORKS:
            assert same(border.take(make(other, expected), "k").numpy(), expected)
        assert isinstance(border.empty((2,), "bfloat16").array(), type_of(first))


def test_jax_results_stay_on_their_device():
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        array = jax.numpy.zeros(3)
    assert Border(array, "q").empty((2,), "float32").array().devices() == {cpu}


def test_all_cpu_devices_of_jax_are_the_cpu():
    pytest.importorskip("jax")
    code = """if True:
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, fa3
        first, second = jax.devices("cpu")
        q, k, v = (jax.device_put(jax.numpy.ones((1, 3, 2, 16)), device) for device in (second, first, second))
        out, lse = fa3.flash_attn_func(q, k, v, return_lse=True)
        assert (out == 1).all() and out.devices() == lse.devices() == {second}
    """
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jax_reimport_aliases_what_was_written():
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        array = jax.numpy.zeros(64)
    result = jax.dlpack.from_dlpack(_frameworks._Written(array, Border(array, "q")))
    assert result.unsafe_buffer_pointer() == array.unsafe_buffer_pointer()


def test_keeper_lets_go_when_the_result_is_ready():
    class Result:
        def __init__(self):
            self.ready = threading.Event()

        def block_until_ready(self):
            self.ready.wait()
            raise RuntimeError("deleted meanwhile, say")

    class Held:
        pass

    keeper = _frameworks._Keeper()
    for _ in range(2):  # an error does not end the thread
        result, held = Result(), Held()
        gone = weakref.ref(held)
        keeper.keep(result, [held])
        del held
        time.sleep(0.05)
        assert gone() is not None
        result.ready.set()
        deadline = time.monotonic() + 5
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone() is None


def test_threads():
    torch = pytest.importorskip("torch")
    failures = []

    def work(number):
        try:
            array = torch.full((8,), float(number))
            for _ in range(200):
                border = Border(array, "q")
                output = border.empty((8,), "float32")
                output.view.numpy()[...] = border.take(array.numpy(), "k").numpy()
                assert output.array().eq(number).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
