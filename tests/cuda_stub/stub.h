// What the C files share.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

// The settings come from the environment: STUB_CC=9.0 (capability), STUB_NDEV=1 (devices), STUB_MEM_GB=80 (memory).
static const char* setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}
static int cc_major(void) { return atoi(setting("STUB_CC", "9.0")); }
static int cc_minor(void) {
  const char* dot = strchr(setting("STUB_CC", "9.0"), '.');
  return dot ? atoi(dot + 1) : 0;
}
static int n_devices(void) { return atoi(setting("STUB_NDEV", "1")); }
static double memory_bytes(void) { return atof(setting("STUB_MEM_GB", "80")) * (1ull << 30); }

// Counters, in the order of NAMES in stub.py.
enum {
  LAUNCH,
  STREAM_SYNC,
  DEVICE_SYNC,
  EVENT_SYNC,
  MEMCPY_SYNC,
  H2D_PINNED,
  H2D_PAGEABLE,
  D2H_PINNED,
  D2H_PAGEABLE,
  D2D,
  MALLOC,
  FREE,
  HOST_ALLOC,
  HOST_FREE,
  MEMSET,
  GEMM
};
extern long long stub_counters[32];
static void count(int what) { __sync_fetch_and_add(&stub_counters[what], 1); }
