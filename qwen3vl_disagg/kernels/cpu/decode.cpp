// Attention of one new token for each sequence over pages of bfloat16, head size 64 or 128: bound by reading keys and values,
// which are read once, all heads of a token together, as they lie. Four query heads of a kv head make a quad, which
// shares vectors; a group that is no multiple of 4 is filled up with zeros.
#include <math.h>
#include "bf16.h"
#include "step.h"

extern "C" int omp_get_num_threads(void);

static const long TOKENS = 64, MAX_HEADS = 8, MAX_GROUP = 16, MAX_SIZE = 128;

// Where the tokens of a sequence lie in a pool.
struct Pages {
  const int64_t* table;
  long size, stride;  // tokens in a page, numbers from a token to the next
  long offset(long token) const { return (table[token / size] * size + token % size) * stride; }
};

// The processor does not guess where a page leads.
static inline void prefetch_row(const bf16* row, long width) {
  for (long i = 0; i < width; i += 32) _mm_prefetch((const char*)(row + i), _MM_HINT_T0);
}

static inline __m512 four_times(__m128 x) { return _mm512_broadcast_f32x4(x); }

static inline __m128 max_of_quarters(__m512 x) {
  return _mm_max_ps(_mm_max_ps(_mm512_extractf32x4_ps(x, 0), _mm512_extractf32x4_ps(x, 1)),
                    _mm_max_ps(_mm512_extractf32x4_ps(x, 2), _mm512_extractf32x4_ps(x, 3)));
}

static inline __m128 sum_of_quarters(__m512 x) {
  return _mm_add_ps(_mm_add_ps(_mm512_extractf32x4_ps(x, 0), _mm512_extractf32x4_ps(x, 1)),
                    _mm_add_ps(_mm512_extractf32x4_ps(x, 2), _mm512_extractf32x4_ps(x, 3)));
}

// scores[4] = the dot products of a quad's queries [4, H] with a key.
template <long H>
static inline void score(const float* query, const bf16* key, float* scores) {
  __m512 dot[4];
  for (int j = 0; j < 4; j++) dot[j] = _mm512_setzero_ps();
  for (long h = 0; h < H; h += 16) {
    const __m512 part = load_wide(key + h);
    for (int j = 0; j < 4; j++) dot[j] = _mm512_fmadd_ps(_mm512_loadu_ps(query + j * H + h), part, dot[j]);
  }
  _mm_storeu_ps(scores, sum_four(dot[0], dot[1], dot[2], dot[3]));
}

// Scores of `count` tokens [count, 4] -> e^(score - top), with `top` and `sum` those of all tokens so far; `keep` is by
// what everything of before shrinks.
static inline void exponents(float* scores, long count, __m128* top, __m128* sum, float* keep) {
  const long padded = (count + 3) / 4 * 4;
  for (long l = count; l < padded; l++) _mm_storeu_ps(scores + l * 4, _mm_set1_ps(-INFINITY));
  __m512 highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (long i = 0; i < padded * 4; i += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + i));
  const __m128 best = _mm_max_ps(*top, max_of_quarters(highest));
  for (long i = 0; i < padded * 4; i += 16) {
    const __m512 p = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), four_times(best)));
    _mm512_storeu_ps(scores + i, p);
    total = _mm512_add_ps(total, p);
  }
  const __m128 shrink = _mm512_castps512_ps128(exp_ps(four_times(_mm_sub_ps(*top, best))));
  _mm_storeu_ps(keep, shrink);
  *sum = _mm_fmadd_ps(*sum, shrink, sum_of_quarters(total));
  *top = best;
}

// acc [4, H] of a quad, shrunk by `keep`, plus the values of `count` tokens by their weights [count, 4].
template <long H>
static inline void add_values(const float* weights, const bf16* const* values, long count, const float* keep,
                              float* acc) {
  for (long h = 0; h < H; h += 64) {
    __m512 part[4][4];
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 4; i++)
        part[j][i] = _mm512_mul_ps(_mm512_loadu_ps(acc + j * H + h + 16 * i), _mm512_set1_ps(keep[j]));
    for (long l = 0; l < count; l++)
      for (int i = 0; i < 4; i++) {
        const __m512 value = load_wide(values[l] + h + 16 * i);
        for (int j = 0; j < 4; j++) part[j][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[l * 4 + j]), value, part[j][i]);
      }
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 4; i++) _mm512_storeu_ps(acc + j * H + h + 16 * i, part[j][i]);
  }
}

// Some kv heads of one sequence: q and out [heads * group, H], pools from the first of these heads on.
template <long H>
static void attend(const bf16* q, const bf16* k_pool, const bf16* v_pool, const Pages& pages, long length, long heads,
                   long group, bf16* out) {
  const long in_head = (group + 3) / 4, quads = heads * in_head;
  alignas(64) float query[MAX_HEADS * MAX_GROUP * MAX_SIZE], acc[MAX_HEADS * MAX_GROUP * MAX_SIZE];
  alignas(64) float scores[MAX_HEADS * MAX_GROUP * TOKENS];
  __m128 top[MAX_HEADS * MAX_GROUP / 4], sum[MAX_HEADS * MAX_GROUP / 4];
  for (long u = 0; u < quads; u++) top[u] = _mm_set1_ps(-INFINITY), sum[u] = _mm_setzero_ps();
  memset(query, 0, quads * 4 * H * sizeof(float));
  memset(acc, 0, quads * 4 * H * sizeof(float));
  for (long g = 0; g < heads; g++)
    for (long i = 0; i < group * H; i += 16)
      _mm512_storeu_ps(query + g * in_head * 4 * H + i,
                       _mm512_mul_ps(load_wide(q + g * group * H + i), _mm512_set1_ps(1.0f / sqrtf((float)H))));
  for (long start = 0; start < length; start += TOKENS) {
    const long count = length - start < TOKENS ? length - start : TOKENS;
    const bf16* rows[TOKENS];
    for (long l = 0; l < count; l++) {
      const long here = pages.offset(start + l);
      prefetch_row(v_pool + here, heads * H);  // for the second pass
      if (start + l + pages.size < length) prefetch_row(k_pool + pages.offset(start + l + pages.size), heads * H);
      rows[l] = v_pool + here;
      for (long u = 0; u < quads; u++)
        score<H>(query + u * 4 * H, k_pool + here + u / in_head * H, scores + (u * TOKENS + l) * 4);
    }
    for (long u = 0; u < quads; u++) {
      float keep[4];
      exponents(scores + u * TOKENS * 4, count, top + u, sum + u, keep);
      if (u && u % in_head == 0)
        for (long l = 0; l < count; l++) rows[l] += H;
      add_values<H>(scores + u * TOKENS * 4, rows, count, keep, acc + u * 4 * H);
    }
  }
  for (long n = 0; n < heads * group; n++) {
    const long u = n / group * in_head + n % group / 4;
    float sums[4];
    _mm_storeu_ps(sums, sum[u]);
    const __m512 total = _mm512_set1_ps(sums[n % group % 4]);
    const float* from = acc + (u * 4 + n % group % 4) * H;
    for (long h = 0; h < H; h += 16)
      _mm256_storeu_si256((__m256i*)(out + n * H + h), narrow(_mm512_div_ps(_mm512_loadu_ps(from + h), total)));
  }
}

// The keys and values of the new tokens, k and v [B, G, H] with rows `k_stride` and `v_stride` apart, are written into
// the pools [slots, G, H] at slots[B]; then they count among the contexts[b] tokens of sequence b. Page p of it is
// number tables[b * width + p]. q and out: [B, N, H].
static void decode_attention(const bf16* q, const bf16* k, long k_stride, const bf16* v, long v_stride, bf16* k_pool,
                             bf16* v_pool, const int64_t* tables, long width, const int64_t* contexts,
                             const int64_t* slots, long page_size, long B, long N, long G, long H, bf16* out) {
  if (B == 0) return;
  const int threads = omp_get_num_threads();
  // A sequence is one task where there are enough of them, else its heads are divided.
  long pieces = (2 * threads + B - 1) / B;
  pieces = pieces < G ? pieces : G;
  long most = (G + pieces - 1) / pieces;
  most = most < MAX_HEADS ? most : MAX_HEADS;
  pieces = (G + most - 1) / most;
  const long group = N / G;
#pragma omp for schedule(dynamic) collapse(2)
  for (long b = 0; b < B; b++)
    for (long piece = 0; piece < pieces; piece++) {
      const long g = piece * most, heads = G - g < most ? G - g : most, slot = (slots[b] * G + g) * H;
      memcpy(k_pool + slot, k + b * k_stride + g * H, heads * H * sizeof(bf16));
      memcpy(v_pool + slot, v + b * v_stride + g * H, heads * H * sizeof(bf16));
      const long first = (b * N + g * group) * H;
      (H == 64 ? attend<64> : attend<128>)(q + first, k_pool + g * H, v_pool + g * H,
                                           Pages{tables + b * width, page_size, G * H}, contexts[b], heads, group,
                                           out + first);
    }
}

extern "C" void q3_decode_attention(const bf16* q, const bf16* k, long k_stride, const bf16* v, long v_stride,
                                    bf16* k_pool, bf16* v_pool, const int64_t* tables, long width,
                                    const int64_t* contexts, const int64_t* slots, long page_size, long B, long N,
                                    long G, long H, bf16* out, int threads) {
#pragma omp parallel num_threads(threads)
  decode_attention(q, k, k_stride, v, v_stride, k_pool, v_pool, tables, width, contexts, slots, page_size, B, N, G, H,
                   out);
}

extern "C" void step_decode_attention(const Word* a, long B) {
  decode_attention((bf16*)a[0].p, (bf16*)a[1].p, a[2].l, (bf16*)a[3].p, a[4].l, (bf16*)a[5].p, (bf16*)a[6].p,
                   (int64_t*)a[7].p, a[8].l, (int64_t*)a[9].p, (int64_t*)a[10].p, a[11].l, B, a[13].l, a[14].l, a[15].l,
                   (bf16*)a[16].p);
}
