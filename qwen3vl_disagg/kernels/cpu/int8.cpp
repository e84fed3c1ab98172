// int8 weights, -127 to 127, with a float scale for each row: made bfloat16 on the way, which is exact, summed in float,
// and the scale comes last.
#include "few_rows.h"
#include "step.h"

// The two bytes of 0.0, 1.0 .. 127.0 in bfloat16.
struct Tables {
  uint8_t low[128], high[128];
  constexpr Tables() : low(), high() {
    for (int i = 1; i < 128; i++) {
      int power = 6;
      while (!(i >> power)) power--;
      const int bits = (127 + power) << 7 | (i << (7 - power) & 0x7f);
      low[i] = (uint8_t)bits, high[i] = (uint8_t)(bits >> 8);
    }
  }
};
alignas(64) static constexpr Tables TABLES;

// 64 int8 -> bfloat16, in order.
struct Widener {
  __m512i low[2], high[2], order, sign;
  Widener() {
    for (int i = 0; i < 2; i++) {
      low[i] = _mm512_load_si512(TABLES.low + 64 * i);
      high[i] = _mm512_load_si512(TABLES.high + 64 * i);
    }
    order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking works within each 16 bytes
    sign = _mm512_set1_epi8((char)0x80);
  }
  void widen(__m512i q, __m512bh* out) const {
    q = _mm512_permutexvar_epi64(order, q);
    const __m512i size = _mm512_abs_epi8(q);
    const __m512i first = _mm512_permutex2var_epi8(low[0], size, low[1]);
    const __m512i second = _mm512_permutex2var_epi8(high[0], size, high[1]);
    const __m512i with_sign = _mm512_ternarylogic_epi64(q, sign, second, 0xea);  // (q & sign) | second
    out[0] = (__m512bh)_mm512_unpacklo_epi8(first, with_sign);
    out[1] = (__m512bh)_mm512_unpackhi_epi8(first, with_sign);
  }
  void widen_half(const int8_t* p, __m512bh* out) const {
    widen(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)), out);  // out[1] is anything
  }
};

// The same place in the 4 rows that come after these 4: they are next. A row is too short for the processor to guess.
static inline void prefetch_next(const int8_t* p, long depth) {
  _mm_prefetch((const char*)(p + 4 * depth), _MM_HINT_T0);
}

// What dot_tile does, for M rows.
template <int M>
static inline void dot_int8(const bf16* const* x, const int8_t* w, long depth, float* out) {
  const Widener widener;
  __m512 acc[M][4];
  __m512bh rows[4][2];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 4; n++) acc[m][n] = _mm512_setzero_ps();
  long k = 0;
  for (; k + 64 <= depth; k += 64) {
    for (int n = 0; n < 4; n++) {
      prefetch_next(w + n * depth + k, depth);
      widener.widen(_mm512_loadu_si512(w + n * depth + k), rows[n]);
    }
    for (int m = 0; m < M; m++)
      for (int half = 0; half < 2; half++) {
        const __m512bh row = load_pairs(x[m] + k + 32 * half);
        for (int n = 0; n < 4; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], row, rows[n][half]);
      }
  }
  if (k < depth) {
    for (int n = 0; n < 4; n++) widener.widen_half(w + n * depth + k, rows[n]);
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 4; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], load_pairs(x[m] + k), rows[n][0]);
  }
  for (int m = 0; m < M; m++) _mm_storeu_ps(out + m * 4, sum_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
}

// 4 rows of w -> bfloat16.
static inline void widen_all(const int8_t* w, long depth, bf16* out) {
  const Widener widener;
  const long count = 4 * depth;
  __m512bh two[2];
  long i = 0;
  for (; i < count; i += 64) {
    prefetch_next(w + i, depth);
    widener.widen(_mm512_loadu_si512(w + i), two);
    _mm512_storeu_si512(out + i, (__m512i)two[0]);
    _mm512_storeu_si512(out + i + 32, (__m512i)two[1]);
  }
}

struct Int8Weight {
  const int8_t* w;
  const float* scale;
  bf16* scratch;  // scratch_size for each thread, at least 4 * depth
  long depth, scratch_size;

  Int8Weight at(long n, int thread) const {
    return {w + n * depth, scale + n, scratch + thread * scratch_size, depth, scratch_size};
  }

  void dot(const bf16* const* x, long num_rows, long n, float* tile) const {
    const int8_t* rows = w + n * depth;
    switch (num_rows) {
      case 1: dot_int8<1>(x, rows, depth, tile); break;
      case 2: dot_int8<2>(x, rows, depth, tile); break;
      case 3: dot_int8<3>(x, rows, depth, tile); break;
      case 4: dot_int8<4>(x, rows, depth, tile); break;
      case 5: dot_int8<5>(x, rows, depth, tile); break;
      case 6: dot_int8<6>(x, rows, depth, tile); break;
      default:
        widen_all(rows, depth, scratch);
        dot_rows(x, num_rows, scratch, depth, tile);
    }
    const __m512 scales = _mm512_broadcast_f32x4(_mm_loadu_ps(scale + n));
    for (long i = 0; i < num_rows * 4; i += 16)
      _mm512_storeu_ps(tile + i, _mm512_mul_ps(_mm512_loadu_ps(tile + i), scales));
  }
};

// scratch[threads, 4 * D] bf16.
extern "C" void q3_linear_int8(const bf16* x, const int8_t* w, const float* scale, bf16* scratch, bf16* out, long T,
                               long N, long D, int threads) {
  const Int8Weight weight = {w, scale, scratch, D, 4 * D};
#pragma omp parallel num_threads(threads)
  linear(x, &weight, &N, 1, out, T, N, D);
}

extern "C" void step_linear_int8(const Word* a, long T) {
  const long N = a[6].l, D = a[7].l;
  const Int8Weight weight = {(int8_t*)a[1].p, (float*)a[2].p, (bf16*)a[3].p, D, 4 * D};
  linear((bf16*)a[0].p, &weight, &N, 1, (bf16*)a[4].p, T, N, D);
}

// scratch[threads, 4 * max(D, F)] bf16; the others as q3_experts.
extern "C" void q3_experts_int8(const bf16* x, const int64_t* ids, const bf16* weights, const int8_t* gate_up,
                                const float* gate_up_scale, const int8_t* down, const float* down_scale, bf16* scratch,
                                int32_t* index, bf16* act, bf16* y, bf16* out, long T, long E, long K, long D, long F,
                                int threads) {
  const long size = 4 * (D > F ? D : F);
#pragma omp parallel num_threads(threads)
  experts(x, ids, weights, Int8Weight{gate_up, gate_up_scale, scratch, D, size},
          Int8Weight{down, down_scale, scratch, F, size}, index, act, y, out, T, E, K, D, F);
}

extern "C" void step_experts_int8(const Word* a, long T) {
  const long D = a[15].l, F = a[16].l, size = 4 * (D > F ? D : F);
  bf16* scratch = (bf16*)a[7].p;
  experts((bf16*)a[0].p, (int64_t*)a[1].p, (bf16*)a[2].p,
          Int8Weight{(int8_t*)a[3].p, (float*)a[4].p, scratch, D, size},
          Int8Weight{(int8_t*)a[5].p, (float*)a[6].p, scratch, F, size}, (int32_t*)a[8].p, (bf16*)a[9].p,
          (bf16*)a[10].p, (bf16*)a[11].p, T, a[13].l, a[14].l, D, F);
}
