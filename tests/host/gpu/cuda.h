// Of the driver's header: a map of TMA, as what it says.
#pragma once
#include <cstdint>

struct CUtensorMap {
  const uint8_t* data;
  int axes, element_bytes, swizzle;
  int64_t extents[5];  // elements
  int64_t strides[5];  // bytes; the first is an element's
  int box[5];          // elements; it is 1 along the last two axes
};

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_32B = 32,
  CU_TENSOR_MAP_SWIZZLE_64B = 64,
  CU_TENSOR_MAP_SWIZZLE_128B = 128
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

/// Refuses what the driver refuses: addresses and strides off 16 bytes, extents of 0, boxes that are too large.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t axes, void* data,
                                       const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr CUresult kInvalidValue = 1;
  if (!data || reinterpret_cast<uintptr_t>(data) % 16 || axes > 5) return kInvalidValue;
  *map = {};
  map->data = static_cast<const uint8_t*>(data);
  map->axes = static_cast<int>(axes);
  map->element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  map->swizzle = swizzle;
  for (cuuint32_t axis = 0; axis < axes; ++axis) {
    const cuuint64_t stride = axis ? strides[axis - 1] : static_cast<cuuint64_t>(map->element_bytes);
    if (!extents[axis] || extents[axis] > cuuint64_t{1} << 32 || !box[axis] || box[axis] > 256) return kInvalidValue;
    if (axis && (stride % 16 || stride >= cuuint64_t{1} << 40)) return kInvalidValue;
    map->extents[axis] = static_cast<int64_t>(extents[axis]);
    map->strides[axis] = static_cast<int64_t>(stride);
    map->box[axis] = static_cast<int>(box[axis]);
  }
  return map->box[0] * map->element_bytes <= swizzle ? 0 : kInvalidValue;
}
