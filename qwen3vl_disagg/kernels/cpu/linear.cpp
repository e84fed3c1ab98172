// bfloat16 weights as the checkpoint has them.
#include "expert_tiles.h"
#include "step.h"

struct Bf16Weight {
  const bf16* w;
  long depth;
  Bf16Weight at(long n, int) const { return {w + n * depth, depth}; }
  void dot(const bf16* const* x, long num_rows, long n, float* tile) const {
    dot_rows(x, num_rows, w + n * depth, depth, tile);
  }
};

#ifdef __AMX_BF16__
static inline void pack_group(const bf16* x, long count, long D, bf16* packed) {
  const bf16* rows[16];
  for (long r = 0; r < count; r++) rows[r] = x + r * D;
  pack_rows(rows, count, D, packed);
}
#endif

// With fewer rows reading the weights is all there is, and tiles read 32 rows of one at a time.
static const long FEW = 4;

// Up to 4 weights. By tiles only where there are any and all sizes are multiples of 32; then packed[rows, D] is scratch,
// whole groups of 16 rows, one for each thread at least: for so few rows each packs its own, which takes no meeting.
static void linear_of(const bf16* x, const bf16* const* w, const long* sizes, long num, bf16* packed, bf16* out, long T,
                      long N, long D, int by_tiles) {
#ifdef __AMX_BF16__
  if (by_tiles && T > FEW) {
    begin_tiles();
    if (T <= 16) {
      packed += omp_get_thread_num() * 16 * D;
      pack_group(x, T, D, packed);
    } else {
#pragma omp for schedule(static)
      for (long t = 0; t < T; t += 16) pack_group(x + t * D, T - t < 16 ? T - t : 16, D, packed + t * D);
    }
    settle(packed);
    for (long i = 0, start = 0; i < num; start += sizes[i++])
#pragma omp for schedule(static) nowait
      for (long n = 0; n < sizes[i]; n += 32)
        linear_tiles(w[i] + n * D, packed, T, n + 32 < sizes[i] ? 32 * D : 0, out + start + n, N, D);
    end_tiles();
#pragma omp barrier
    return;
  }
#endif
  Bf16Weight weights[4];
  for (long i = 0; i < num; i++) weights[i] = {w[i], D};
  linear(x, weights, sizes, num, out, T, N, D);
}

extern "C" void q3_linear(const bf16* x, const bf16* const* w, const long* sizes, long num, bf16* packed, bf16* out,
                          long T, long N, long D, int by_tiles, int threads) {
  by_tiles = by_tiles && may_use_tiles();
#pragma omp parallel num_threads(threads)
  linear_of(x, w, sizes, num, packed, out, T, N, D, by_tiles);
}

extern "C" void step_linear(const Word* a, long T) {
  linear_of((bf16*)a[0].p, (bf16**)a[1].p, (long*)a[2].p, a[3].l, (bf16*)a[4].p, (bf16*)a[5].p, T, a[7].l, a[8].l,
            (int)a[9].l);
}

// Whether the processor and the system have AMX's tiles, and the compiler knew them.
extern "C" void q3_has_tiles(int* has) {
  *has = may_use_tiles();
}

// By tiles only where there are any; then scratch as `experts_by_tiles` wants it.
extern "C" void q3_experts(const bf16* x, const int64_t* ids, const bf16* weights, const bf16* gate_up, const bf16* down,
                           int32_t* index, bf16* act, bf16* y, bf16* out, long T, long E, long K, long D, long F,
                           int by_tiles, int threads) {
#ifdef __AMX_BF16__
  if (by_tiles && may_use_tiles()) {
    experts_by_tiles(x, ids, weights, gate_up, down, index, act, y, out, T, E, K, D, F, threads);
    return;
  }
#endif
#pragma omp parallel num_threads(threads)
  experts(x, ids, weights, Bf16Weight{gate_up, D}, Bf16Weight{down, F}, index, act, y, out, T, E, K, D, F);
}

extern "C" void step_experts(const Word* a, long T) {
  const long D = a[12].l, F = a[13].l;
  experts((bf16*)a[0].p, (int64_t*)a[1].p, (bf16*)a[2].p, Bf16Weight{(bf16*)a[3].p, D}, Bf16Weight{(bf16*)a[4].p, F},
          (int32_t*)a[5].p, (bf16*)a[6].p, (bf16*)a[7].p, (bf16*)a[8].p, T, a[10].l, a[11].l, D, F);
}

// silu(gate) * up -> out[T, F]; rows of gate and up lie apart. F is a multiple of 16.
static void swiglu(const bf16* gate, long gate_stride, const bf16* up, long up_stride, bf16* out, long T, long F) {
#pragma omp for schedule(static) collapse(2)
  for (long t = 0; t < T; t++)
    for (long f = 0; f < F; f += 16) {
      const __m512 act = swiglu(load_wide(gate + t * gate_stride + f), load_wide(up + t * up_stride + f));
      _mm256_storeu_si256((__m256i*)(out + t * F + f), narrow(act));
    }
}

extern "C" void q3_swiglu(const bf16* gate, long gate_stride, const bf16* up, long up_stride, bf16* out, long T, long F,
                          int threads) {
#pragma omp parallel num_threads(threads) if (T * F >= 1 << 15)
  swiglu(gate, gate_stride, up, up_stride, out, T, F);
}

extern "C" void step_swiglu(const Word* a, long T) {
  swiglu((bf16*)a[0].p, a[1].l, (bf16*)a[2].p, a[3].l, (bf16*)a[4].p, T, a[6].l);
}
