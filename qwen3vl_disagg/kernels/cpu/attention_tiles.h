// Attention of many queries by tiles (AMX), where the processor has them.
//
// Keys are the left operand, queries the right one: a tile of scores has a query in each column, so that a softmax goes
// down the columns, 16 queries at a time, and its probabilities are a right operand as they come, for values that lie
// transposed. What becomes of a query depends on its own column alone, and not on where in a block it stands.
#pragma once
#include <math.h>
#include "expert_tiles.h"

// Queries at a time, in groups of 16, and keys.
static const long TILE_QUERIES = 32, TILE_KEYS = 128;

#ifdef __AMX_BF16__

static inline __m256i load_if(const bf16* p, bool is_there) {
  return is_there ? _mm256_loadu_si256((const __m256i*)p) : _mm256_setzero_si256();
}

// One kv head's keys[padded][H] and values[padded / 32][H][32]. Token l lies `offset_of(l)` numbers behind k and v.
template <typename Offset>
static void pack_context(const bf16* k, const bf16* v, Offset offset_of, long length, long padded, long H, bf16* keys,
                         bf16* values) {
  for (long l = 0; l < padded; l += 32) {
    long offsets[32];
    const long count = length - l < 32 ? length - l : 32;  // of tokens that are there, below 1 where none is
    for (long i = 0; i < count; i++) offsets[i] = offset_of(l + i);
    for (long i = 0; i < 32; i++)
      for (long h = 0; h < H; h += 16)
        _mm256_storeu_si256((__m256i*)(keys + (l + i) * H + h), load_if(k + (i < count ? offsets[i] + h : 0), i < count));
    for (long h = 0; h < H; h += 16) {
      __m512i r[16];
      for (long i = 0; i < 32; i += 2) {
        const __m256i even = load_if(v + (i < count ? offsets[i] + h : 0), i < count);
        const __m256i odd = load_if(v + (i + 1 < count ? offsets[i + 1] + h : 0), i + 1 < count);
        r[i / 2] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      transpose(r);
      for (long i = 0; i < 16; i++) _mm512_storeu_si512(values + l * H + (h + i) * 32, r[i]);
    }
  }
}

// sums[rows / 16][2][16][16] (+)= rows of a left operand times two groups of 16 columns, over `depth`; tiles of a row of
// the left operand are `step` numbers apart, its rows `stride`. `rows` is a multiple of 32.
static inline void two_groups(const bf16* left, long rows, long stride, long step, const bf16* right, long group,
                              long depth, float* sums, long sums_group, bool add) {
  for (long r = 0; r < rows; r += 32) {
    float* to = sums + r * 16;
    if (add) {
      _tile_loadd(0, to, 64);
      _tile_loadd(1, to + sums_group, 64);
      _tile_loadd(2, to + TILE, 64);
      _tile_loadd(3, to + sums_group + TILE, 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (long k = 0; k < depth; k += 32) {
      const bf16* from = left + r * stride + k / 32 * step;
      _tile_loadd(4, from, stride * 2);
      _tile_loadd(6, right + k * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + group + k * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, from + 16 * stride, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + sums_group, 64);
    _tile_stored(2, to + TILE, 64);
    _tile_stored(3, to + sums_group + TILE, 64);
  }
}

// 2^x to 6e-5 relative, far below what bfloat16 keeps, for x <= 0; from -150 on it is 0. NaN stays NaN.
static inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);  // [-0.5, 0.5]; below: Taylor series of 2^part
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Lanes of 16 queries that see a key: of queries from `first` on all keys up to themselves, or all of them.
static inline __mmask16 that_see(long key, long first, bool is_causal) {
  const long hidden = is_causal ? key - first : 0;
  return hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : 0xffff << hidden;
}

// A step of an online softmax over scores[count][16], of the keys from `start` on -> probs[count / 2][16][2], rounded;
// `scale` is for powers of 2. What the sums so far are to be multiplied with.
static inline __m512 soften(const float* scores, long count, long start, long first, bool is_causal, float scale,
                            bf16* probs, __m512& top, __m512& sum) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
  const long open = !is_causal || first - start >= count ? count : first - start < 0 ? 0 : first - start;
  __m512 high[4] = {lowest, lowest, lowest, lowest};  // a chain of one would be what takes longest
  for (long k = 0; k + 4 <= open; k += 4)
    for (long i = 0; i < 4; i++) high[i] = _mm512_max_ps(high[i], _mm512_load_ps(scores + (k + i) * 16));
  __m512 highest = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
  for (long k = open / 4 * 4; k < count; k++)
    highest = _mm512_max_ps(highest, _mm512_mask_load_ps(lowest, that_see(start + k, first, is_causal), scores + k * 16));
  const __m512 best = _mm512_max_ps(top, highest), keep = exp2_ps(_mm512_mul_ps(_mm512_sub_ps(top, best), by));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512 total = _mm512_setzero_ps();
  for (long k = 0; k < count; k += 2) {
    // The difference first: 0 for the highest, however large it is.
    __m512 even = exp2_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + k * 16), best), by));
    __m512 odd = exp2_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + k * 16 + 16), best), by));
    if (k + 1 >= open) {
      even = _mm512_maskz_mov_ps(that_see(start + k, first, is_causal), even);
      odd = _mm512_maskz_mov_ps(k + 1 < count ? that_see(start + k + 1, first, is_causal) : 0, odd);
    }
    total = _mm512_add_ps(_mm512_add_ps(total, even), odd);
    const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(probs + k * 16, _mm512_permutexvar_epi16(order, pair));
  }
  sum = _mm512_fmadd_ps(sum, keep, total);
  top = best;
  return keep;
}

// `count` queries (rows of q, `q_stride` apart) over packed keys and values; query i sees context tokens up to
// first + i, or all `length` of them when not causal. Online softmax in float, probabilities rounded to bfloat16.
static void attend_tiles(const bf16* q, long q_stride, long count, long first, long length, bool is_causal,
                         const bf16* keys, const bf16* values, long H, float scale, bf16* out, long out_stride) {
  const long SCORES = TILE_KEYS * 16;
  alignas(64) float scores[2 * SCORES];
  alignas(64) bf16 probs[2 * SCORES];
  alignas(64) bf16 queries[TILE_QUERIES * 128];
  alignas(64) float acc[TILE_QUERIES * 128];
  const bf16* rows[TILE_QUERIES];
  for (long m = 0; m < count; m++) rows[m] = q + m * q_stride;
  pack_rows(rows, count, H, queries);
  if (count <= 16) memset(queries + 16 * H, 0, 16 * H * sizeof(bf16));
  memset(acc, 0, TILE_QUERIES * H * sizeof(float));
  __m512 top[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const long end = is_causal && first + count < length ? first + count : length;
  settle(queries);
  settle(keys);
  settle(values);
  for (long start = 0; start < end; start += TILE_KEYS) {
    const long here = end - start < TILE_KEYS ? end - start : TILE_KEYS, whole = (here + 31) / 32 * 32;
    two_groups(keys + start * H, whole, H, 32, queries, 16 * H, H, scores, SCORES, false);
    settle(scores);
    for (long g = 0; g < 2; g++) {
      const long from = first + g * 16;
      const __m512 keep = soften(scores + g * SCORES, here, start, from, is_causal, scale, probs + g * SCORES, top[g], sum[g]);
      memset(probs + g * SCORES + (here + 1) / 2 * 32, 0, (whole - (here + 1) / 2 * 2) * 16 * sizeof(bf16));
      if (_mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ))
        for (float* p = acc + g * 16 * H; p < acc + (g + 1) * 16 * H; p += 16)
          _mm512_store_ps(p, _mm512_mul_ps(_mm512_load_ps(p), keep));
    }
    settle(probs);
    settle(acc);
    two_groups(values + start * H, H, 32, 32 * H, probs, SCORES, whole, acc, 16 * H, true);
    settle(acc);
  }
  for (long g = 0; g * 16 < count; g++)
    for (long h = 0; h < H; h += 16) {
      __m512i r[16];
      for (long i = 0; i < 16; i++)
        r[i] = _mm512_castps_si512(_mm512_div_ps(_mm512_load_ps(acc + g * 16 * H + (h + i) * 16), sum[g]));
      transpose(r);
      for (long i = 0; i < 16 && g * 16 + i < count; i++)
        _mm256_storeu_si256((__m256i*)(out + (g * 16 + i) * out_stride + h), narrow(_mm512_castsi512_ps(r[i])));
    }
}
#else
template <typename Offset>
static void pack_context(const bf16* k, const bf16* v, Offset offset_of, long length, long padded, long H, bf16* keys,
                         bf16* values) {}
static void attend_tiles(const bf16* q, long q_stride, long count, long first, long length, bool is_causal,
                         const bf16* keys, const bf16* values, long H, float scale, bf16* out, long out_stride) {}
#endif
