"""Names of dtypes: fa3's are NumPy's and ml_dtypes' ("float16", "bfloat16", "float8_e4m3fn" …)."""

import sys

import numpy

# DLPack's type codes, each with the names of its types of 1, 2, 4 and 8 bytes. `NAMES` has them in one list, at
# code * SIZES + log2(bytes); `CODE_OF` leads back, to (code, bits).
SIZES = 4
_BY_CODE = (
    ("int8", "int16", "int32", "int64"),
    ("uint8", "uint16", "uint32", "uint64"),
    (None, "float16", "float32", "float64"),
    (None,) * SIZES,
    (None, "bfloat16", None, None),
    (None,) * SIZES,  # complex, of which fa3 has no use
    ("bool", None, None, None),
    *((f"float8_{kind}", None, None, None)
      for kind in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
)
CODES = len(_BY_CODE)
NAMES = [sys.intern(name) if name else None for names in _BY_CODE for name in names]
CODE_OF = {name: (place // SIZES, 8 << place % SIZES) for place, name in enumerate(NAMES) if name}

FP8 = "float8_e4m3fn"
HALF = ("float16", "bfloat16")
GPU_DTYPES = (*HALF, FP8)  # what q, k and v may be
CPU_DTYPES = (*GPU_DTYPES, "float32", "float64")

# How an array holds a type that its framework cannot name.
STORAGE = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_TAKEN_AS = {"uint16": "bfloat16", "void16": "bfloat16", "uint8": "float8_e4m3fn", "void8": "float8_e4m3fn"}


def name_of(dtype, argument="dtype"):
    """fa3's name of a dtype given as a name, or as an object of NumPy, ml_dtypes, JAX or PyTorch."""
    if isinstance(dtype, str):
        return sys.intern(str.__str__(dtype))  # the text of a NumPy str or a StrEnum, which cannot be interned
    if type(dtype).__module__ == "torch":
        return sys.intern(str(dtype).rpartition(".")[2])
    try:
        return sys.intern(numpy.dtype(dtype).name)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: expected the name of a dtype or a dtype object, got {dtype!r}") from None


def retyped(found, dtype, name):
    """The name of an array's type where ``dtype=`` says what its bytes are.

    Parameters
    ----------
    found : str
        What the array says itself.
    dtype : str or dtype object
        What the caller says.
    name : str
        The argument's.
    """
    wanted = name_of(dtype)
    if name == "q" and found in HALF and wanted == FP8:
        return found  # beside fp8 keys, of which dtype= speaks
    if wanted != found and _TAKEN_AS.get(found) != wanted:
        raise TypeError(f"{name}: dtype= says {wanted}, but the array is {found}; only uint16 can be taken "
                        "as bfloat16, and uint8 as float8_e4m3fn")
    return wanted


_numpy_dtypes = {}


def numpy_dtype(name):
    """NumPy's dtype of a name; ml_dtypes is imported only where NumPy does not know it."""
    found = _numpy_dtypes.get(name)
    if found is None:
        if name.startswith(("bfloat", "float8")):
            import ml_dtypes

            found = numpy.dtype(getattr(ml_dtypes, name))
        else:
            found = numpy.dtype(name)
        _numpy_dtypes[name] = found
    return found
