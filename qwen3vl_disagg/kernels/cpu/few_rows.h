// Linear layers and experts for few rows: bound by reading the weights, which stay as they lie in memory.
//
// How a weight is read is a template argument: `Weight::dot(x, num_rows, n, tile)` puts x[m] . w[n + i] into
// tile[m * 4 + i], for 4 rows of w; `Weight::at(n, thread)` is the weight from row n on, for one thread to read.
#pragma once
#include <math.h>
#include "bf16.h"

extern "C" int omp_get_thread_num(void);

// out[T, N] = x[T, D] [w_0; w_1; ..]^T for `num` weights w_i[sizes[i], D], whose sizes add up to N. Sizes are multiples
// of 4, D of 32, T is at most 64. By all threads of a team.
template <typename Weight>
static void linear(const bf16* x, const Weight* weights, const long* sizes, long num, bf16* out, long T, long N,
                   long D) {
  const bf16* rows[64];
  float tile[64 * 4];
  for (long t = 0; t < T; t++) rows[t] = x + t * D;
  for (long i = 0, start = 0; i < num; start += sizes[i++]) {
    const Weight w = weights[i].at(0, omp_get_thread_num());
#pragma omp for schedule(static) nowait
    for (long n = 0; n < sizes[i]; n += 4) {
      w.dot(rows, T, n, tile);
      store_tile(tile, T, out + start + n, N);
    }
  }
#pragma omp barrier
}

// Rows of an expert, in blocks, so that the scratch of a thread is bounded.
static const long BLOCK = 24;

// silu(gate) * up, rounded where the modules round.
static inline __m512 swiglu(__m512 gate, __m512 up) {
  const __m512 g = round_ps(gate), one = _mm512_set1_ps(1.0f);
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));  // of -|g|, so that nothing overflows
  const __mmask16 is_negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OS);
  const __m512 numerator = _mm512_mask_mul_ps(g, is_negative, g, e);
  return _mm512_mul_ps(round_ps(_mm512_div_ps(numerator, _mm512_add_ps(one, e))), round_ps(up));
}

static inline __m512 swiglu(const float* gate, const float* up) {
  return swiglu(_mm512_loadu_ps(gate), _mm512_loadu_ps(up));
}

static inline long block_at(long first, long end) { return end - first < BLOCK ? end - first : BLOCK; }

// Rows of x sorted by expert: those of expert e are [starts[e], starts[e + 1]), row r is that of token_of[r], and choice
// (t, k) is row row_of[t * K + k], -1 where ids[t * K + k], which is not below E, is remote.
struct Routed {
  int32_t *starts, *token_of, *row_of;

  // index: E + 1 + 2 * T * K numbers of scratch, which `sort` fills.
  Routed(int32_t* index, long T, long E, long K)
      : starts(index), token_of(index + E + 1), row_of(token_of + T * K) {}

  void sort(const int64_t* ids, long T, long E, long K) const {
    memset(starts, 0, (E + 1) * sizeof(int32_t));
    for (long i = 0; i < T * K; i++)
      if ((uint64_t)ids[i] < (uint64_t)E) starts[ids[i] + 1]++;
    for (long e = 0; e < E; e++) starts[e + 1] += starts[e];
    for (long i = 0; i < T * K; i++) {  // starts[e] runs on to the end of expert e, which is where e + 1 begins
      row_of[i] = (uint64_t)ids[i] < (uint64_t)E ? starts[ids[i]]++ : -1;
      if (row_of[i] >= 0) token_of[row_of[i]] = (int32_t)(i / K);
    }
    for (long e = E; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
  }

  // The weighted sum of token t's rows of y[.., D], in float.
  void sum(long t, const bf16* weights, const bf16* y, bf16* out, long K, long D) const {
    for (long d = 0; d < D; d += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (long i = t * K; i < t * K + K; i++)
        if (row_of[i] >= 0)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(to_float(weights[i])), load_wide(y + (long)row_of[i] * D + d), sum);
      _mm256_storeu_si256((__m256i*)(out + t * D + d), narrow(sum));
    }
  }
};

// The weighted sum over each token's K experts; ids[T, K] says which. Every rounding is where the modules have one.
// gate_up is [E * 2F, D], down [E * D, F].
// Scratch: index[E + 1 + 2 * T * K] int32, act[T * K, F] and y[T * K, D] bf16. By all threads of a team.
template <typename Weight>
static void experts(const bf16* x, const int64_t* ids, const bf16* weights, const Weight& gate_up, const Weight& down,
                    int32_t* index, bf16* act, bf16* y, bf16* out, long T, long E, long K, long D, long F) {
  const Routed routed(index, T, E, K);
#pragma omp single
  routed.sort(ids, T, E, K);
  const int32_t *starts = routed.starts, *token_of = routed.token_of;
  const bf16* rows[BLOCK];
  float gate[BLOCK * 4], up[BLOCK * 4];
  const int thread = omp_get_thread_num();
  for (long e = 0; e < E; e++)
    for (long first = starts[e]; first < starts[e + 1]; first += BLOCK) {
      const long count = block_at(first, starts[e + 1]);
      for (long r = 0; r < count; r++) rows[r] = x + (long)token_of[first + r] * D;
      const Weight w = gate_up.at(e * 2 * F, thread);
#pragma omp for schedule(static) nowait
      for (long f = 0; f < F; f += 4) {
        w.dot(rows, count, f, gate);
        w.dot(rows, count, F + f, up);
        for (long i = 0; i < count * 4; i += 16) _mm512_storeu_ps(gate + i, swiglu(gate + i, up + i));
        store_tile(gate, count, act + first * F + f, F);
      }
    }
#pragma omp barrier
  for (long e = 0; e < E; e++)
    for (long first = starts[e]; first < starts[e + 1]; first += BLOCK) {
      const long count = block_at(first, starts[e + 1]);
      for (long r = 0; r < count; r++) rows[r] = act + (first + r) * F;
      const Weight w = down.at(e * D, thread);
#pragma omp for schedule(static) nowait
      for (long d = 0; d < D; d += 4) {
        w.dot(rows, count, d, gate);
        store_tile(gate, count, y + first * D + d, D);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
  for (long t = 0; t < T; t++) routed.sum(t, weights, y, out, K, D);
}
