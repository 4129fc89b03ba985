// The one type of CUDA's driver interface that src/kernels/forward_args.h names, for tests without CUDA's headers.
#pragma once
struct CUtensorMap {
  char bytes[128];
};
