/* Attention on a GPU through the C interface, against a loop. Exits 77, with the reason, where there is no such GPU.
 * Memory comes from CUDA's driver; the library brings its own runtime. */
#include <math.h>

#include "checks.h"
#include "driver.h"

enum { kBatch = 2, kRowsQ = 37, kRowsK = 170, kHeads = 6, kHeadsKv = 2, kDim = 128, kGuard = 64 };

static uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Sums of uniform numbers: near enough to normal ones. */
static float draw(void) {
  static uint32_t state = 20261120;
  float sum = 0;
  for (int i = 0; i < 12; ++i) {
    state = state * 1664525u + 1013904223u;
    sum += (float)(state >> 8) / 16777216.f;
  }
  return sum - 6;
}

static device_pointer on_device(const void* data, size_t bytes) {
  device_pointer pointer = 0;
  CHECK(driver.allocate(&pointer, bytes) == 0, "%zu bytes of device memory", bytes);
  if (data) CHECK(driver.upload(pointer, data, bytes) == 0, "an upload");
  return pointer;
}

static void* as_pointer(device_pointer pointer) { return (void*)(uintptr_t)pointer; }

/* A (batch, rows, heads, dim) array whose rows are `padding` elements further apart than they need be. */
typedef struct operand {
  uint16_t* values;
  fa3_array array;
  size_t count;
} operand;

static operand random_operand(int rows, int heads, int padding) {
  operand made;
  const int64_t row = (int64_t)heads * kDim + padding;
  made.count = (size_t)(kBatch * rows * row);
  made.values = malloc(made.count * sizeof *made.values);
  for (size_t i = 0; i < made.count; ++i) made.values[i] = to_bfloat16(draw());
  made.array = packed(as_pointer(on_device(made.values, made.count * 2)), rows, heads, kDim);
  made.array.stride[0] = rows * row;
  made.array.stride[1] = row;
  return made;
}

static const uint16_t* row_of(const operand* x, int batch, int row, int head) {
  return x->values + batch * x->array.stride[0] + row * x->array.stride[1] + head * x->array.stride[2];
}

/* One row by the formula; returns its lse. */
static double attend_row(const operand* q, const operand* k, const operand* v, const fa3_forward_params* p, int batch,
                         int row, int head, double* out) {
  const int head_kv = head / (kHeads / kHeadsKv);
  const int last = p->mask.causal ? row + kRowsK - kRowsQ : kRowsK - 1;
  double scores[kRowsK], top = -INFINITY, sum = 0;
  for (int j = 0; j <= last; ++j) {
    scores[j] = 0;
    for (int d = 0; d < kDim; ++d)
      scores[j] +=
          (double)from_bfloat16(row_of(q, batch, row, head)[d]) * from_bfloat16(row_of(k, batch, j, head_kv)[d]);
    scores[j] *= p->softmax_scale;
    top = fmax(top, scores[j]);
  }
  for (int d = 0; d < kDim; ++d) out[d] = 0;
  for (int j = 0; j <= last; ++j) {
    const double weight = exp(scores[j] - top);
    sum += weight;
    for (int d = 0; d < kDim; ++d) out[d] += weight * from_bfloat16(row_of(v, batch, j, head_kv)[d]);
  }
  for (int d = 0; d < kDim; ++d) out[d] /= sum;
  return top + log(sum);
}

static void check_attention(int causal, int padding) {
  const operand q = random_operand(kRowsQ, kHeads, 0), k = random_operand(kRowsK, kHeadsKv, padding),
                v = random_operand(kRowsK, kHeadsKv, 0);
  const size_t count = (size_t)kBatch * kRowsQ * kHeads * kDim, rows = (size_t)kBatch * kHeads * kRowsQ;
  uint16_t* out = malloc((count + 2 * kGuard) * sizeof *out);
  float* lse = malloc(rows * sizeof *lse);
  memset(out, 0xff, (count + 2 * kGuard) * sizeof *out);
  const device_pointer out_device = on_device(out, (count + 2 * kGuard) * sizeof *out);
  const device_pointer lse_device = on_device(NULL, rows * sizeof *lse);

  fa3_forward_params p = dense_call(kBatch, kRowsQ, kRowsK, kHeads, kHeadsKv, NULL);
  p.q = q.array;
  p.k = k.array;
  p.v = v.array;
  p.out.data = as_pointer(out_device + 2 * kGuard);
  p.lse.data = as_pointer(lse_device);
  p.lse.stride[0] = kHeads * kRowsQ;
  p.lse.stride[1] = kRowsQ;
  p.lse.stride[2] = 1;
  p.mask.causal = causal;

  size_t bytes = 0;
  CHECK(fa3_forward_workspace(&p, &bytes) == FA3_OK, "workspace");
  CHECK((bytes > 0) == (padding % 8 != 0), "%zu bytes: only what TMA cannot address is copied", bytes);
  if (bytes) CHECK(fa3_forward(&p, NULL, NULL) == FA3_ERROR_NULL, "a workspace is needed");
  CHECK(fa3_forward(&p, bytes ? as_pointer(on_device(NULL, bytes)) : NULL, NULL) == FA3_OK, "forward");
  CHECK(driver.synchronize() == 0, "the kernel failed");
  CHECK(driver.download(out, out_device, (count + 2 * kGuard) * sizeof *out) == 0, "a download");
  CHECK(driver.download(lse, lse_device, rows * sizeof *lse) == 0, "a download");

  for (int i = 0; i < kGuard; ++i)
    CHECK(out[i] == 0xffff && out[kGuard + count + (size_t)i] == 0xffff, "written outside of out");
  for (int b = 0; b < kBatch; ++b)
    for (int i = 0; i < kRowsQ; ++i)
      for (int h = 0; h < kHeads; ++h) {
        double expected[kDim];
        const double expected_lse = attend_row(&q, &k, &v, &p, b, i, h, expected);
        const float* got = lse + (b * kHeads + h) * kRowsQ + i;
        CHECK(fabs(*got - expected_lse) <= 1e-3 + 1e-5 * fabs(expected_lse), "lse of (%d, %d, %d): %g, not %g", b, i, h,
              (double)*got, expected_lse);
        for (int d = 0; d < kDim; ++d) {
          const float x = from_bfloat16(out[kGuard + ((b * kRowsQ + i) * kHeads + h) * kDim + d]);
          CHECK(fabs(x - expected[d]) <= 0.01 + 0.01 * fabs(expected[d]), "out of (%d, %d, %d, %d): %g, not %g", b, i,
                h, d, (double)x, expected[d]);
        }
      }
  free(out);
  free(lse);
  free(q.values);
  free(k.values);
  free(v.values);
}

static int skip(const char* reason) {
  printf("%s\n", reason);
  return 77;
}

int main(void) {
  int32_t count = 0, device = -1;
  fa3_device info;
  void* context = NULL;
  CHECK(fa3_device_count(&count) == FA3_OK, "devices");
  if (count == 0) return skip("no CUDA device");
  CHECK(fa3_device_query(0, &info) == FA3_OK, "device 0");
  if (info.major != 9 || info.minor != 0) return skip("device 0 is not of compute capability 9.0");
  const char* missing = open_driver();
  CHECK(!missing, "%s", missing);
  CHECK(!driver.init(0) && !driver.retain(&context, 0) && !driver.set_current(context), "device 0's context");

  const device_pointer probe = on_device(NULL, 256);
  CHECK(fa3_pointer_device(as_pointer(probe), &device) == FA3_OK && device == 0, "device %d", device);
  CHECK(fa3_pointer_device(&device, &device) == FA3_OK && device == -1, "host memory, not device %d", device);
  CHECK(fa3_stream_wait(NULL, NULL, 0) == FA3_OK, "a stream waits for itself");
  for (int causal = 0; causal <= 1; ++causal) {
    check_attention(causal, 0);
    check_attention(causal, 8);
    check_attention(causal, 1); /* rows off 16 bytes: copied first */
  }
  return 0;
}
