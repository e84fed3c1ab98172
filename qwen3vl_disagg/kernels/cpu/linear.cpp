// bfloat16 weights as the checkpoint has them.
#include "few_rows.h"

struct Bf16Weight {
  const bf16* w;
  long depth;
  Bf16Weight at(long n, int) const { return {w + n * depth, depth}; }
  void dot(const bf16* const* x, long num_rows, long n, float* tile) const {
    dot_rows(x, num_rows, w + n * depth, depth, tile);
  }
};

// Up to 4 weights.
extern "C" void q3_linear(const bf16* x, const bf16* const* w, const long* sizes, long num, bf16* out, long T, long N,
                          long D, int threads) {
  Bf16Weight weights[4];
  for (long i = 0; i < num; i++) weights[i] = {w[i], D};
  linear(x, weights, sizes, num, out, T, N, D, threads);
}

extern "C" void q3_experts(const bf16* x, const int64_t* ids, const bf16* weights, const bf16* gate_up, const bf16* down,
                           int32_t* index, bf16* act, bf16* y, bf16* out, long T, long E, long K, long D, long F,
                           int threads) {
  experts(x, ids, weights, Bf16Weight{gate_up, D}, Bf16Weight{down, F}, index, act, y, out, T, E, K, D, F, threads);
}
