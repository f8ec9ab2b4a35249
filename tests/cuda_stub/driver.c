// A CUDA driver that does nothing but count the launches of Triton's kernels.
#define __CUDA_API_VERSION_INTERNAL
#include "stub.h"

typedef struct {
  char name[256];
  long long n;
  int regs;
} Function;
static Function* functions[4096];
static int n_functions;
EXPORT int stub_n_functions(void) { return n_functions; }
EXPORT const char* stub_function_name(int i) { return functions[i]->name; }
EXPORT long long stub_function_count(int i) { return functions[i]->n; }
EXPORT void stub_function_reset(void) {
  for (int i = 0; i < n_functions; i++) functions[i]->n = 0;
}
EXPORT int cuInit(unsigned f) { return 0; }
EXPORT int cuDriverGetVersion(int* v) {
  *v = 12080;
  return 0;
}
EXPORT int cuDeviceGetCount(int* n) {
  *n = 1;
  return 0;
}
EXPORT int cuDeviceGet(int* d, int i) {
  *d = i;
  return 0;
}
static void* context[64];
EXPORT int cuCtxGetCurrent(void** c) {
  *c = context;
  return 0;
}
EXPORT int cuCtxGetDevice(int* d) {
  *d = 0;
  return 0;
}
EXPORT int cuCtxSetCurrent(void* c) { return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** c, int d) {
  *c = context;
  return 0;
}
EXPORT int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* active) {
  *f = 0;
  *active = 1;
  return 0;
}
EXPORT int cuGetErrorString(int e, const char** s) {
  *s = "stub";
  return 0;
}
EXPORT int cuGetErrorName(int e, const char** s) {
  *s = "stub";
  return 0;
}
EXPORT int cuDeviceGetAttribute(int* v, int a, int d) {
  switch (a) {
    case 1:
      *v = 1024;
      break;
    case 8:
      *v = 49152;
      break;
    case 10:
      *v = 32;
      break;
    case 16:
      *v = 132;
      break;
    case 75:
      *v = cc_major();
      break;
    case 76:
      *v = cc_minor();
      break;
    case 97:
      *v = 232448;
      break;
    case 12:
    case 82:
      *v = 65536;
      break;
    case 13:
      *v = 1980000;
      break;
    case 36:
      *v = 2619000;
      break;
    case 37:
      *v = 5120;
      break;
    case 39:
      *v = 2048;
      break;
    default:
      *v = 1;
  }
  return 0;
}
EXPORT int cuModuleLoadData(void** m, const void* i) {
  *m = calloc(1, 64);
  return 0;
}
EXPORT int cuModuleGetFunction(void** f, void* m, const char* name) {
  Function* x = calloc(1, sizeof *x);
  strncpy(x->name, name, 255);
  if (n_functions < 4096) functions[n_functions++] = x;
  *f = x;
  return 0;
}
EXPORT int cuFuncGetAttribute(int* v, int a, void* f) {
  *v = a == 0 ? 1024 : a == 4 ? 64 : 0;
  return 0;
}
EXPORT int cuFuncSetAttribute(void* f, int a, int v) { return 0; }
EXPORT int cuFuncSetCacheConfig(void* f, int v) { return 0; }
EXPORT int cuLaunchKernel(void* f, unsigned a, ...) {
  ((Function*)f)->n++;
  return 0;
}
EXPORT int cuLaunchKernelEx(const void* c, void* f, void** p, void** e) {
  ((Function*)f)->n++;
  return 0;
}
EXPORT int cuOccupancyMaxActiveClusters(int* n, void* f, const void* c) {
  *n = 1;
  return 0;
}
static int generic(void) { return 0; }
EXPORT int cuGetProcAddress(const char* s, void** f, int v, uint64_t fl) {
  *f = (void*)generic;
  return 0;
}
EXPORT int cuGetProcAddress_v2(const char* s, void** f, int v, uint64_t fl, void* q) {
  *f = (void*)generic;
  return 0;
}
