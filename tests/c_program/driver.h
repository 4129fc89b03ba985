/* CUDA's driver, opened at run time: the few functions that bring data to a GPU and back. No CUDA header is needed. */
#ifndef DRIVER_H
#define DRIVER_H

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

typedef unsigned long long device_pointer;

static struct {
  int (*init)(unsigned);
  int (*retain)(void**, int);
  int (*set_current)(void*);
  int (*allocate)(device_pointer*, size_t);
  int (*upload)(device_pointer, const void*, size_t);
  int (*download)(void*, device_pointer, size_t);
  int (*synchronize)(void);
} driver;

/* 0, or the name of what is missing. */
static inline const char* open_driver(void) {
  static const char* const names[] = {"cuInit",          "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc_v2",
                                      "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2",          "cuCtxSynchronize"};
  char* next = (char*)&driver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) return "libcuda.so.1";
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i, next += sizeof(void*)) {
    void* function = dlsym(library, names[i]);
    if (!function) return names[i];
    memcpy(next, &function, sizeof function); /* ISO C has no conversion from an object's pointer to a function's */
  }
  return NULL;
}

#endif
