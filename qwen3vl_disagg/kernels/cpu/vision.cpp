// What stands between the matrix products of a vision block. Every rounding is where the modules have one.
#include "bf16.h"

// From how many numbers on a second thread pays.
static const long MANY = 1 << 15;

// a * b + c * d with a rounding after each step: the compiler would make a fused one of plain operators.
static inline __m512 sum_of_products(__m512 a, __m512 b, __m512 c, __m512 d) {
  return _mm512_add_ps(_mm512_mul_round_ps(a, b, _MM_FROUND_CUR_DIRECTION),
                       _mm512_mul_round_ps(c, d, _MM_FROUND_CUR_DIRECTION));
}

// The rotary embedding of x[P, N, H] in place, rows `stride` apart, in float. cos and sin: [P, H]; H is a multiple of 32.
extern "C" void q3_rotate(bf16* x, long stride, const float* cos, const float* sin, long P, long N, long H,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (P * N * H >= MANY)
  for (long p = 0; p < P; p++)
    for (long n = 0; n < N; n++) {
      bf16* head = x + p * stride + n * H;
      for (long low = 0, high = H / 2; low < H / 2; low += 16, high += 16) {
        const __m512 a = load_wide(head + low), b = load_wide(head + high), zero = _mm512_setzero_ps();
        const float *c = cos + p * H, *s = sin + p * H;
        const __m512 first = sum_of_products(a, _mm512_loadu_ps(c + low), _mm512_sub_ps(zero, b), _mm512_loadu_ps(s + low));
        const __m512 second = sum_of_products(b, _mm512_loadu_ps(c + high), a, _mm512_loadu_ps(s + high));
        _mm256_storeu_si256((__m256i*)(head + low), narrow(first));
        _mm256_storeu_si256((__m256i*)(head + high), narrow(second));
      }
    }
}

// `gelu_tanh` in place.
extern "C" void q3_gelu_tanh(bf16* x, long count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= MANY)
  for (long i = 0; i < count; i += 32)
    for (long j = i; j < i + 32 && j < count; j += 16) {
      const __mmask16 mask = count - j >= 16 ? 0xffff : (1u << (count - j)) - 1;
      const __m512 value = widen(_mm256_maskz_loadu_epi16(mask, x + j));
      _mm256_mask_storeu_epi16(x + j, mask, narrow(gelu_tanh(value)));
    }
}
