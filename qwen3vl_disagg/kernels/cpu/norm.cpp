// RMSNorm, and RMSNorm of heads with the rotary embedding after it. Every rounding is where the modules have one.
#include <math.h>
#include "bf16.h"
#include "step.h"

// From how many numbers on a second thread pays.
static const long MANY = 1 << 15;

static inline __m512 scale_of(const bf16* x, long D, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (long d = 0; d < D; d += 16) {
    const __m512 part = load_wide(x + d);
    sum = _mm512_fmadd_ps(part, part, sum);
  }
  return _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / D + eps));
}

static inline __m512 normed(const bf16* x, const bf16* weight, __m512 scale) {
  return round_ps(_mm512_mul_ps(load_wide(weight), round_ps(_mm512_mul_ps(load_wide(x), scale))));
}

// x, out [T, D]; D is a multiple of 16.
static void rms_norm(const bf16* x, const bf16* weight, float eps, bf16* out, long T, long D) {
#pragma omp for schedule(static)
  for (long t = 0; t < T; t++) {
    const __m512 scale = scale_of(x + t * D, D, eps);
    for (long d = 0; d < D; d += 16)
      _mm256_storeu_si256((__m256i*)(out + t * D + d), narrow(normed(x + t * D + d, weight + d, scale)));
  }
}

extern "C" void q3_rms_norm(const bf16* x, const bf16* weight, float eps, bf16* out, long T, long D, int threads) {
#pragma omp parallel num_threads(threads) if (T * D >= MANY)
  rms_norm(x, weight, eps, out, T, D);
}

extern "C" void step_rms_norm(const Word* a, long T) {
  rms_norm((bf16*)a[0].p, (bf16*)a[1].p, (float)a[2].f, (bf16*)a[3].p, T, a[5].l);
}

// sum = x + y, and its RMSNorm: of both rows only one is written and read again, while it is in the first cache.
static void add_rms_norm(const bf16* x, const bf16* y, const bf16* weight, float eps, bf16* sum, bf16* out, long T,
                         long D) {
#pragma omp for schedule(static)
  for (long t = 0; t < T * D; t += D) {
    for (long d = t; d < t + D; d += 16)
      _mm256_storeu_si256((__m256i*)(sum + d), narrow(_mm512_add_ps(load_wide(x + d), load_wide(y + d))));
    const __m512 scale = scale_of(sum + t, D, eps);
    for (long d = 0; d < D; d += 16)
      _mm256_storeu_si256((__m256i*)(out + t + d), narrow(normed(sum + t + d, weight + d, scale)));
  }
}

extern "C" void q3_add_rms_norm(const bf16* x, const bf16* y, const bf16* weight, float eps, bf16* sum, bf16* out,
                                long T, long D, int threads) {
#pragma omp parallel num_threads(threads) if (T * D >= MANY)
  add_rms_norm(x, y, weight, eps, sum, out, T, D);
}

extern "C" void step_add_rms_norm(const Word* a, long T) {
  add_rms_norm((bf16*)a[0].p, (bf16*)a[1].p, (bf16*)a[2].p, (float)a[3].f, (bf16*)a[4].p, (bf16*)a[5].p, T, a[7].l);
}

// Heads of x[T, N, H], rows `stride` apart -> out [T, N, H]. cos and sin: [T, H]; H is a multiple of 32.
static void norm_rotary(const bf16* x, long stride, const bf16* weight, float eps, const bf16* cos, const bf16* sin,
                        bf16* out, long T, long N, long H) {
#pragma omp for schedule(static) collapse(2)
  for (long t = 0; t < T; t++)
    for (long n = 0; n < N; n++) {
      const bf16* head = x + t * stride + n * H;
      bf16* to = out + (t * N + n) * H;
      const __m512 scale = scale_of(head, H, eps);
      for (long low = 0, high = H / 2; low < H / 2; low += 16, high += 16) {
        const __m512 a = normed(head + low, weight + low, scale), b = normed(head + high, weight + high, scale);
        const __m512 a_cos = round_ps(_mm512_mul_ps(a, load_wide(cos + t * H + low)));
        const __m512 b_sin = round_ps(_mm512_mul_ps(b, load_wide(sin + t * H + low)));
        const __m512 b_cos = round_ps(_mm512_mul_ps(b, load_wide(cos + t * H + high)));
        const __m512 a_sin = round_ps(_mm512_mul_ps(a, load_wide(sin + t * H + high)));
        _mm256_storeu_si256((__m256i*)(to + low), narrow(_mm512_sub_ps(a_cos, b_sin)));
        _mm256_storeu_si256((__m256i*)(to + high), narrow(_mm512_add_ps(b_cos, a_sin)));
      }
    }
}

extern "C" void q3_norm_rotary(const bf16* x, long stride, const bf16* weight, float eps, const bf16* cos,
                               const bf16* sin, bf16* out, long T, long N, long H, int threads) {
#pragma omp parallel num_threads(threads) if (T * N * H >= MANY)
  norm_rotary(x, stride, weight, eps, cos, sin, out, T, N, H);
}

extern "C" void step_norm_rotary(const Word* a, long T) {
  norm_rotary((bf16*)a[0].p, a[1].l, (bf16*)a[2].p, (float)a[3].f, (bf16*)a[4].p, (bf16*)a[5].p, (bf16*)a[6].p, T,
              a[8].l, a[9].l);
}
