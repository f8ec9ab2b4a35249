// A CUDA runtime that keeps books and does nothing else. LD_PRELOADed, it lets the CUDA build of PyTorch run its real
// host side (dispatch, autocast, device checks, caching allocators, streams, events, capture) without a GPU. Kernels do
// not run: their results are whatever lies in memory. Device memory is reserved address space, which takes no memory
// until it is written. Copies to and from the host are made; large copies between device tensors are not.
#include <sys/mman.h>
#include <time.h>

#include "cuda_runtime_api.h"
#include "stub.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current_device = 0;
static __thread cudaError_t last_error = cudaSuccess;

// ---- counters ----
EXPORT long long stub_counters[32];
extern double stub_gemm_flops[64];
EXPORT long long stub_device_bytes, stub_device_peak;

typedef struct {
  const void* host;
  char name[256];
  long long n;
} Kernel;
static Kernel* kernels;
static int n_kernels, cap_kernels;
static int* hash_table;
static int hash_size = 1 << 18;
static unsigned hash_of(const void* p) { return (unsigned)(((uintptr_t)p >> 3) * 2654435761u) & (hash_size - 1); }
EXPORT int stub_n_kernels(void) { return n_kernels; }
EXPORT const char* stub_kernel_name(int i) { return kernels[i].name; }
EXPORT long long stub_kernel_count(int i) { return kernels[i].n; }
EXPORT void stub_reset(void) {
  memset(stub_counters, 0, sizeof stub_counters);
  memset(stub_gemm_flops, 0, sizeof stub_gemm_flops);
  for (int i = 0; i < n_kernels; i++) kernels[i].n = 0;
  stub_device_peak = stub_device_bytes;
}

// ---- memory ----
typedef struct {
  char* at;
  size_t size;
  int device;
} Range;
#define MAX_RANGES 65536
static Range ranges[MAX_RANGES];
static int n_ranges;  // device -1: pinned host
static Range* range_of(const void* p) {
  for (int i = 0; i < n_ranges; i++)
    if ((char*)p >= ranges[i].at && (char*)p < ranges[i].at + ranges[i].size) return &ranges[i];
  return NULL;
}
static void* take(size_t size, int device) {
  size_t whole = (size + 4095) & ~4095ul;
  if (!whole) whole = 4096;
  void* p = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return NULL;
  ranges[n_ranges++] = (Range){p, whole, device};
  return p;
}
static void give(void* p) {
  Range* r = range_of(p);
  if (!r) return;
  munmap(r->at, r->size);
  *r = ranges[--n_ranges];
}
static cudaError_t fail(cudaError_t e) {
  last_error = e;
  return e;
}

EXPORT cudaError_t cudaMalloc(void** p, size_t size) {
  count(MALLOC);
  pthread_mutex_lock(&lock);
  if (stub_device_bytes + (double)size > memory_bytes()) {
    pthread_mutex_unlock(&lock);
    return fail(cudaErrorMemoryAllocation);
  }
  *p = take(size, current_device);
  stub_device_bytes += size;
  if (stub_device_bytes > stub_device_peak) stub_device_peak = stub_device_bytes;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* p) {
  count(FREE);
  if (!p) return cudaSuccess;
  pthread_mutex_lock(&lock);
  Range* r = range_of(p);
  if (r) stub_device_bytes -= r->size;
  give(p);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** p, size_t size, unsigned f) {
  count(HOST_ALLOC);
  pthread_mutex_lock(&lock);
  *p = take(size, -1);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* p) {
  count(HOST_FREE);
  pthread_mutex_lock(&lock);
  give(p);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void* p, size_t size, unsigned f) {
  pthread_mutex_lock(&lock);
  ranges[n_ranges++] = (Range){p, size, -1};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* p) {
  pthread_mutex_lock(&lock);
  Range* r = range_of(p);
  if (r) *r = ranges[--n_ranges];
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *t = (size_t)memory_bytes();
  *f = *t - stub_device_bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&lock);
  Range* r = range_of(p);
  if (!r) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    a->hostPointer = (void*)p;
  } else if (r->device < 0) {
    a->type = cudaMemoryTypeHost;
    a->hostPointer = (void*)p;
    a->devicePointer = (void*)p;
  } else {
    a->type = cudaMemoryTypeDevice;
    a->device = r->device;
    a->devicePointer = (void*)p;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
static int place(const void* p) {  // 0 pageable, 1 pinned, 2 device
  pthread_mutex_lock(&lock);
  Range* r = range_of(p);
  int w = !r ? 0 : r->device < 0 ? 1 : 2;
  pthread_mutex_unlock(&lock);
  return w;
}
static void copy(void* d, const void* s, size_t n) {
  int from = place(s), to = place(d);
  if (to == 2 && from == 2) {
    count(D2D);
    if (n > 1 << 20) return;
  } else if (to == 2)
    count(from == 1 ? H2D_PINNED : H2D_PAGEABLE);
  else if (from == 2)
    count(to == 1 ? D2H_PINNED : D2H_PAGEABLE);
  memcpy(d, s, n);
}
EXPORT cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) {
  count(MEMCPY_SYNC);
  copy(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t st) {
  copy(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* d, int dd, const void* s, int sd, size_t n, cudaStream_t st) {
  copy(d, s, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h,
                                     enum cudaMemcpyKind k, cudaStream_t st) {
  count(place(s) == 2 ? D2H_PAGEABLE : H2D_PAGEABLE);
  for (size_t i = 0; i < h; i++) memcpy((char*)d + i * dp, (char*)s + i * sp, w);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void* sym, const void* s, size_t n, size_t o, enum cudaMemcpyKind k) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* d, int v, size_t n) {
  count(MEMSET);
  if (n <= 1 << 20) memset(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t s) {
  count(MEMSET);
  if (n <= 1 << 20) memset(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** p, const void* sym) {
  *p = calloc(1, 1 << 16);
  return cudaSuccess;
}

// ---- devices ----
EXPORT cudaError_t cudaGetDeviceCount(int* n) {
  *n = n_devices();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* d) {
  *d = current_device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= n_devices()) return fail(cudaErrorInvalidDevice);
  current_device = d;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, 256, "Stub GPU sm_%d%d", cc_major(), cc_minor());
  p->totalGlobalMem = (size_t)memory_bytes();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = cc_major();
  p->minor = cc_minor();
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = cc_major() == 7 && cc_minor() == 5 ? 1024 : 2048;
  p->l2CacheSize = 50 << 20;
  p->sharedMemPerMultiprocessor = cc_major() >= 8 ? 233472 : 98304;
  p->sharedMemPerBlockOptin = cc_major() >= 8 ? 232448 : cc_minor() == 5 ? 65536 : 98304;
  p->regsPerMultiprocessor = 65536;
  p->maxBlocksPerMultiProcessor = 32;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  p->cooperativeLaunch = 1;
  p->clockRate = 1980000;
  p->memoryClockRate = 2619000;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->ECCEnabled = 1;
  p->clusterLaunch = cc_major() >= 9;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties_v2(&p, d);
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = 132;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = p.maxThreadsPerMultiProcessor;
      break;
    default:
      *v = 1;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* v, int a, int b) {
  *v = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int a, unsigned f) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* l, int* g) {
  *l = 0;
  *g = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int d) {
  *p = (cudaMemPool_t)calloc(1, 64);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* v) {
  *v = 12080;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 12080;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError(void) {
  cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char* cudaGetErrorName(cudaError_t e) {
  return e == 0     ? "cudaSuccess"
         : e == 2   ? "cudaErrorMemoryAllocation"
         : e == 900 ? "cudaErrorStreamCaptureUnsupported"
                    : "cudaErrorStub";
}
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  return e == 0     ? "no error"
         : e == 2   ? "out of memory"
         : e == 900 ? "operation not permitted when stream is capturing"
                    : "stub error";
}
static int nothing(void) { return 0; }
EXPORT cudaError_t cudaGetDriverEntryPoint(const char* s, void** f, unsigned long long fl,
                                           enum cudaDriverEntryPointQueryResult* q) {
  *f = (void*)nothing;
  if (q) *q = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** f, unsigned v, unsigned long long fl,
                                                    enum cudaDriverEntryPointQueryResult* q) {
  *f = (void*)nothing;
  if (q) *q = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- streams, events, graphs ----
typedef struct {
  int capturing;
  unsigned long long id;
} Stream;
static Stream default_stream;
static unsigned long long next_capture = 1;
static int any_capturing;
static Stream* st(cudaStream_t s) { return (uintptr_t)s < 16 ? &default_stream : (Stream*)s; }
static cudaError_t refuse_if_capturing(Stream* s) {
  return s->capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) {
  *s = (cudaStream_t)calloc(1, sizeof(Stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) {
  *s = (cudaStream_t)calloc(1, sizeof(Stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = (cudaStream_t)calloc(1, sizeof(Stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  count(STREAM_SYNC);
  return any_capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
  count(DEVICE_SYNC);
  return any_capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) {
  *p = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* o) {
  *o = st(s)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus* o, unsigned long long* id,
                                               cudaGraph_t* g, const cudaGraphNode_t** d, size_t* n) {
  *o = st(s)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = st(s)->id;
  if (g) *g = (cudaGraph_t)calloc(1, 64);
  if (n) *n = 0;
  if (d) *d = NULL;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  st(s)->capturing = 1;
  st(s)->id = next_capture++;
  any_capturing++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  st(s)->capturing = 0;
  any_capturing--;
  *g = (cudaGraph_t)calloc(1, 64);
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* m) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long f) {
  *e = (cudaGraphExec_t)calloc(1, 64);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long f) {
  *e = (cudaGraphExec_t)calloc(1, 64);
  return cudaSuccess;
}
EXPORT long long stub_graph_launches;
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
  stub_graph_launches++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t g) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t* nodes, size_t* n) {
  *n = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t a, cudaGraphNode_t* b, size_t* n) {
  *n = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t g, const char* p, unsigned f) { return cudaSuccess; }
typedef struct {
  struct timespec t;
} Event;
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  *e = (cudaEvent_t)calloc(1, sizeof(Event));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) {
  free(e);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  clock_gettime(CLOCK_MONOTONIC, &((Event*)e)->t);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) { return cudaSuccess; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  count(EVENT_SYNC);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  struct timespec x = ((Event*)a)->t, y = ((Event*)b)->t;
  *ms = (y.tv_sec - x.tv_sec) * 1e3f + (y.tv_nsec - x.tv_nsec) / 1e6f;
  if (*ms < 1e-3f) *ms = 1e-3f;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* d) {
  f(d);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* d, unsigned x) {
  f(s, cudaSuccess, d);
  return cudaSuccess;
}
EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// ---- kernels ----
static void* handle[16];
EXPORT void** __cudaRegisterFatBinary(void* c) { return handle; }
EXPORT void __cudaRegisterFatBinaryEnd(void** h) {}
EXPORT void __cudaUnregisterFatBinary(void** h) {}
EXPORT char __cudaInitModule(void** h) { return 0; }
EXPORT void __cudaRegisterVar(void** h, char* a, char* b, const char* c, int d, size_t e, int f, int g) {}
EXPORT void __cudaRegisterFunction(void** h, const char* host, char* dev, const char* name, int t, void* a, void* b,
                                   void* c, void* d, int* w) {
  pthread_mutex_lock(&lock);
  if (!hash_table) {
    hash_table = malloc(hash_size * sizeof(int));
    memset(hash_table, -1, hash_size * sizeof(int));
  }
  if (n_kernels == cap_kernels) {
    cap_kernels = cap_kernels ? 2 * cap_kernels : 65536;
    kernels = realloc(kernels, cap_kernels * sizeof(Kernel));
  }
  kernels[n_kernels].host = host;
  kernels[n_kernels].n = 0;
  strncpy(kernels[n_kernels].name, name, 255);
  kernels[n_kernels].name[255] = 0;
  unsigned i = hash_of(host);
  while (hash_table[i] >= 0) i = (i + 1) & (hash_size - 1);
  hash_table[i] = n_kernels++;
  pthread_mutex_unlock(&lock);
}
static __thread struct {
  dim3 g, b;
  size_t s;
  cudaStream_t st;
} config[8];
static __thread int n_config;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st* stream) {
  config[n_config].g = g;
  config[n_config].b = b;
  config[n_config].s = s;
  config[n_config++].st = stream;
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* stream) {
  n_config--;
  *g = config[n_config].g;
  *b = config[n_config].b;
  *s = config[n_config].s;
  *(cudaStream_t*)stream = config[n_config].st;
  return cudaSuccess;
}
static void note(const void* f) {
  count(LAUNCH);
  if (!hash_table) return;
  unsigned i = hash_of(f);
  while (hash_table[i] >= 0) {
    if (kernels[hash_table[i]].host == f) {
      __sync_fetch_and_add(&kernels[hash_table[i]].n, 1);
      return;
    }
    i = (i + 1) & (hash_size - 1);
  }
}
static cudaError_t check_launch(dim3 g, dim3 b, size_t smem) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties_v2(&p, 0);
  if (!g.x || !g.y || !g.z || !b.x || g.y > 65535 || g.z > 65535 || (size_t)b.x * b.y * b.z > 1024 ||
      smem > p.sharedMemPerBlockOptin)
    return fail(cudaErrorInvalidConfiguration);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t stream) {
  note(f);
  return check_launch(g, b, s);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  note(f);
  return check_launch(c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 10 * cc_major() + cc_minor();
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int v) { return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s,
                                                                          unsigned fl) {
  *n = 2;
  return cudaSuccess;
}

// ---- pools, IPC: not used ----
EXPORT cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t s) { return cudaFree(p); }
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* v) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void* v) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc* d, size_t n) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { return cudaSuccess; }
