// Attention of many queries over float pages (prefill) or bfloat16 tensors (vision tower), head size 64 or 128.
#include "attention_tiles.h"

static const long QUERIES = 48, KEYS = 128;
static const float LOG2_E = 1.44269504f;

// Keys and values of one kv head as pairs for `outer_rows`: keys[H / 2][L][2] along the head dim, values[L / 2][H][2]
// along the context. `length` is padded with zeros to `padded`, a multiple of KEYS.
static void pack_head(const float* k, const float* v, long stride, const int64_t* slots, long length, long padded,
                      long H, bf16* keys, bf16* values) {
  for (long l = 0; l < padded; l++) {
    const bool is_there = l < length;
    const long slot = is_there ? slots[l] * stride : 0;
    for (long h = 0; h < H; h++) {
      keys[((h / 2) * padded + l) * 2 + h % 2] = is_there ? to_bf16(k[slot + h]) : 0;
      values[((l / 2) * H + h) * 2 + l % 2] = is_there ? to_bf16(v[slot + h]) : 0;
    }
  }
}

static inline __mmask16 first_lanes(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// The same of bfloat16 rows that follow one another, `stride` apart.
static void pack_frame(const bf16* k, const bf16* v, long stride, long length, long padded, long H, bf16* keys,
                       bf16* values) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)stride)), zero = _mm512_setzero_si512();
  for (long l = 0; l < padded; l += 16)
    for (long h = 0; h < H; h += 2)
      _mm512_storeu_si512(keys + (h / 2 * padded + l) * 2,
                          _mm512_mask_i32gather_epi32(zero, first_lanes(length - l), rows, k + l * stride + h, 2));
  for (long l = 0; l < padded; l += 2)
    for (long h = 0; h < H; h += 16) {
      const __m256i even = _mm256_maskz_loadu_epi16(l < length ? 0xffff : 0, v + l * stride + h);
      const __m256i odd = _mm256_maskz_loadu_epi16(l + 1 < length ? 0xffff : 0, v + (l + 1) * stride + h);
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(values + (l / 2 * H + h) * 2, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
    }
}

// `count` queries (rows of q, `q_stride` apart) over packed keys and values; query i sees context tokens up to
// first + i, or all `length` of them when not causal. Online softmax in float, probabilities rounded to bfloat16.
static void attend_block(const bf16* q, long q_stride, long count, long first, long length, bool is_causal,
                         const bf16* keys, const bf16* values, long padded, long H, float scale, bf16* out,
                         long out_stride) {
  alignas(64) float scores[QUERIES * KEYS];
  alignas(64) bf16 probs[QUERIES * KEYS];
  alignas(64) float acc[QUERIES * 128];
  float top[QUERIES], sum[QUERIES];
  for (long m = 0; m < count; m++) top[m] = -INFINITY, sum[m] = 0;
  memset(acc, 0, count * H * sizeof(float));
  const long end = is_causal ? (first + count < length ? first + count : length) : length;
  for (long start = 0; start < end; start += KEYS) {
    for (long c = 0; c < KEYS; c += 64)
      outer_rows(q, q_stride, count, keys + (start + c) * 2, padded, H / 2, scores + c, KEYS, false);
    for (long m = 0; m < count; m++) {
      const long seen = is_causal ? first + m + 1 : length;
      const long here = seen - start < 0 ? 0 : (seen - start < KEYS ? seen - start : KEYS);
      float* row = scores + m * KEYS;
      __m512 highest = _mm512_set1_ps(-INFINITY);
      for (long c = 0; c < KEYS; c += 16) {
        const __mmask16 mask = first_lanes(here - c);
        const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, _mm512_loadu_ps(row + c), _mm512_set1_ps(scale));
        _mm512_storeu_ps(row + c, s);
        highest = _mm512_max_ps(highest, s);
      }
      const float now = _mm512_reduce_max_ps(highest);
      const float best = now > top[m] ? now : top[m];
      const float keep = top[m] == -INFINITY ? 0.0f : expf(top[m] - best);
      __m512 total = _mm512_setzero_ps();
      for (long c = 0; c < KEYS; c += 16) {
        const __mmask16 mask = first_lanes(here - c);
        const __m512 p = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(row + c), _mm512_set1_ps(best))));
        total = _mm512_add_ps(total, p);
        _mm256_storeu_si256((__m256i*)(probs + m * KEYS + c), (__m256i)_mm512_cvtneps_pbh(p));
      }
      sum[m] = sum[m] * keep + _mm512_reduce_add_ps(total);
      top[m] = best;
      if (keep != 1.0f)
        for (long h = 0; h < H; h += 16)
          _mm512_storeu_ps(acc + m * H + h, _mm512_mul_ps(_mm512_loadu_ps(acc + m * H + h), _mm512_set1_ps(keep)));
    }
    for (long h = 0; h < H; h += 64)
      outer_rows(probs, KEYS, count, values + (start / 2 * H + h) * 2, H, KEYS / 2, acc + h, H, true);
  }
  for (long m = 0; m < count; m++)
    for (long h = 0; h < H; h += 16) {
      const __m512 mean = _mm512_div_ps(_mm512_loadu_ps(acc + m * H + h), _mm512_set1_ps(sum[m]));
      _mm256_storeu_si256((__m256i*)(out + m * out_stride + h), narrow(mean));
    }
}

// One sequence: `new_tokens` queries [new, N, H] at the end of a context of `length` tokens that lie in `slots` of the
// pools [slots, G, H]. `packed` is scratch: 2 * G * padded * H bf16, padded = length rounded up to 128.
extern "C" void q3_prefill_attention(const bf16* q, long new_tokens, const float* k_pool, const float* v_pool,
                                     const int64_t* slots, long length, long N, long G, long H,
                                     bf16* packed, bf16* out, int threads) {
  const long padded = (length + KEYS - 1) / KEYS * KEYS, head = padded * H;
  const float scale = 1.0f / sqrtf((float)H);
#ifdef __AMX_BF16__
  if (may_use_tiles()) {
    const long blocks = (new_tokens + TILE_QUERIES - 1) / TILE_QUERIES;
#pragma omp parallel num_threads(threads)
    {
      begin_tiles();
#pragma omp for schedule(static)
      for (long g = 0; g < G; g++)
        pack_context(k_pool + g * H, v_pool + g * H, length, padded, H, packed + 2 * g * head, packed + (2 * g + 1) * head,
                     [=](long l) { return slots[l] * G * H; });
#pragma omp for schedule(dynamic)
      for (long item = 0; item < N * blocks; item++) {
        const long n = item % N, start = (blocks - 1 - item / N) * TILE_QUERIES, g = n / (N / G);  // the longest come first
        const long count = new_tokens - start < TILE_QUERIES ? new_tokens - start : TILE_QUERIES;
        attend_tiles(q + (start * N + n) * H, N * H, count, length - new_tokens + start, length, true,
                     packed + 2 * g * head, packed + (2 * g + 1) * head, H, LOG2_E * scale, out + (start * N + n) * H, N * H);
      }
      end_tiles();
    }
    return;
  }
#endif
  const long blocks = (new_tokens + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long g = 0; g < G; g++)
      pack_head(k_pool + g * H, v_pool + g * H, G * H, slots, length, padded, H, packed + 2 * g * head,
                packed + (2 * g + 1) * head);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < N * blocks; item++) {
      const long n = item % N, start = (blocks - 1 - item / N) * QUERIES, g = n / (N / G);  // the longest come first
      const long count = new_tokens - start < QUERIES ? new_tokens - start : QUERIES;
      attend_block(q + (start * N + n) * H, N * H, count, length - new_tokens + start, length, true,
                   packed + 2 * g * head, packed + (2 * g + 1) * head, padded, H, scale,
                   out + (start * N + n) * H, N * H);
    }
  }
}

// A frame of the vision tower: q, k, v [P, N, H] with rows `stride` apart, out [P, N, H]. `packed`: 2 * N * padded * H.
// `tiles`: by AMX where it is.
extern "C" void q3_full_attention(const bf16* q, const bf16* k, const bf16* v, long stride, long length, long N, long H,
                                  bf16* packed, bf16* out, int tiles, int threads) {
  const long padded = (length + KEYS - 1) / KEYS * KEYS, head = padded * H;
  const float scale = 1.0f / sqrtf((float)H);
#ifdef __AMX_BF16__
  if (tiles && may_use_tiles()) {
    const long blocks = (length + TILE_QUERIES - 1) / TILE_QUERIES;
#pragma omp parallel num_threads(threads)
    {
      begin_tiles();
#pragma omp for schedule(static)
      for (long n = 0; n < N; n++)
        pack_context(k + n * H, v + n * H, length, padded, H, packed + 2 * n * head, packed + (2 * n + 1) * head,
                     [=](long l) { return l * stride; });
#pragma omp for schedule(dynamic)
      for (long item = 0; item < N * blocks; item++) {
        const long n = item / blocks, start = item % blocks * TILE_QUERIES;
        const long count = length - start < TILE_QUERIES ? length - start : TILE_QUERIES;
        attend_tiles(q + start * stride + n * H, stride, count, 0, length, false, packed + 2 * n * head,
                     packed + (2 * n + 1) * head, H, LOG2_E * scale, out + (start * N + n) * H, N * H);
      }
      end_tiles();
    }
    return;
  }
#endif
  const long blocks = (length + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long n = 0; n < N; n++)
      pack_frame(k + n * H, v + n * H, stride, length, padded, H, packed + 2 * n * head, packed + (2 * n + 1) * head);
#pragma omp for schedule(dynamic)
    for (long item = 0; item < N * blocks; item++) {
      const long n = item / blocks, start = item % blocks * QUERIES;
      const long count = length - start < QUERIES ? length - start : QUERIES;
      attend_block(q + start * stride + n * H, stride, count, 0, length, false, packed + 2 * n * head,
                   packed + (2 * n + 1) * head, padded, H, scale, out + (start * N + n) * H, N * H);
    }
  }
}
