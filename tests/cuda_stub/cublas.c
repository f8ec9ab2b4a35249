// cuBLAS and cuBLASLt that count matrix products and their FLOP, by the type of the first factor.
#include "cuda_runtime_api.h"
#include "stub.h"

EXPORT double stub_gemm_flops[64];  // by cudaDataType: 0 fp32, 1 fp64, 2 fp16, 14 bf16
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void gemm(int type, double m, double n, double k, double batch) {
  count(GEMM);
  pthread_mutex_lock(&lock);
  stub_gemm_flops[type & 63] += 2 * m * n * k * batch;
  pthread_mutex_unlock(&lock);
}
typedef long long ll;
EXPORT int cublasCreate_v2(void** h) {
  *h = calloc(1, 64);
  return 0;
}
EXPORT int cublasGetMathMode(void* h, int* m) {
  *m = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void* h, int* m) {
  *m = 0;
  return 0;
}
EXPORT int cublasSgemm_v2(void* h, int ta, int tb, int m, int n, int k, ...) {
  gemm(0, m, n, k, 1);
  return 0;
}
EXPORT int cublasDgemm_v2(void* h, int ta, int tb, int m, int n, int k, ...) {
  gemm(1, m, n, k, 1);
  return 0;
}
EXPORT int cublasSgemmStridedBatched(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A,
                                     int lda, ll sa, const void* B, int ldb, ll sb, const void* be, void* C, int ldc,
                                     ll sc, int batch) {
  gemm(0, m, n, k, batch);
  return 0;
}
EXPORT int cublasGemmEx(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A, int at, int lda,
                        const void* B, int bt, int ldb, const void* be, void* C, int ct, int ldc, int comp, int algo) {
  gemm(at, m, n, k, 1);
  return 0;
}
EXPORT int cublasGemmStridedBatchedEx(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A,
                                      int at, int lda, ll sa, const void* B, int bt, int ldb, ll sb, const void* be,
                                      void* C, int ct, int ldc, ll sc, int batch, int comp, int algo) {
  gemm(at, m, n, k, batch);
  return 0;
}
EXPORT int cublasSgemmEx(void* h, int ta, int tb, int m, int n, int k, const void* al, const void* A, int at, ...) {
  gemm(at, m, n, k, 1);
  return 0;
}
typedef struct {
  int type;
  double rows, cols;
} Layout;
EXPORT int cublasLtMatrixLayoutCreate(void** l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  Layout* x = calloc(1, 256);
  x->type = type;
  x->rows = rows;
  x->cols = cols;
  *l = x;
  return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(void* l) {
  free(l);
  return 0;
}
EXPORT int cublasLtMatmulDescCreate(void** d, int c, int s) {
  *d = calloc(1, 256);
  return 0;
}
EXPORT int cublasLtMatmulDescDestroy(void* d) {
  free(d);
  return 0;
}
EXPORT int cublasLtMatmulPreferenceCreate(void** d) {
  *d = calloc(1, 256);
  return 0;
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* d) {
  free(d);
  return 0;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* h, void* d, void* a, void* b, void* c, void* dd, void* p, int want,
                                          void* res, int* got) {
  memset(res, 0, 96);
  *got = 1;
  return 0;
}
EXPORT int cublasLtMatmul(void* h, void* d, const void* al, const void* A, void* la, const void* B, void* lb,
                          const void* be, const void* C, void* lc, void* D, void* ld, const void* algo, void* w,
                          size_t ws, cudaStream_t s) {
  Layout *a = la, *o = ld;
  double k = a->rows * a->cols / o->rows;
  gemm(a->type, o->rows, o->cols, k, 1);
  return 0;
}
