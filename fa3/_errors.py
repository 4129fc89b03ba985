"""Status codes of libfa3 become Python exceptions here, and nowhere else."""


class CudaError(RuntimeError):
    """What CUDA said when a call of it failed.

    Attributes
    ----------
    code : int
        The ``cudaError_t`` value, 35 (``cudaErrorInsufficientDriver``) for example.
    """

    def __init__(self, message, code=0):
        super().__init__(message)
        self.code = code


# The codes of src/fa3.h. A head dim that is wrong is a ValueError; one that is only not built is told apart,
# as NotImplementedError, before libfa3 is asked.
_EXCEPTIONS = {
    -1: ValueError,  # null pointer
    -2: ValueError,  # head dim
    -3: ValueError,  # head dim for fp8
    -4: TypeError,  # dtype
    -5: ValueError,  # shape
    -6: ValueError,  # cu_seqlens
    -7: ValueError,  # workspace
    -10: NotImplementedError,  # fp8
    -11: NotImplementedError,  # paged cache
    -12: NotImplementedError,  # new keys, rotary, left padding, cache_batch_idx
    -13: NotImplementedError,  # splits
    -14: NotImplementedError,  # qv, MLA
    -15: NotImplementedError,  # backward
    -16: NotImplementedError,  # dropout
    -17: NotImplementedError,  # a device that is not compute capability 9.0
}
_CUDA_ERROR = -100


def raise_status(code, text, detail, cuda_code=0):
    """Raise the exception of a status code of libfa3; return when the code is 0.

    Parameters
    ----------
    code : int
        What the C function returned.
    text : str
        ``fa3_status_string(code)``.
    detail : str
        The thread's detail text: which argument, what it got, what it needs. May be empty.
    cuda_code : int
        The ``cudaError_t`` behind code -100.
    """
    if code == 0:
        return
    message = detail or text
    if code == _CUDA_ERROR:
        raise CudaError(f"{text}: {detail}" if detail else text, cuda_code)
    raise _EXCEPTIONS.get(code, RuntimeError)(message)
