// A recorded step, and what PyTorch does between the other kernels of one. Every rounding is where PyTorch has one.
#include <algorithm>
#include <math.h>
#include <utility>
#include "bf16.h"
#include "step.h"

struct Call {
  void (*run)(const Word* args, long T);
  Word args[19];
};

// All calls for T rows, one after another, by one team.
extern "C" void q3_replay(const Call* calls, long num, long T, int threads) {
#pragma omp parallel num_threads(threads)
  for (long i = 0; i < num; i++) calls[i].run(calls[i].args, T);
}

// out[T, D] = a + b. D is a multiple of 16.
extern "C" void step_add(const Word* args, long T) {
  const bf16 *a = (bf16*)args[0].p, *b = (bf16*)args[1].p;
  bf16* out = (bf16*)args[2].p;
  const long D = args[4].l;
#pragma omp for schedule(static)
  for (long i = 0; i < T * D; i += 16)
    _mm256_storeu_si256((__m256i*)(out + i), narrow(_mm512_add_ps(load_wide(a + i), load_wide(b + i))));
}

// out[T, D] = the rows `ids` of weight.
extern "C" void step_embedding(const Word* args, long T) {
  const bf16* weight = (bf16*)args[0].p;
  const int64_t* ids = (int64_t*)args[1].p;
  bf16* out = (bf16*)args[2].p;
  const long D = args[4].l;
#pragma omp for schedule(static)
  for (long t = 0; t < T; t++) memcpy(out + t * D, weight + ids[t] * D, D * sizeof(bf16));
}

// cos and sin [T, 2 * J] of positions[axes[j], t] * frequencies[j], each half the same, times `factor`. Rows of
// positions are `stride` apart.
static void rotary(const int64_t* positions, long stride, const float* frequencies, const int64_t* axes, float factor,
                   bf16* cos, bf16* sin, long T, long J) {
#pragma omp for schedule(static)
  for (long t = 0; t < T; t++)
    for (long j = 0; j < J; j++) {
      const float angle = (float)positions[axes[j] * stride + t] * frequencies[j];
      cos[t * 2 * J + j] = cos[t * 2 * J + J + j] = to_bf16(cosf(angle) * factor);
      sin[t * 2 * J + j] = sin[t * 2 * J + J + j] = to_bf16(sinf(angle) * factor);
    }
}

extern "C" void q3_rotary(const int64_t* positions, long stride, const float* frequencies, const int64_t* axes,
                          float factor, bf16* cos, bf16* sin, long T, long J, int threads) {
#pragma omp parallel num_threads(threads) if (T * J >= 1 << 10)
  rotary(positions, stride, frequencies, axes, factor, cos, sin, T, J);
}

extern "C" void step_rotary(const Word* a, long T) {
  rotary((int64_t*)a[0].p, a[1].l, (float*)a[2].p, (int64_t*)a[3].p, (float)a[4].f, (bf16*)a[5].p, (bf16*)a[6].p, T,
         a[8].l);
}

static const long MAX_EXPERTS = 1024;

static bool is_larger(const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
  return (isnan(a.first) && !isnan(b.first)) || a.first > b.first;
}

// Softmax of logits[T, E], its K largest in order, divided by their sum. Of equal ones those come that `topk` takes,
// which does the same with these algorithms of the standard library.
static void route(const bf16* logits, bf16* weights, int64_t* ids, long T, long E, long K) {
#pragma omp for schedule(static)
  for (long t = 0; t < T; t++) {
    std::pair<float, int64_t> queue[MAX_EXPERTS];
    float p[MAX_EXPERTS];
    float top = -INFINITY, total = 0, chosen = 0;
    for (long e = 0; e < E; e++) top = fmaxf(top, to_float(logits[t * E + e]));
    for (long e = 0; e < E; e += 16) {
      const __mmask16 mask = E - e >= 16 ? 0xffff : (1u << (E - e)) - 1;
      const __m512 x = widen(_mm256_maskz_loadu_epi16(mask, logits + t * E + e));
      const __m512 weight = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_sub_ps(x, _mm512_set1_ps(top))));
      _mm512_mask_storeu_ps(p + e, mask, weight);
      total += _mm512_reduce_add_ps(weight);
    }
    for (long e = 0; e < E; e++) queue[e] = {p[e] / total, e};
    if (K * 64 <= E) {
      std::partial_sort(queue, queue + K, queue + E, is_larger);
    } else {
      std::nth_element(queue, queue + K - 1, queue + E, is_larger);
      std::sort(queue, queue + K - 1, is_larger);
    }
    for (long k = 0; k < K; k++) chosen += queue[k].first;
    for (long k = 0; k < K; k++) {
      ids[t * K + k] = queue[k].second;
      weights[t * K + k] = to_bf16(queue[k].first / chosen);
    }
  }
}

extern "C" void q3_route(const bf16* logits, bf16* weights, int64_t* ids, long T, long E, long K, int threads) {
#pragma omp parallel num_threads(threads) if (T >= 16)
  route(logits, weights, ids, T, E, K);
}

extern "C" void step_route(const Word* a, long T) {
  route((bf16*)a[0].p, (bf16*)a[1].p, (int64_t*)a[2].p, T, a[4].l, a[5].l);
}

// The first of the largest of logits[B, V]; -1 where a number of the row is not finite. Of a row those ids do not count
// that are in lists[kinds[b]], which are in order, `sizes` of them; there are two, one behind the
// other.
extern "C" void q3_largest(const bf16* logits, const int64_t* lists, const long* sizes, const uint8_t* kinds,
                           int64_t* ids, long B, long V, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (B > 1 && B * V >= 1 << 17)
  for (long b = 0; b < B; b++) {
    const __m512i infinite = _mm512_set1_epi32(0x7f800000);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const bf16* row = logits + b * V;
    const int64_t* banned = lists + (kinds[b] ? sizes[0] : 0);
    const long num = sizes[kinds[b]];
    __mmask16 is_broken = 0;
    float best = -INFINITY;
    int64_t id = -1;
    for (long i = 0; i <= num; i++) {
      const long start = i ? banned[i - 1] + 1 : 0, stop = i < num ? banned[i] : V;
      __m512 top = _mm512_set1_ps(-INFINITY);
      __m512i where = _mm512_setzero_si512();
      for (long v = start; v < stop; v += 16) {
        const __mmask16 mask = stop - v >= 16 ? 0xffff : (1u << (stop - v)) - 1;
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + v)), 16);
        is_broken |= _mm512_mask_cmpeq_epi32_mask(mask, _mm512_and_si512(bits, infinite), infinite);
        const __mmask16 is_more = _mm512_mask_cmp_ps_mask(mask, _mm512_castsi512_ps(bits), top, _CMP_GT_OS);
        top = _mm512_mask_mov_ps(top, is_more, _mm512_castsi512_ps(bits));
        where = _mm512_mask_mov_epi32(where, is_more, _mm512_add_epi32(_mm512_set1_epi32((int)v), lanes));
      }
      const float most = _mm512_reduce_max_ps(top);
      if (!(most > best)) continue;
      best = most;
      id = _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(top, _mm512_set1_ps(most), _CMP_EQ_OQ), where);
    }
    for (long i = 0; i < num; i++) is_broken |= (row[banned[i]] & 0x7f80) == 0x7f80;
    ids[b] = is_broken ? -1 : id;
  }
}
