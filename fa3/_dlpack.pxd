# The structs of the DLPack 1.x ABI (dmlc.github.io/dlpack), declared from its published layout, so that no
# header is needed. Names and order of the fields are the ABI's.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    DL_CPU = 1
    DL_CUDA = 2
    DL_CUDA_HOST = 3      # pinned: plain host memory to everybody but the copy engines
    DL_CUDA_MANAGED = 13  # its device_id is 0 wherever the pages are

cdef enum:
    DL_FLOAT = 2          # the type code of IEEE's floats, bfloat16 and fp8 not among them

cdef enum:
    DL_FLAG_READ_ONLY = 1
    DL_FLAG_IS_COPIED = 2

ctypedef struct DLPackVersion:
    uint32_t major
    uint32_t minor

ctypedef struct DLDevice:
    int32_t device_type
    int32_t device_id

ctypedef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

ctypedef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t *shape
    int64_t *strides      # in elements; NULL (before 1.2): C-contiguous
    uint64_t byte_offset

cdef struct DLManagedTensor:  # capsule "dltensor"
    DLTensor dl_tensor
    void *manager_ctx
    void (*deleter)(DLManagedTensor *) noexcept

cdef struct DLManagedTensorVersioned:  # capsule "dltensor_versioned"
    DLPackVersion version
    void *manager_ctx
    void (*deleter)(DLManagedTensorVersioned *) noexcept
    uint64_t flags
    DLTensor dl_tensor

cdef struct DLPackExchangeAPIHeader:
    DLPackVersion version
    DLPackExchangeAPIHeader *prev_api

# What a type's `__dlpack_c_exchange_api__` holds (capsule "dlpack_exchange_api"). All return 0, or −1 with a
# Python exception set; the allocator tells its errors to SetError. No function orders streams: the caller
# does, with what current_work_stream says.
cdef struct DLPackExchangeAPI:
    DLPackExchangeAPIHeader header
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_ctx,
                                    void (*SetError)(void *, const char *, const char *) noexcept) noexcept
    int (*managed_tensor_from_py_object_no_sync)(void *py_object, DLManagedTensorVersioned **out) noexcept
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out) noexcept
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out) noexcept  # may be NULL
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out) noexcept
