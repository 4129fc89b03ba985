// The types of CUDA's runtime that src/variants.h and src/kernels/forward_args.h name, for tests without its headers.
#pragma once
enum cudaError_t : int;
using cudaStream_t = struct CUstream_st*;
struct float4;
