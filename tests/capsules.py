"""DLPack and the CUDA Array Interface by hand: arrays of any device, version and layout, without a GPU.

The structs are DLPack 1.x's, by ctypes; deleters count. Memory is NumPy's, whatever device it claims to be.
"""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = 1, 2, 3, 10, 13
READ_ONLY, IS_COPIED = 1, 2
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", Device), ("ndim", ctypes.c_int32), ("dtype", DataType),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


class Versioned(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
                ("deleter", _Deleter), ("flags", ctypes.c_uint64), ("tensor", Tensor)]


def _python(name, result, *arguments):
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_get_name = _python("PyCapsule_GetName", ctypes.c_char_p, ctypes.py_object)
NAMES = {False: b"dltensor", True: b"dltensor_versioned"}  # capsules keep the pointer: these live for ever
API_NAME = b"dlpack_exchange_api"


def name_of(capsule):
    return _get_name(capsule).decode()


def fill_tensor(tensor, array, device, *, null_strides=False, offset=0, dtype=None):
    """Fill a DLPack tensor from a NumPy array; what its pointers need is returned, to be kept."""
    shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
    strides = (ctypes.c_int64 * max(array.ndim, 1))(*(s // array.itemsize for s in array.strides))
    tensor.data = array.ctypes.data - offset if array.size else None
    tensor.byte_offset = offset if array.size else 0
    tensor.device = Device(*device)
    tensor.ndim = array.ndim
    tensor.dtype = DataType(*(dtype or (_CODES[array.dtype.kind], 8 * array.itemsize, 1)))
    tensor.shape = shape
    tensor.strides = None if null_strides else strides
    return shape, strides


class Exporter:
    """An array that speaks ``__dlpack__``.

    Parameters
    ----------
    array : numpy.ndarray
    device : (int, int)
        What it says of its device.
    version : (int, int) or None
        Of its capsules; None: the unversioned ones from before DLPack 1.0.
    flags : int
    layout
        See `fill_tensor`.
    """

    def __init__(self, array, device=(CPU, 0), version=(1, 1), flags=0, **layout):
        self.array, self.device, self.version, self.flags, self.layout = array, device, version, flags, layout
        self.deleted = 0
        self.asked = []  # the keyword arguments of each __dlpack__
        self.capsule = None
        self._kept = []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        self.asked.append(options)
        managed = Versioned() if self.version else Managed()
        if self.version:
            managed.major, managed.minor = self.version
            managed.flags = self.flags
        managed.deleter = _Deleter(self._delete)
        self._kept.append((managed, fill_tensor(managed.tensor, self.array, self.device, **self.layout)))
        self.capsule = _new(ctypes.addressof(managed), NAMES[bool(self.version)], None)
        return self.capsule

    def _delete(self, address):
        self.deleted += 1


class OldExporter(Exporter):
    """As before DLPack 1.0: no ``max_version``."""

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(**({} if stream is None else {"stream": stream}))


class Interface:
    """An array that only speaks ``__cuda_array_interface__``; `changes` are made to what it says."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3, "shape": array.shape, "typestr": array.dtype.str, "strides": None, "stream": None,
            "data": (array.ctypes.data if array.size else 0, False), **changes}


_TensorFrom = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
_ManagedFrom = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
_Allocate = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Tensor), ctypes.POINTER(ctypes.c_void_p),
                              ctypes.c_void_p, ctypes.c_void_p)
_ToObject = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
_Stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class ExchangeTable(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p),
                ("allocate", _Allocate), ("managed_from", _ManagedFrom), ("to_object", _ToObject),
                ("tensor_from", _TensorFrom), ("current_stream", _Stream)]


def exchange_type(*, lend=True, newer=False):
    """A type of array with DLPack's C exchange API.

    Its instances take what `Exporter` takes. ``type.stream`` is its current stream; with ``type.failing`` its
    functions fail (without an exception: ctypes cannot leave one behind).

    Parameters
    ----------
    lend : bool
        Has ``dltensor_from_py_object_no_sync``.
    newer : bool
        The table is of DLPack 2, and links to one of DLPack 1.
    """
    made = []

    class Exchanged(Exporter):
        stream = 0
        failing = False

    def tensor_from(array, out):
        if Exchanged.failing:
            return -1
        array._kept.append(fill_tensor(out[0], array.array, array.device, **array.layout))
        return 0

    def managed_from(array, out):
        if Exchanged.failing:
            return -1
        Exporter.__dlpack__(array)
        out[0] = ctypes.addressof(array._kept[-1][0])
        return 0

    def allocate(prototype, out, context, set_error):
        if Exchanged.failing:
            return -1
        wanted = prototype[0]
        code = {value: key for key, value in _CODES.items()}[wanted.dtype.code]
        array = np.zeros([wanted.shape[i] for i in range(wanted.ndim)], f"{code}{wanted.dtype.bits // 8}")
        exporter = Exchanged(array, (wanted.device.type, wanted.device.id))
        made.append(exporter)
        return managed_from(exporter, out)

    def to_object(managed, out):
        exporter = made.pop()
        out[0] = id(exporter)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(exporter))  # a new reference goes to the caller
        return 0

    def current_stream(device_type, device_id, out):
        out[0] = Exchanged.stream
        return 0

    functions = (_Allocate(allocate), _ManagedFrom(managed_from), _ToObject(to_object),
                 _TensorFrom(tensor_from) if lend else _TensorFrom(), _Stream(current_stream))
    table = ExchangeTable(1, 3, None, *functions)
    Exchanged.tables = [table]
    if newer:
        table = ExchangeTable(2, 0, ctypes.addressof(table))
        Exchanged.tables.append(table)
    Exchanged.__dlpack_c_exchange_api__ = _new(ctypes.addressof(table), API_NAME, None)
    return Exchanged
