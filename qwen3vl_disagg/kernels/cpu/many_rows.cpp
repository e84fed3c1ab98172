// Linear layers for many rows, by tiles (AMX), where the processor has them.
//
// Some columns of out are made at a time: their part of the weight is brought into the order of a right operand, and
// stays in the second cache while all rows go by, which are read as they lie. The sum of a number of out is made in the
// order of its depth, whatever rows and columns are beside it.
#include "expert_tiles.h"

#ifdef __AMX_BF16__
static inline __mmask32 lanes_of(long count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// Up to 32 rows of x from column `from` on, `stride` apart afterwards, filled up with zeros to whole tiles.
static inline void copy_rows(const bf16* x, long rows, long depth, long from, bf16* to, long stride) {
  for (long i = 0; i < 32; i++)
    for (long k = from; k < depth; k += 32)
      _mm512_storeu_si512(to + i * stride + k - from,
                          _mm512_maskz_loadu_epi16(i < rows ? lanes_of(depth - k) : 0, x + i * depth + k));
}

// Up to 32 rows of a weight -> packed[depth / 32][2][16 pairs][16 rows][2]; what is not there is 0.
static inline void pack_columns(const bf16* w, long rows, long depth, long whole, bf16* packed) {
  for (long half = 0; half < 32; half += 16)
    for (long k = 0; k < whole; k += 32) {
      __m512i r[16];
      for (long i = 0; i < 16; i++)
        r[i] = _mm512_maskz_loadu_epi16(half + i < rows ? lanes_of(depth - k) : 0, w + (half + i) * depth + k);
      transpose(r);
      for (long i = 0; i < 16; i++) _mm512_storeu_si512(packed + k * 32 + half * 32 + i * 32, r[i]);
    }
}

// 32 of the depth of 32 rows, `stride` apart, times 32 columns.
static inline void add_product(const bf16* rows, long stride, const bf16* columns) {
  _tile_loadd(4, rows, stride * 2);
  _tile_loadd(6, columns, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, columns + 2 * TILE, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, rows + 16 * stride, stride * 2);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums[2][2][16][16] = 32 rows, `stride` apart, times 32 columns, over `depth`; what is past the last whole tile of it
// is in edge[32][32].
static inline void block_product(const bf16* rows, long stride, const bf16* edge, const bf16* columns, long depth,
                                 float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  long k = 0;
  for (; k + 32 <= depth; k += 32) add_product(rows + k, stride, columns + k * 32);
  if (k < depth) add_product(edge, 32, columns + k * 32);
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + TILE, 64);
  _tile_stored(2, sums + 2 * TILE, 64);
  _tile_stored(3, sums + 3 * TILE, 64);
}

// Sums, and a bias where there is one, rounded; then gelu where it is wanted, rounded again.
template <bool IS_GELU>
static inline void store_rows(const float* sums, const bf16* bias, bf16* out, long rows, long columns, long stride) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 low = bias ? load_wide(bias) : zero, high = bias && columns > 16 ? load_wide(bias + 16) : zero;
  for (long i = 0; i < rows; i++) {
    const float* from = sums + i / 16 * 2 * TILE + i % 16 * 16;
    __m512 a = _mm512_add_ps(_mm512_loadu_ps(from), low), b = _mm512_add_ps(_mm512_loadu_ps(from + TILE), high);
    if (IS_GELU) a = gelu_tanh(round_ps(a)), b = gelu_tanh(round_ps(b));
    _mm512_mask_storeu_epi16(out + i * stride, lanes_of(columns), (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

// `panel`: columns at a time, a multiple of 32. packed[threads, panel + 32, D in whole tiles].
static void many_rows(const bf16* x, const bf16* const* w, const long* sizes, long num, const bf16* bias, int is_gelu,
                      long panel, bf16* packed, bf16* out, long T, long N, long D, int threads) {
  const long whole = (D + 31) / 32 * 32;
  long panels = 0;
  for (long i = 0; i < num; i++) panels += (sizes[i] + panel - 1) / panel;
  long parts = (4 * threads + panels - 1) / panels;  // enough pieces for all threads
  const long most = (T + 127) / 128, piece = (T + 31) / 32;
  parts = parts < most ? parts : most;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float sums[4 * TILE];
    alignas(64) bf16 edge[32 * 32];
    bf16* columns = packed + omp_get_thread_num() * (panel + 32) * whole;
    bf16* rows = columns + panel * whole;
    begin_tiles();
#pragma omp for schedule(dynamic)
    for (long item = 0; item < panels * parts; item++) {
      long left = item / parts, i = 0, start = 0;
      for (; left >= (sizes[i] + panel - 1) / panel; start += sizes[i++]) left -= (sizes[i] + panel - 1) / panel;
      const long from = left * panel, to = from + panel < sizes[i] ? from + panel : sizes[i];
      for (long n = from; n < to; n += 32) pack_columns(w[i] + n * D, to - n, D, whole, columns + (n - from) * whole);
      const long first = piece * (item % parts) / parts * 32, last = piece * (item % parts + 1) / parts * 32;
      for (long t = first; t < last && t < T; t += 32) {
        const long count = T - t < 32 ? T - t : 32;
        const bf16* here = x + t * D;
        if (D < whole) copy_rows(here, count, D, whole - 32, edge, 32);
        if (count < 32) copy_rows(here, count, D, 0, rows, whole), here = rows;
        settle(packed);
        settle(edge);
        for (long n = from; n < to; n += 32) {
          block_product(here, count < 32 ? whole : D, edge, columns + (n - from) * whole, D, sums);
          settle(sums);
          const bf16* added = bias ? bias + start + n : 0;
          bf16* target = out + t * N + start + n;
          (is_gelu ? store_rows<true> : store_rows<false>)(sums, added, target, count, to - n < 32 ? to - n : 32, N);
        }
      }
    }
    end_tiles();
  }
}
#endif

// out[T, N] = x[T, D] [w_0; w_1; ..]^T + bias for weights w_i[sizes[i], D], whose sizes add up to N; bias[N] may be
// null. `is_gelu`: its tanh form of that. Sizes and D are multiples of 16, `panel` of 32. Scratch: packed[threads,
// panel + 32, D in whole tiles of 32]. Only where `q3_has_tiles`.
extern "C" void q3_many_rows(const bf16* x, const bf16* const* w, const long* sizes, long num, const bf16* bias,
                             int is_gelu, long panel, bf16* packed, bf16* out, long T, long N, long D, int threads) {
#ifdef __AMX_BF16__
  if (may_use_tiles()) many_rows(x, w, sizes, num, bias, is_gelu, panel, packed, out, T, N, D, threads);
#endif
}
