/* Attention on a GPU through the C interface, against a loop. Exits 77, with the reason, where there is no such GPU.
 * Memory comes from CUDA's driver; the library brings its own runtime. */
#include <math.h>

#include "checks.h"
#include "driver.h"

enum { kBatch = 2, kRowsQ = 37, kRowsK = 170, kHeads = 6, kHeadsKv = 2, kDim = 128, kGuard = 64, kMargin = 256 };

/* What is asked of a call, and what its workspace holds before: it need not be initialised. */
typedef struct variation {
  int causal, padding, num_splits, pack_gqa;
  unsigned char workspace_holds;
} variation;

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

/* `bytes` of workspace between margins, the one behind it `behind` bytes long, all of it full of `byte`. */
static device_pointer filled_workspace(size_t bytes, size_t behind, unsigned char byte) {
  const size_t all = kMargin + bytes + behind;
  void* filling = malloc(all);
  memset(filling, byte, all);
  const device_pointer memory = on_device(filling, all);
  free(filling);
  return memory + kMargin;
}

/* Nothing was written around it. */
static void check_margins(device_pointer workspace, size_t bytes, size_t behind, unsigned char byte) {
  unsigned char* memory = malloc(kMargin + bytes + behind);
  CHECK(driver.download(memory, workspace - kMargin, kMargin + bytes + behind) == 0, "a download");
  for (size_t i = 0; i < kMargin; ++i) CHECK(memory[i] == byte, "written before the workspace");
  for (size_t i = 0; i < behind; ++i)
    CHECK(memory[kMargin + bytes + i] == byte, "written %zu bytes past a workspace of %zu", i, bytes);
  free(memory);
}

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

static void check_attention(variation vary) {
  const int padding = vary.padding;
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
  p.mask.causal = vary.causal;
  p.num_splits = vary.num_splits;
  p.pack_gqa = vary.pack_gqa;

  size_t bytes = 0;
  CHECK(fa3_forward_workspace(&p, &bytes) == FA3_OK, "workspace");
  CHECK((bytes > 0) == (padding % 8 != 0 || vary.num_splits > 1), "%zu bytes: for parts and copies only", bytes);
  device_pointer workspace = 0;
  if (bytes) {
    CHECK(fa3_forward(&p, NULL, NULL) == FA3_ERROR_WORKSPACE, "a workspace is needed");
    workspace = filled_workspace(bytes, kMargin, vary.workspace_holds);
  }
  /* A second time in what the first has left behind; then without the first one's results. */
  CHECK(fa3_forward(&p, as_pointer(workspace), NULL) == FA3_OK, "forward");
  CHECK(driver.upload(out_device, out, (count + 2 * kGuard) * sizeof *out) == 0, "an upload");
  CHECK(fa3_forward(&p, as_pointer(workspace), NULL) == FA3_OK, "forward");
  CHECK(driver.synchronize() == 0, "the kernel failed");
  if (bytes) check_margins(workspace, bytes, kMargin, vary.workspace_holds);
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

/* Sequences that overlap have more tiles than the rows of q would make: the parts of all must not be written, only
 * those that the workspace has room for. */
static void check_lengths_that_lie(void) {
  enum { kSequences = 8, kRows = 640 };
  int32_t cu_seqlens[kSequences + 1];
  for (int i = 0; i <= kSequences; ++i) cu_seqlens[i] = i % 2 ? kRows : 0;
  const size_t q_bytes = (size_t)kRows * kHeads * kDim * 2;
  const device_pointer lengths = on_device(cu_seqlens, sizeof cu_seqlens);
  fa3_forward_params p = dense_call(kSequences, kRows, kRows, kHeads, kHeadsKv, as_pointer(on_device(NULL, q_bytes)));
  p.out.data = as_pointer(on_device(NULL, q_bytes));
  p.queries.cu_seqlens = p.keys.cu_seqlens = as_pointer(lengths);
  for (p.num_splits = 2; p.num_splits <= 3; ++p.num_splits)
    for (p.pack_gqa = 0; p.pack_gqa <= 1; ++p.pack_gqa) {
      size_t bytes = 0;
      CHECK(fa3_forward_workspace(&p, &bytes) == FA3_OK && bytes > 0, "parts need a workspace");
      const device_pointer workspace = filled_workspace(bytes, 4 * bytes, 0x5a);
      CHECK(fa3_forward(&p, as_pointer(workspace), NULL) == FA3_OK, "forward");
      CHECK(driver.synchronize() == 0, "the kernel failed");
      check_margins(workspace, bytes, 4 * bytes, 0x5a);
    }
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
    check_attention((variation){causal, 0, 1, -1, 0});
    check_attention((variation){causal, 8, 1, -1, 0});
    check_attention((variation){causal, 1, 1, -1, 0}); /* rows off 16 bytes: copied first */
    for (int pack_gqa = 0; pack_gqa <= 1; ++pack_gqa)
      for (int num_splits = 1; num_splits <= 100; num_splits = 2 * num_splits + 1) {
        check_attention((variation){causal, 0, num_splits, pack_gqa, 0x00});
        check_attention((variation){causal, 1, num_splits, pack_gqa, 0xff});
        check_attention((variation){causal, 0, num_splits, pack_gqa, 0x5a});
      }
  }
  check_lengths_that_lie();
  return 0;
}
