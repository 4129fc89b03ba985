// The types of CUDA's runtime that src/variants.h names, for tests without CUDA's headers.
#pragma once
enum cudaError_t : int;
using cudaStream_t = struct CUstream_st*;
