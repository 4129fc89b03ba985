"""Arrays that say in Python what they are: ``__cuda_array_interface__``, and PyTorch's attributes.

Each function returns ``(data, shape, strides, dtype, itemsize, readonly, …)``: strides in elements or None
for C-contiguous, dtype by fa3's names.
"""

_TORCH_DEVICES = {"cpu": 1, "cuda": 2}
_KINDS = {"f": "float", "i": "int", "u": "uint", "c": "complex", "V": "void"}


def from_cuda_array_interface(array, interface, name):
    """Read version 3 of the CUDA Array Interface (older versions say less, in the same words).

    Returns
    -------
    data, shape, strides, dtype, itemsize, readonly, stream
        ``stream`` is the handle on which the array is still being written; None: nothing to wait for.
    """
    try:
        typestr, shape = interface["typestr"], tuple(interface["shape"])
        data, readonly = interface["data"]
        order, kind, itemsize = typestr[0], typestr[1], int(typestr[2:])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        kind = type(array).__name__
        raise TypeError(f"{name}: __cuda_array_interface__ of {kind} is broken: {error!r}") from error
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: masked arrays are not supported, and this one has a mask")
    if order == ">" and itemsize > 1:
        raise TypeError(f"{name}: expected the machine's byte order, got {typestr!r}")
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(strides)
        if any(stride % itemsize for stride in strides):
            raise ValueError(f"{name}: strides of {strides} bytes are not whole numbers of elements of "
                             f"{itemsize}")
        strides = tuple(stride // itemsize for stride in strides)
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(f"{name}: stream 0 of __cuda_array_interface__ is ambiguous; the default streams are "
                         "1 and 2")
    return data or 0, shape, strides, _dtype(kind, itemsize, array), itemsize, bool(readonly), stream


def _dtype(kind, itemsize, array):
    if kind == "b":
        return "bool"
    if kind == "V":  # what NumPy cannot name, ml_dtypes in CuPy for example: the array itself may know
        dtype = getattr(array, "dtype", None)
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
        if name in ("bfloat16", "float8_e4m3fn"):
            return name
    return f"{_KINDS.get(kind, kind)}{8 * itemsize}"


def from_torch(tensor, name):
    """Read a tensor of a PyTorch that lacks DLPack's exchange API.

    Its ``__dlpack__`` would refuse what fa3 may read: tensors that require gradients, or of another device
    than the current one.

    Returns
    -------
    data, shape, strides, dtype, itemsize, readonly, device_type, device_id
        The device as DLPack counts: 1 CPU, 2 CUDA.
    """
    device = tensor.device
    if device.type == "meta":
        raise TypeError(f"{name}: this torch.Tensor has no memory (device meta)")
    if device.type not in _TORCH_DEVICES:
        raise BufferError(f"{name}: on a {device.type} device; fa3 works on CUDA devices and the CPU")
    if tensor.is_neg():
        raise TypeError(f"{name}: this torch.Tensor stands for its negative; use resolve_neg() first")
    try:
        data, strides = tensor.data_ptr(), tensor.stride()
    except RuntimeError as error:  # sparse, or wrapped by torch.func
        first_line = str(error).partition("\n")[0]
        raise TypeError(f"{name}: this torch.Tensor cannot be shared: {first_line}") from error
    dtype = str(tensor.dtype).rpartition(".")[2]
    return (data, tuple(tensor.shape), strides, dtype, tensor.element_size(), False,
            _TORCH_DEVICES[device.type], device.index or 0)
