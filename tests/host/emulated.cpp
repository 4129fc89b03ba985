// What a test may choose of the emulated GPU, and the memory of its thread blocks: see tests/emulated.py.
#include "dynamic_shared.h"

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

/// For bench/exchange.c: of streams there is one.
void* current_cuda_stream() { return nullptr; }

/// when: 0 what is asynchronous is done as early as it may be, 1 as late, 2 as the seed says.
EXPORTED void emulated_choose(int when, uint64_t seed, int num_sms) {
  emulated::choices = {static_cast<emulated::Choices::When>(when), seed, num_sms};
}

}  // extern "C"
