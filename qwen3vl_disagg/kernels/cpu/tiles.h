// The tiles of AMX, where the processor has them and the system grants them.
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

#else
static inline bool may_use_tiles() { return false; }
static inline void begin_tiles() {}
static inline void end_tiles() {}
#endif
