// Experts by tiles (AMX), where the processor has them: 16 x 16 sums of 32 products each in one instruction.
//
// The weight is the left operand and read as it lies in memory; the rows of x, far fewer, are packed for the right one.
// So what comes out is transposed: 16 rows of the weight by 16 rows of x. A sum depends on its own row of x alone.
#pragma once
#include "few_rows.h"
#include "tiles.h"

#ifdef __AMX_BF16__
// Numbers of a tile of sums; rows of an expert in a block.
static const long TILE = 256, TILE_ROWS = 128;

// Rows of x, `depth` long -> packed[ceil(count / 16)][depth / 32][16 pairs][16 rows][2]; rows that are not there are 0.
static inline void pack_rows(const bf16* const* rows, long count, long depth, bf16* packed) {
  for (long first = 0; first < count; first += 16)
    for (long k = 0; k < depth; k += 32, packed += 2 * TILE) {
      __m512i r[16];
      for (long i = 0; i < 16; i++)
        r[i] = first + i < count ? _mm512_loadu_si512(rows[first + i] + k) : _mm512_setzero_si512();
      transpose(r);
      for (long i = 0; i < 16; i++) _mm512_storeu_si512(packed + i * 32, r[i]);
    }
}

// Two blocks of 16 rows of a weight, `stride` numbers apart, times one or two groups of packed rows ->
// sums[block][group][16][16]. What lies `ahead` numbers further is fetched into the cache, if that is not 0.
template <bool IS_PAIR>
static inline void tile_product(const bf16* w0, const bf16* w1, long stride, long ahead, const bf16* x, long depth,
                                float* sums) {
  const bf16* x1 = x + depth * 16;
  _tile_zero(0);
  _tile_zero(2);
  if (IS_PAIR) _tile_zero(1);
  if (IS_PAIR) _tile_zero(3);
  for (long k = 0; k < depth; k += 32) {
    _tile_loadd(4, w0 + k, stride * 2);
    _tile_loadd(6, x + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w1 + k, stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (IS_PAIR) {
      _tile_loadd(7, x1 + k * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (ahead)
      for (long i = 0; i < 16; i++) {
        _mm_prefetch((const char*)(w0 + ahead + i * stride + k), _MM_HINT_T1);
        _mm_prefetch((const char*)(w1 + ahead + i * stride + k), _MM_HINT_T1);
      }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 2 * TILE, 64);
  if (IS_PAIR) _tile_stored(1, sums + TILE, 64);
  if (IS_PAIR) _tile_stored(3, sums + 3 * TILE, 64);
}

// All groups of `count` rows, two by two: `take(group, sums)` for one group after another, sums[2][16][16] being
// `2 * TILE` apart.
template <typename Take>
static inline void tile_columns(const bf16* w0, const bf16* w1, long stride, long ahead, const bf16* x, long count,
                                long depth, Take take) {
  alignas(64) float sums[4 * TILE];
  for (long m = 0; m < count; m += 32) {
    const bf16* from = x + m * depth;
    if (m + 16 < count)
      tile_product<true>(w0, w1, stride, m ? 0 : ahead, from, depth, sums);
    else
      tile_product<false>(w0, w1, stride, m ? 0 : ahead, from, depth, sums);
    for (long g = 0; g < 2 && m + 16 * g < count; g++) take(m + 16 * g, sums + g * TILE);
  }
}

// A block of 16 rows of gate and one of up, silu(gate) * up -> act[ceil(count / 16)], packed for `down`.
static inline void gate_up_tiles(const bf16* w, const bf16* x, long count, long ahead, bf16* act, long D, long F) {
  tile_columns(w, w + F * D, D, ahead, x, count, D, [&](long m, const float* sums) {
    for (long i = 0; i < 16; i += 2) {  // transposed sums: two rows of them are pairs
      const float *gate = sums + i * 16, *up = gate + 2 * TILE;
      const __m256i even = narrow(swiglu(gate, up)), odd = narrow(swiglu(gate + 16, up + 16));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(act + m * F + i * 16, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
    }
  });
}

// 32 rows of a weight -> 32 columns of out, rows `stride` apart.
static inline void linear_tiles(const bf16* w, const bf16* x, long count, long ahead, bf16* out, long stride,
                                long depth) {
  tile_columns(w, w + 16 * depth, depth, ahead, x, count, depth, [&](long m, const float* sums) {
    for (long half = 0; half < 2; half++) {
      __m512i r[16];
      for (long i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + half * 2 * TILE + i * 16);
      transpose(r);
      for (long i = 0; i < 16 && m + i < count; i++)
        _mm256_storeu_si256((__m256i*)(out + (m + i) * stride + half * 16), narrow(_mm512_castsi512_ps(r[i])));
    }
  });
}

// Rows of one expert, up to TILE_ROWS of them, from `first` on; their groups of 16 begin at `group`.
struct Block {
  int32_t expert, first, count, group;
};

// As `experts`. index: 4 * (E + T * K / TILE_ROWS) numbers more; act[rows, F] and y[rows, D] for rows of whole groups,
// which are T * K + 16 * (E + T * K / TILE_ROWS) at most. y holds packed rows of x first.
static void experts_by_tiles(const bf16* x, const int64_t* ids, const bf16* weights, const bf16* gate_up,
                             const bf16* down, int32_t* index, bf16* act, bf16* y, bf16* out, long T, long E, long K,
                             long D, long F, int threads) {
  const Routed routed(index, T, E, K);
  routed.sort(ids, T, E, K);
  Block* blocks = (Block*)(index + E + 1 + 2 * T * K);
  long num = 0, groups = 0;
  for (long e = 0; e < E; e++) {
    const long start = routed.starts[e], all = routed.starts[e + 1] - start, parts = (all + TILE_ROWS - 1) / TILE_ROWS;
    for (long i = 0; i < parts; i++) {
      const int32_t first = start + all * i / parts, count = start + all * (i + 1) / parts - first;
      blocks[num++] = {(int32_t)e, first, count, (int32_t)groups};
      groups += (count + 15) / 16;
    }
  }
  // Neighbouring columns for one thread, which fetches the next ones; enough pieces for all threads.
  const long gates = F / 16, downs = D / 32, share = num * gates / (4 * threads) + 1, rest = num * downs / (4 * threads) + 1;
  const long gate_piece = share < gates ? share : gates, down_piece = rest < downs ? rest : downs;
#pragma omp parallel num_threads(threads)
  {
    begin_tiles();
#pragma omp for schedule(dynamic)
    for (long b = 0; b < num; b++) {
      const bf16* rows[TILE_ROWS];
      for (long r = 0; r < blocks[b].count; r++) rows[r] = x + (long)routed.token_of[blocks[b].first + r] * D;
      pack_rows(rows, blocks[b].count, D, y + blocks[b].group * 16 * D);
    }
    settle(y);
#pragma omp for schedule(dynamic, gate_piece)
    for (long i = 0; i < num * gates; i++) {
      const Block block = blocks[i / gates];
      const long f = i % gates * 16;
      gate_up_tiles(gate_up + (block.expert * 2 * F + f) * D, y + block.group * 16 * D, block.count,
                    f + 16 < F ? 16 * D : 0, act + block.group * 16 * F + f * 16, D, F);
    }
    settle(act);
#pragma omp for schedule(dynamic, down_piece)
    for (long i = 0; i < num * downs; i++) {
      const Block block = blocks[i / downs];
      const long d = i % downs * 32;
      linear_tiles(down + (block.expert * D + d) * F, act + block.group * 16 * F, block.count, d + 32 < D ? 32 * F : 0,
                   y + block.first * D + d, D, F);
    }
#pragma omp for schedule(static)
    for (long t = 0; t < T; t++) routed.sum(t, weights, y, out, K, D);
    end_tiles();
  }
}
#endif
