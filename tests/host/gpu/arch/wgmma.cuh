// src/arch/wgmma.cuh on the emulated GPU: products of what descriptors say, by all 128 threads of a warpgroup together.
#pragma once
#include <array>

#include "emulated.h"

namespace fa3::arch {

/// From the beginning of the block's dynamic shared memory; what lies before it is below 0.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulated::shared_memory);
}
template <class T>
T* pointer_to(uint32_t address) {
  return reinterpret_cast<T*>(emulated::shared_memory + static_cast<int32_t>(address));
}
/// The same place as `own` in another thread block.
template <class T>
T* counterpart(const emulated::Block& block, T* own) {
  return reinterpret_cast<T*>(block.shared + static_cast<int32_t>(shared_address(own)));
}

inline uint32_t descriptor_address(const void* pointer) { return (shared_address(pointer) & 0x3ffff) >> 4; }
constexpr uint64_t descriptor_layout(int swizzle, int leading_offset, int stride_offset) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return uint64_t(leading_offset >> 4) << 16 | uint64_t(stride_offset >> 4) << 32 | mode << 62;
}
inline uint64_t descriptor(uint64_t layout, uint32_t address) {
  return layout >> 32 << 32 | (static_cast<uint32_t>(layout) + address);
}

}  // namespace fa3::arch

namespace emulated {

/// Elements as floats, by their bits.
template <class Element>
struct Decoder {
  std::array<float, size_t{1} << 8 * sizeof(Element)> value;
  Decoder() {
    for (size_t bits = 0; bits < value.size(); ++bits) {
      if constexpr (std::is_same_v<Element, fa3::BFloat16>) {
        value[bits] = __uint_as_float(static_cast<unsigned>(bits) << 16);
      } else if constexpr (std::is_same_v<Element, fa3::Float16>) {
        value[bits] = half_to_float({static_cast<uint16_t>(bits)});
      } else {
        const int exponent = bits >> 3 & 15, fraction = bits & 7;
        const float size = exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp(1.f * fraction, -9);
        value[bits] = (bits & 0x7f) == 0x7f ? NAN : bits & 0x80 ? -size : size;
      }
    }
  }
  static float at(uint32_t address) {
    static const Decoder decoder;
    Element element;
    std::memcpy(&element, shared_memory + address, sizeof element);
    return decoder.value[element.bits];
  }
  static float of(uint32_t word, int index) {
    static const Decoder decoder;
    return decoder.value[word >> 8 * sizeof(Element) * index & (decoder.value.size() - 1)];
  }
};

/// Where the element (row, k) of an operand is whose contraction runs along `k`: along its rows, or across them.
struct Operand {
  uint32_t begin, leading, stride, swizzle;
  explicit Operand(uint64_t descriptor)
      : begin((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle(256 >> (descriptor >> 62)) {}
  uint32_t swizzled(uint32_t at) const { return at ^ (at >> 3 & (swizzle - 1) & 0x70); }
  uint32_t along(int row, int k, int bytes) const {
    return swizzled(begin + row / 8 * stride + row % 8 * swizzle + bytes * k);
  }
  uint32_t across(int row, int k, int bytes) const {
    const uint32_t byte = bytes * row;
    return swizzled(begin + byte / swizzle * leading + k / 8 * stride + k % 8 * swizzle + byte % swizzle);
  }
};

/// The same for every k of 32 bytes. `add` is out of line, for the compiler to make vectors of.
struct Factors {
  float a[64][32], b[32][256], sums[64][256];
  __attribute__((noinline, optimize("O3"), target_clones("arch=x86-64-v3", "default"))) void add(int depth,
                                                                                                 int columns) {
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < depth; ++k) {
        const float factor = a[row][k];
        for (int column = 0; column < columns; ++column) sums[row][column] += factor * b[k][column];
      }
  }
};

enum class Kind { kSS, kTT, kRS, kRK };

template <class Element, Kind kKind, int kN>
void compute(const Product& product) {
  static Factors factors;
  constexpr int kBytes = sizeof(Element), kDepth = 32 / kBytes;
  constexpr bool kAcross = kKind == Kind::kTT || (kKind == Kind::kRS && kBytes == 2);
  const Operand a(product.a), b(product.b);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < kDepth; ++k) {
      float& factor = factors.a[row][k];
      if constexpr (kKind == Kind::kSS || kKind == Kind::kTT) {
        factor = Decoder<Element>::at(kAcross ? a.across(row, k, kBytes) : a.along(row, k, kBytes));
      } else {
        constexpr int kOfWord = 4 / kBytes;  // a quad's lanes have half of the depth, and so again
        const int thread = row / 16 * 32 + row % 8 * 4 + k % (kDepth / 2) / kOfWord;
        factor = Decoder<Element>::of(product.words[thread][row % 16 / 8 + k / (kDepth / 2) * 2], k % kOfWord);
      }
    }
  for (int k = 0; k < kDepth; ++k)
    for (int column = 0; column < kN; ++column)
      factors.b[k][column] = Decoder<Element>::at(kAcross ? b.across(column, k, kBytes) : b.along(column, k, kBytes));
  const auto each = [&](auto move) {
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < kN / 2; ++i)
        move(product.sums[thread][i],
             factors.sums[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2]);
  };
  each([&](const float& own, float& sum) { sum = product.accumulate ? own : 0.f; });
  factors.add(kDepth, kN);
  each([](float& own, float sum) { own = sum; });
}

inline Products& products_of_warpgroup() { return block->products[thread_number / 128]; }

template <class Element, Kind kKind, int kN>
void issue(float* sums, const uint32_t* words, uint64_t a, uint64_t b, bool accumulate) {
  Products& all = products_of_warpgroup();
  Issued& issued = block->current().issued;
  const unsigned index = issued.products++ - all.done;
  if (index == all.queue.size()) all.queue.emplace_back(compute<Element, kKind, kN>, a, b, accumulate);
  Product& product = all.queue[index];
  if (product.a != a || product.b != b || product.accumulate != accumulate ||
      product.compute != &compute<Element, kKind, kN>)
    fail("the threads of a warpgroup issue different products");
  product.sums[thread_number % 128] = sums;
  if (words) std::copy_n(words, 4, product.words[thread_number % 128]);
  if (++product.came == 128 && !block->is_late) all.compute_until(issued.products);
}

}  // namespace emulated

namespace fa3::arch {

template <class Element, int kN>
struct WgmmaSS {
  static void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
    emulated::issue<Element, emulated::Kind::kSS, kN>(d, nullptr, a, b, accumulate);
  }
};
template <class Element, int kN>
struct WgmmaTT {
  static void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
    emulated::issue<Element, emulated::Kind::kTT, kN>(d, nullptr, a, b, accumulate);
  }
};
template <class Element, int kN>
struct WgmmaRS {
  static void mma(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int accumulate) {
    emulated::issue<Element, emulated::Kind::kRS, kN>(d, a, 0, b, accumulate);
  }
};
template <class Element, int kN>
struct WgmmaRK {
  static void mma(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int accumulate) {
    emulated::issue<Element, emulated::Kind::kRK, kN>(d, a, 0, b, accumulate);
  }
};

inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& issued = emulated::block->current().issued;
  issued.groups.push_back(issued.products);
}
template <int kPending>
void wgmma_wait() {
  auto& issued = emulated::block->current().issued;
  auto& all = emulated::products_of_warpgroup();
  if (issued.groups.size() > kPending) {
    const unsigned end = issued.groups[issued.groups.size() - kPending - 1];
    issued.groups.erase(issued.groups.begin(), issued.groups.end() - kPending);
    if (all.meeting.waiting + 1 == 128) all.compute_until(end);
  }
  emulated::block->meet(all.meeting, 128, "its warpgroup's products");
}
template <int kCount>
void wgmma_wrote(float (&)[kCount]) {}
template <int kCount>
void wgmma_reads(uint32_t (&)[kCount]) {}

}  // namespace fa3::arch
