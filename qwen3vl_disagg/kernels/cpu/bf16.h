// bfloat16 on AVX-512 (BF16): conversions, a transpose, exp, and the two inner products that everything here is made of.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even, as torch does. NaN stays NaN.
static inline bf16 to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float rounded(float f) { return to_float(to_bf16(f)); }

static inline __m512bh load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

// Two neighbouring bf16 in every 32-bit lane.
static inline __m512bh broadcast_pair(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

static inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 round_ps(__m512 x) { return widen(narrow(x)); }

static inline __m512 load_wide(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }

// 16 x 16 numbers of 32 bits, rows to columns.
static inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88), t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// A tile of `count` rows and 4 columns, as bfloat16, to rows `stride` apart. `tile` has room for whole vectors.
static inline void store_tile(const float* tile, long count, bf16* out, long stride) {
  bf16 four_rows[16];
  for (long r = 0; r < count; r += 4) {
    _mm256_storeu_si256((__m256i*)four_rows, narrow(_mm512_loadu_ps(tile + r * 4)));
    for (long i = r; i < r + 4 && i < count; i++) memcpy(out + i * stride, four_rows + (i - r) * 4, 8);
  }
}

// e^x to about 1e-6 relative, for x <= 0; below -87 it is 0. NaN stays NaN.
static inline __m512 exp_ps(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-104.0f), x), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(scaled, whole);  // [-0.5, 0.5]; below: Taylor series of 2^part
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// gelu, with its tanh written as a sigmoid: x / (1 + e^-2u).
static inline __m512 gelu_tanh(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one);
  const __m512 z = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.5957691216f)), cubic);
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));  // of -|z|: nothing overflows
  const __mmask16 is_negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OS);
  return _mm512_div_ps(_mm512_mask_mul_ps(x, is_negative, x, e), _mm512_add_ps(one, e));
}

// The sums of four vectors.
static inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m256 a8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m256 b8 = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1));
  const __m256 c8 = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  const __m256 d8 = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1));
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a8, b8), _mm256_hadd_ps(c8, d8));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// out[m * 4 + n] = x[m] . w[n], for M rows of x and 4 rows of w, all `depth` long (a multiple of 32). Nothing is
// packed: a weight is read once, in the order it lies in memory, for up to 6 rows of x.
template <int M>
static inline void dot_tile(const bf16* const* x, const bf16* w, long depth, float* out) {
  __m512 acc[M][4];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 4; n++) acc[m][n] = _mm512_setzero_ps();
  for (long k = 0; k < depth; k += 32) {
    __m512bh rows[4];
    for (int n = 0; n < 4; n++) {
      rows[n] = load_pairs(w + n * depth + k);
      _mm_prefetch((const char*)(w + (n + 4) * depth + k), _MM_HINT_T0);  // rows are too short for the hardware's
    }
    for (int m = 0; m < M; m++) {
      const __m512bh row = load_pairs(x[m] + k);
      for (int n = 0; n < 4; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], row, rows[n]);
    }
  }
  for (int m = 0; m < M; m++) _mm_storeu_ps(out + m * 4, sum_four(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
}

static inline void dot_rows(const bf16* const* x, long num_rows, const bf16* w, long depth, float* out) {
  long m = 0;
  for (; m + 6 <= num_rows; m += 6) dot_tile<6>(x + m, w, depth, out + m * 4);
  switch (num_rows - m) {
    case 1: dot_tile<1>(x + m, w, depth, out + m * 4); break;
    case 2: dot_tile<2>(x + m, w, depth, out + m * 4); break;
    case 3: dot_tile<3>(x + m, w, depth, out + m * 4); break;
    case 4: dot_tile<4>(x + m, w, depth, out + m * 4); break;
    case 5: dot_tile<5>(x + m, w, depth, out + m * 4); break;
  }
}

// out[m][0:64] (+)= sum over pairs i of x[m][2i, 2i+1] . packed[i][0:64][2], for M rows. `packed` has `stride` columns.
template <int M>
static inline void outer_tile(const bf16* x, long x_stride, const bf16* packed, long stride, long num_pairs, float* out,
                              long out_stride, bool add) {
  __m512 acc[M][4];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 4; n++)
      acc[m][n] = add ? _mm512_loadu_ps(out + m * out_stride + n * 16) : _mm512_setzero_ps();
  for (long i = 0; i < num_pairs; i++) {
    __m512bh columns[4];
    for (int n = 0; n < 4; n++) columns[n] = load_pairs(packed + (i * stride + n * 16) * 2);
    for (int m = 0; m < M; m++) {
      const __m512bh pair = broadcast_pair(x + m * x_stride + 2 * i);
      for (int n = 0; n < 4; n++) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], pair, columns[n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 4; n++) _mm512_storeu_ps(out + m * out_stride + n * 16, acc[m][n]);
}

static inline void outer_rows(const bf16* x, long x_stride, long num_rows, const bf16* packed, long stride,
                              long num_pairs, float* out, long out_stride, bool add) {
  long m = 0;
  for (; m + 6 <= num_rows; m += 6)
    outer_tile<6>(x + m * x_stride, x_stride, packed, stride, num_pairs, out + m * out_stride, out_stride, add);
  for (; m + 2 <= num_rows; m += 2)
    outer_tile<2>(x + m * x_stride, x_stride, packed, stride, num_pairs, out + m * out_stride, out_stride, add);
  for (; m < num_rows; m++)
    outer_tile<1>(x + m * x_stride, x_stride, packed, stride, num_pairs, out + m * out_stride, out_stride, add);
}
