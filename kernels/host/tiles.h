/* Tile registers (AMX): packing of bf16 operands and the product of two packed panels.

A tile register holds 16 rows of 64 bytes: 16 x 32 of A; 32 x 16 of B as 16 rows of 16 pairs, a pair the numbers k and
k + 1 of one column; 16 x 16 of C in fp32.  Operands are packed so, a panel of 32 rows (or columns) and all of k at a
time, padded with zeros; a 2 x 2 block of C's tiles is then made in registers.  An element of C is a sum over k in steps
of 32, whatever the other rows and columns are, and however k is cut: what is stored between cuts is the register.

What follows the inclusion of this file is compiled for CPUs with tiles, up to that of tiles_end.h; HAS_AMX tells
whether the compiler knows them. */

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "convert.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,prfchw"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,prfchw")
#endif

namespace {

using Word = uint16_t;  // a bf16 number; nothing here computes with one but the tiles

constexpr int64_t PANEL = 32;          // rows of A, or columns of B, that are packed together: two tiles
constexpr int64_t STEP = 32;           // of k, in one tile
constexpr int64_t AHEAD = 4 * PANEL;   // columns by which a read is announced
constexpr int64_t TILE = 16 * 32;      // numbers of a tile
constexpr int64_t MOST_STEPS = 10;     // of k at once: a panel of either operand then fits in a core's first cache

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The shapes of a thread's tiles, while this lives.  A call may change them (x86-64 psABI): no one relies on the old ones.
class Tiles {
 public:
  Tiles() {
    TileShapes shapes;
    for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Storage on whole cache lines.
class Packed {
 public:
  explicit Packed(int64_t numbers) : storage_(new Word[numbers + 32]) {
    const auto at = reinterpret_cast<uintptr_t>(storage_.get());
    words_ = storage_.get() + (64 - at % 64) % 64 / sizeof(Word);
  }
  Word* get() const { return words_; }

 private:
  std::unique_ptr<Word[]> storage_;
  Word* words_;
};

inline __mmask32 first32(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n <= 0 ? __mmask32(0) : (__mmask32(1) << n) - 1;
}

inline __mmask16 first16(int64_t n) {
  return n >= 16 ? __mmask16(0xFFFF) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

// 16 x 16 words of 32 bits, rows and columns exchanged.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Rows `first` .. + 15, numbers k .. k + 31 of a matrix whose rows are contiguous; zero beyond `rows` and `depth`.
inline void take_rows(const Word* x, int64_t ld, int64_t first, int64_t rows, int64_t k, int64_t depth, __m512i r[16]) {
  const __mmask32 mask = first32(depth - k);
  for (int64_t i = 0; i < 16; i++) {
    const Word* row = x + (first + i) * ld + k;
    _mm_prefetch(row + PANEL * ld, _MM_HINT_T1);  // the next panel's
    r[i] = first + i < rows ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
  }
}

// The same 16 lines of 32 from a matrix whose k-lines are contiguous, as 16 rows of k of 16 pairs: k and k + 1 of a line.
inline void take_pairs(const Word* x, int64_t ld, int64_t first, int64_t lines, int64_t k, int64_t depth, __m512i r[16]) {
  const __mmask16 mask = first16(lines - first);
  // lanes of 128 bits hold 8 numbers: 0-3 and 4-7 of both lines are interleaved lane by lane, then put in order
  const __m512i order = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  for (int64_t i = 0; i < 16; i++) {
    const int64_t at = k + 2 * i;
    const Word* line = x + at * ld + first;
    _mm_prefetch(line + AHEAD, _MM_HINT_T1);
    _mm_prefetch(line + ld + AHEAD, _MM_HINT_T1);
    const __m256i even = at < depth ? _mm256_maskz_loadu_epi16(mask, line) : _mm256_setzero_si256();
    const __m256i odd = at + 1 < depth ? _mm256_maskz_loadu_epi16(mask, line + ld) : _mm256_setzero_si256();
    r[i] = _mm512_permutex2var_epi64(_mm512_castsi256_si512(_mm256_unpacklo_epi16(even, odd)), order,
                                     _mm512_castsi256_si512(_mm256_unpackhi_epi16(even, odd)));
  }
}

inline void put(const __m512i r[16], Word* to) {
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
}

// A panel of 32 lines from `first`, k in [from, to): steps of two tiles.  `pairs`: tiles of B, else of A.
inline void pack(const Word* x, int64_t ld, bool columns, bool pairs, int64_t first, int64_t lines, int64_t from,
                 int64_t to, Word* out) {
  __m512i r[16];
  for (int64_t k = from; k < to; k += STEP)
    for (int64_t half = 0; half < PANEL; half += 16, out += TILE) {
      // lines whose numbers are contiguous come as A's tiles, others as B's; a transposition makes one of the other
      if (columns)
        take_pairs(x, ld, first + half, lines, k, to, r);
      else
        take_rows(x, ld, first + half, lines, k, to, r);
      if (columns != pairs) transpose(r);
      put(r, out);
    }
}

// 32 rows of A: packed, or as they lie in a matrix whose rows are contiguous and filled up to whole steps.
struct Lines {
  const Word* at;
  int64_t stride = 64, half = TILE, step = 2 * TILE;  // bytes between rows; numbers between tiles, and between steps

  Lines from(int64_t first) const { return {at + first * step, stride, half, step}; }
};

inline Lines as_they_lie(const Word* x, int64_t ld) {
  return {x, 2 * ld, 16 * ld, STEP};
}

// 32 x 32 of C from panels of `steps` steps; `rows` x `columns` of them exist.  FETCH: C is in no near cache.
template <bool FETCH>
inline void multiply(Lines a, const Word* b, int64_t steps, float* c, int64_t ldc, int64_t rows, int64_t columns,
                     bool add) {
  alignas(64) float edge[PANEL * PANEL];
  float* to = c;
  int64_t ld = ldc;
  const bool whole = rows >= PANEL && columns >= PANEL;
  if (!whole) {
    to = edge, ld = PANEL;
    for (int64_t i = 0; add && i < std::min(rows, PANEL); i++)
      std::memcpy(edge + i * PANEL, c + i * ldc, std::min(columns, PANEL) * sizeof(float));
  }
  const int64_t stride = ld * static_cast<int64_t>(sizeof(float));
  if (add) {
    _tile_loadd(0, to, stride);
    _tile_loadd(1, to + 16, stride);
    _tile_loadd(2, to + 16 * ld, stride);
    _tile_loadd(3, to + 16 * ld + 16, stride);
  } else {
    for (int64_t i = 0; FETCH && i < PANEL; i++) {  // what is only written is fetched too, and would be waited for
      _mm_prefetch(to + i * ld, _MM_HINT_ET0);
      _mm_prefetch(to + i * ld + 16, _MM_HINT_ET0);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, a.at += a.step, b += 2 * TILE) {
    _tile_loadd(4, a.at, a.stride);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.at + a.half, a.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 16, stride);
  _tile_stored(2, to + 16 * ld, stride);
  _tile_stored(3, to + 16 * ld + 16, stride);
  for (int64_t i = 0; !whole && i < std::min(rows, PANEL); i++)
    std::memcpy(c + i * ldc, edge + i * PANEL, std::min(columns, PANEL) * sizeof(float));
}

inline int64_t panels(int64_t n) {
  return (n + PANEL - 1) / PANEL;
}

// Steps of k at once, of `steps`: equal parts that stay in the first cache.
inline int64_t cut(int64_t steps) {
  const int64_t parts = (steps + MOST_STEPS - 1) / MOST_STEPS;
  return (steps + parts - 1) / parts;
}

}  // namespace

#endif
