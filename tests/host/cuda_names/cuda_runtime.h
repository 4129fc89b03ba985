// The types of CUDA's runtime that src/kernels/variant.h and its neighbours name, for tests without its headers.
#pragma once
enum cudaError_t : int;
using cudaStream_t = struct CUstream_st*;
struct float4;
