// Attention of many queries over float pages (prefill) or bfloat16 tensors (vision tower), head size 64 or 128.
#include <math.h>
#include "bf16.h"

static const long QUERIES = 48, KEYS = 128;

// Keys and values of one kv head as pairs for `outer_rows`: keys[H / 2][L][2] along the head dim, values[L / 2][H][2]
// along the context. `length` is padded with zeros to `padded`, a multiple of KEYS.
template <typename T, typename Convert>
static void pack_head(const T* k, const T* v, long stride, const int64_t* slots, long length, long padded, long H,
                      bf16* keys, bf16* values, Convert convert) {
  for (long l = 0; l < padded; l++) {
    const bool is_there = l < length;
    const long slot = is_there ? (slots ? slots[l] : l) * stride : 0;
    for (long h = 0; h < H; h++) {
      keys[((h / 2) * padded + l) * 2 + h % 2] = is_there ? convert(k[slot + h]) : 0;
      values[((l / 2) * H + h) * 2 + l % 2] = is_there ? convert(v[slot + h]) : 0;
    }
  }
}

struct FromFloat { bf16 operator()(float x) const { return to_bf16(x); } };
struct FromBf16 { bf16 operator()(bf16 x) const { return x; } };

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
        const long left = here - c;
        const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), mask, _mm512_loadu_ps(row + c), _mm512_set1_ps(scale));
        _mm512_storeu_ps(row + c, s);
        highest = _mm512_max_ps(highest, s);
      }
      const float now = _mm512_reduce_max_ps(highest);
      const float best = now > top[m] ? now : top[m];
      const float keep = top[m] == -INFINITY ? 0.0f : expf(top[m] - best);
      __m512 total = _mm512_setzero_ps();
      for (long c = 0; c < KEYS; c += 16) {
        const long left = here - c;
        const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
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
    for (long h = 0; h < H; h++) out[m * out_stride + h] = to_bf16(acc[m * H + h] / sum[m]);
}

// One sequence: `new_tokens` queries [new, N, H] at the end of a context of `length` tokens that lie in `slots` of the
// pools [slots, G, H]. `packed` is scratch: 2 * G * padded * H bf16, padded = length rounded up to 128.
extern "C" void q3_prefill_attention(const bf16* q, long new_tokens, const float* k_pool, const float* v_pool,
                                     const int64_t* slots, long length, long N, long G, long H,
                                     bf16* packed, bf16* out, int threads) {
  const long padded = (length + KEYS - 1) / KEYS * KEYS, head = padded * H;
  const long blocks = (new_tokens + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long g = 0; g < G; g++)
      pack_head(k_pool + g * H, v_pool + g * H, G * H, slots, length, padded, H, packed + 2 * g * head,
                packed + (2 * g + 1) * head, FromFloat());
#pragma omp for schedule(dynamic)
    for (long item = 0; item < N * blocks; item++) {
      const long n = item % N, start = (blocks - 1 - item / N) * QUERIES, g = n / (N / G);  // the longest come first
      const long count = new_tokens - start < QUERIES ? new_tokens - start : QUERIES;
      attend_block(q + (start * N + n) * H, N * H, count, length - new_tokens + start, length, true,
                   packed + 2 * g * head, packed + (2 * g + 1) * head, padded, H, 1.0f / sqrtf((float)H),
                   out + (start * N + n) * H, N * H);
    }
  }
}

// Frames of the vision tower, each by itself: q, k, v [P, N, H] with rows `stride` apart. `packed`: 2 * N * padded * H.
extern "C" void q3_full_attention(const bf16* q, const bf16* k, const bf16* v, long stride, long length, long N, long H,
                                  bf16* packed, bf16* out, int threads) {
  const long padded = (length + KEYS - 1) / KEYS * KEYS, head = padded * H;
  const long blocks = (length + QUERIES - 1) / QUERIES;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long n = 0; n < N; n++)
      pack_head(k + n * H, v + n * H, stride, (const int64_t*)0, length, padded, H, packed + 2 * n * head,
                packed + (2 * n + 1) * head, FromBf16());
#pragma omp for schedule(dynamic)
    for (long item = 0; item < N * blocks; item++) {
      const long n = item / blocks, start = item % blocks * QUERIES;
      const long count = length - start < QUERIES ? length - start : QUERIES;
      attend_block(q + start * stride + n * H, stride, count, 0, length, false, packed + 2 * n * head,
                   packed + (2 * n + 1) * head, padded, H, 1.0f / sqrtf((float)H), out + (start * N + n) * H, N * H);
    }
  }
}
