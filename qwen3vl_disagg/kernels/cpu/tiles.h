// The inner products of `outer_rows` by tiles (AMX), where the processor has them and the system grants them.
#pragma once
#include "bf16.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

// Asks the system, once for the process (ARCH_REQ_XCOMP_PERM of arch_prctl(2), feature XTILEDATA): without its leave the
// first tile is a fatal signal.
static inline bool may_use_tiles() {
  static int granted = -1;
  int now = __atomic_load_n(&granted, __ATOMIC_RELAXED);
  if (now < 0) __atomic_store_n(&granted, now = syscall(SYS_arch_prctl, 0x1023, 18) == 0, __ATOMIC_RELAXED);
  return now;
}

// What was stored to `p` so far is there for tile loads, which do not tell the compiler that they read memory.
static inline void settle(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// Of this thread: 8 tiles of 16 rows of 64 bytes. What else uses tiles (oneDNN) loads its own.
static inline void begin_tiles() {
  struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {1};
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  settle(&config);
  _tile_loadconfig(&config);
}

static inline void end_tiles() { _tile_release(); }

// As `outer_rows`, for rows and pairs in multiples of 16.
static inline void outer_tiles(const bf16* x, long x_stride, long num_rows, const bf16* packed, long stride,
                               long num_pairs, float* out, long out_stride, bool add) {
  settle(x);
  settle(packed);
  settle(out);
  for (long m = 0; m < num_rows; m += 32) {
    const bool two = m + 32 <= num_rows;
    for (long c = 0; c < 64; c += 32) {
      float* to = out + m * out_stride + c;
      if (add) {
        _tile_loadd(0, to, out_stride * 4);
        _tile_loadd(1, to + 16, out_stride * 4);
        if (two) _tile_loadd(2, to + 16 * out_stride, out_stride * 4);
        if (two) _tile_loadd(3, to + 16 * out_stride + 16, out_stride * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (long i = 0; i < num_pairs; i += 16) {
        _tile_loadd(4, x + m * x_stride + 2 * i, x_stride * 2);
        _tile_loadd(6, packed + (i * stride + c) * 2, stride * 4);
        _tile_loadd(7, packed + (i * stride + c + 16) * 2, stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, x + (m + 16) * x_stride + 2 * i, x_stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, out_stride * 4);
      _tile_stored(1, to + 16, out_stride * 4);
      if (two) _tile_stored(2, to + 16 * out_stride, out_stride * 4);
      if (two) _tile_stored(3, to + 16 * out_stride + 16, out_stride * 4);
    }
  }
}
#else
static inline bool may_use_tiles() { return false; }
static inline void begin_tiles() {}
static inline void end_tiles() {}
static inline void outer_tiles(const bf16* x, long x_stride, long num_rows, const bf16* packed, long stride,
                               long num_pairs, float* out, long out_stride, bool add) {}
#endif
