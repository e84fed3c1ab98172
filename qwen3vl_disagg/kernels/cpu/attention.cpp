// Attention of many queries over pages (prefill) or tensors (vision tower) of bfloat16, head size 64 or 128.
#include "attention_tiles.h"

static const long QUERIES = 48, KEYS = 128;
static const float LOG2_E = 1.44269504f;

// Keys and values of one kv head as pairs for `outer_rows`: keys[H / 2][L][2] along the head dim, values[L / 2][H][2]
// along the context. Token l lies `offset_of(l)` numbers behind k and v. `length` is padded with zeros to `padded`, a
// multiple of KEYS.
template <typename Offset>
static void pack_head(const bf16* k, const bf16* v, Offset offset_of, long length, long padded, long H, bf16* keys,
                      bf16* values) {
  for (long l = 0; l < padded; l += 16) {
    long offsets[16];
    const long count = length - l < 16 ? length - l : 16;  // of tokens that are there, below 1 where none is
    for (long i = 0; i < count; i++) offsets[i] = offset_of(l + i);
    for (long h = 0; h < H; h += 32) {
      __m512i r[16];
      for (long i = 0; i < 16; i++) r[i] = i < count ? _mm512_loadu_si512(k + offsets[i] + h) : _mm512_setzero_si512();
      transpose(r);
      for (long i = 0; i < 16; i++) _mm512_storeu_si512(keys + ((h / 2 + i) * padded + l) * 2, r[i]);
    }
    for (long i = 0; i < 16; i += 2)
      for (long h = 0; h < H; h += 16) {
        const __m256i zero = _mm256_setzero_si256();
        const __m256i even = i < count ? _mm256_loadu_si256((const __m256i*)(v + offsets[i] + h)) : zero;
        const __m256i odd = i + 1 < count ? _mm256_loadu_si256((const __m256i*)(v + offsets[i + 1] + h)) : zero;
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
        _mm512_storeu_si512(values + ((l + i) / 2 * H + h) * 2, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
      }
  }
}

static inline __mmask16 first_lanes(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

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

// `count` queries [count, N, H], `q_stride` apart, at the end of a context of `length` tokens, or, when not causal, each
// over all of them; token l of kv head g lies at `offset_of(l)` + g * H of k and v. packed: 2 * G * padded * H.
template <typename Offset>
static void attend(const bf16* q, long q_stride, long count, bool is_causal, const bf16* k, const bf16* v,
                   Offset offset_of, long length, long N, long G, long H, bf16* packed, bf16* out, bool tiles,
                   int threads) {
  const long padded = (length + KEYS - 1) / KEYS * KEYS, head = padded * H, size = tiles ? TILE_QUERIES : QUERIES;
  const long blocks = (count + size - 1) / size;
  const float scale = 1.0f / sqrtf((float)H);
#pragma omp parallel num_threads(threads)
  {
    if (tiles) begin_tiles();
#pragma omp for schedule(static)
    for (long g = 0; g < G; g++) {
      bf16 *keys = packed + 2 * g * head, *values = keys + head;
      (tiles ? pack_context<Offset> : pack_head<Offset>)(k + g * H, v + g * H, offset_of, length, padded, H, keys, values);
    }
#pragma omp for schedule(dynamic)
    for (long item = 0; item < N * blocks; item++) {
      const long n = item % N, start = (blocks - 1 - item / N) * size;  // those that see most come first
      const long here = count - start < size ? count - start : size, first = length - count + start;
      const bf16 *from = q + start * q_stride + n * H, *keys = packed + 2 * (n / (N / G)) * head, *values = keys + head;
      bf16* to = out + (start * N + n) * H;
      if (tiles)
        attend_tiles(from, q_stride, here, first, length, is_causal, keys, values, H, LOG2_E * scale, to, N * H);
      else
        attend_block(from, q_stride, here, first, length, is_causal, keys, values, padded, H, scale, to, N * H);
    }
    if (tiles) end_tiles();
  }
}

// One sequence: `new_tokens` queries [new, N, H] at the end of a context of `length` tokens that lie in `slots` of the
// pools [slots, G, H]. `packed` is scratch: 2 * G * padded * H bf16, padded = length rounded up to 128.
extern "C" void q3_prefill_attention(const bf16* q, long new_tokens, const bf16* k_pool, const bf16* v_pool,
                                     const int64_t* slots, long length, long N, long G, long H, bf16* packed, bf16* out,
                                     int threads) {
  const auto offset_of = [=](long l) { return slots[l] * G * H; };
  attend(q, N * H, new_tokens, true, k_pool, v_pool, offset_of, length, N, G, H, packed, out, may_use_tiles(), threads);
}

// A frame of the vision tower: q, k, v [P, N, H] with rows `stride` apart, out [P, N, H]. `packed`: 2 * N * padded * H.
// `tiles`: by AMX where it is.
extern "C" void q3_full_attention(const bf16* q, const bf16* k, const bf16* v, long stride, long length, long N, long H,
                                  bf16* packed, bf16* out, int tiles, int threads) {
  const auto offset_of = [=](long l) { return l * stride; };
  attend(q, stride, length, false, k, v, offset_of, length, N, N, H, packed, out, tiles && may_use_tiles(), threads);
}
