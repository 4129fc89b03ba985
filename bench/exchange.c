/* DLPack's exchange API around PyTorch's own, which says of the CPU's memory that it is on cuda:0. */
#include <stddef.h>
#include <stdint.h>

/* Of whoever plays the GPU: the stream that PyTorch would be on. */
void* current_cuda_stream(void);

/* DLPack's structs, by its ABI. */
enum { kCpu = 1, kCuda = 2 };

typedef struct {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  uint32_t dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  uint32_t major, minor;
  void *context, *deleter;
  uint64_t flags;
  Tensor tensor;
} Managed;

typedef struct {
  uint32_t major, minor;
  void* older;
  int (*allocate)(Tensor* prototype, Managed** out, void* context, void* set_error);
  int (*managed_from)(void* object, Managed** out);
  int (*to_object)(Managed* managed, void** out);
  int (*tensor_from)(void* object, Tensor* out);
  int (*current_stream)(int32_t type, int32_t id, void** out);
} Exchange;

static const Exchange* torch;

static int allocate(Tensor* prototype, Managed** out, void* context, void* set_error) {
  prototype->device.type = kCpu;
  const int failed = torch->allocate(prototype, out, context, set_error);
  if (!failed) (*out)->tensor.device.type = kCuda;
  return failed;
}

static int managed_from(void* object, Managed** out) {
  const int failed = torch->managed_from(object, out);
  if (!failed) (*out)->tensor.device.type = kCuda;
  return failed;
}

static int to_object(Managed* managed, void** out) {
  managed->tensor.device.type = kCpu;
  return torch->to_object(managed, out);
}

static int tensor_from(void* object, Tensor* out) {
  const int failed = torch->tensor_from(object, out);
  if (!failed) out->device.type = kCuda;
  return failed;
}

static int current_stream(int32_t type, int32_t id, void** out) {
  (void)type, (void)id;
  *out = current_cuda_stream();
  return 0;
}

/* The exchange API that PyTorch's tensors are given. */
__attribute__((visibility("default"))) const void* exchange_on_cuda(const void* of_torch) {
  static Exchange exchange;
  torch = of_torch;
  exchange =
      (Exchange){torch->major, torch->minor, NULL, allocate, managed_from, to_object, tensor_from, current_stream};
  return &exchange;
}
