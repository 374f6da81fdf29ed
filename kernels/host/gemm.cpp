/* Products of bf16 matrices with fp32 results, C (M, N) = A (M, K) B (K, N), or +=, on CPUs whose cores have tile
registers (AMX): torch has no such product on a CPU, and a copy of the operands in fp32 costs four times the time.

    A     element (m, k) at a + m lda + k, or at a + k lda + m where `a_columns`
    B     element (k, n) at b + k ldb + n, or at b + n ldb + k where `b_columns`
    C     element (m, n) at c + m ldc + n

A tile register holds 16 rows of 64 bytes: 16 x 32 of A; 32 x 16 of B as 16 rows of 16 pairs, a pair the numbers k and
k + 1 of one column; 16 x 16 of C in fp32.  Operands are packed so, a panel of 32 rows (or columns) and all of a block
of K at a time, padded with zeros; a 2 x 2 block of C's tiles is then made in registers.  Which operand is packed once
and which panel by panel follows from the shape:

    K is the longest side (dX = dZ W)          each thread a part of K and a C of its own; these are summed in order
    N is longer than M (logits = X W^T)        A is packed once, each thread takes panels of B
    otherwise (dW = dZ^T X)                    B is packed once, each thread takes panels of A

An element of C is a sum over k in steps of 32, whatever the other rows and columns are; the number of threads tells
only where K is the longest side.

Plain C interface, called through ctypes. */

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

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

constexpr int64_t PANEL = 32;                  // rows of A, or columns of B, that are packed together: two tiles
constexpr int64_t STEP = 32;                   // of k, in one tile
constexpr int64_t AHEAD = 4 * PANEL;           // columns by which a read is announced
constexpr int64_t TILE = 16 * 32;              // numbers of a tile
constexpr int64_t BLOCK_BYTES = 768 << 10;     // of a packed operand that should stay in a core's second cache
constexpr int64_t GROUP_BYTES = 256 << 10;     // of the panels that a thread goes through together
constexpr int64_t PARTIAL_BYTES = 1 << 20;     // of a thread's own C, likewise

struct Operands {
  const Word* a;
  const Word* b;
  float* c;
  int64_t m, n, k, lda, ldb, ldc;
  bool a_columns, b_columns, add;
};

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

inline void pack_a(const Operands& o, int64_t first, int64_t from, int64_t to, Word* out) {
  pack(o.a, o.lda, o.a_columns, false, first, o.m, from, to, out);
}

inline void pack_b(const Operands& o, int64_t first, int64_t from, int64_t to, Word* out) {
  pack(o.b, o.ldb, !o.b_columns, true, first, o.n, from, to, out);
}

// 32 x 32 of C from panels of `steps` steps; `rows` x `columns` of them exist.
inline void multiply(const Word* a, const Word* b, int64_t steps, float* c, int64_t ldc, int64_t rows, int64_t columns,
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
    for (int64_t i = 0; i < PANEL; i++) {  // what is only written is fetched too, and would be waited for
      _mm_prefetch(to + i * ld, _MM_HINT_ET0);
      _mm_prefetch(to + i * ld + 16, _MM_HINT_ET0);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, a += 2 * TILE, b += 2 * TILE) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + TILE, 64);
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

// K is cut so that the operand that is packed once stays in the cache.
inline int64_t depth(int64_t k, int64_t lines) {
  const int64_t fits = BLOCK_BYTES / (2 * panels(lines) * PANEL) / STEP * STEP;
  const int64_t most = std::clamp<int64_t>(fits, 256, 2048);
  const int64_t parts = (k + most - 1) / most;
  return padded((k + parts - 1) / parts, STEP);
}

// One operand packed once, panels of the other dealt to the threads.
void by_panels(const Operands& o, bool by_rows) {
  const int64_t once = panels(by_rows ? o.n : o.m), dealt = panels(by_rows ? o.m : o.n);
  const int64_t block = depth(o.k, by_rows ? o.n : o.m);
  Packed shared(once * PANEL * block);
  for (int64_t from = 0; from < o.k; from += block) {
    const int64_t to = std::min(from + block, o.k), steps = (to - from + STEP - 1) / STEP, size = steps * 2 * TILE;
    const bool add = o.add || from > 0;
    at::parallel_for(0, once, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        by_rows ? pack_b(o, p * PANEL, from, to, shared.get() + p * size)
                : pack_a(o, p * PANEL, from, to, shared.get() + p * size);
    });
    const int64_t group = std::clamp<int64_t>(GROUP_BYTES / (2 * size), 1, 4);
    at::parallel_for(0, (dealt + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles;
      Packed own(group * size);
      for (int64_t g = begin * group; g < std::min(end * group, dealt); g += group) {
        const int64_t last = std::min(g + group, dealt);
        for (int64_t p = g; p < last; p++) {
          Word* panel = own.get() + (p - g) * size;
          by_rows ? pack_a(o, p * PANEL, from, to, panel) : pack_b(o, p * PANEL, from, to, panel);
        }
        for (int64_t q = 0; q < once; q++) {
          const Word* other = shared.get() + q * size;
          for (int64_t p = g; p < last; p++) {
            const Word* panel = own.get() + (p - g) * size;
            const int64_t i = (by_rows ? p : q) * PANEL, j = (by_rows ? q : p) * PANEL;
            multiply(by_rows ? panel : other, by_rows ? other : panel, steps, o.c + i * o.ldc + j, o.ldc, o.m - i,
                     o.n - j, add);
          }
        }
      }
    });
  }
}

// Each thread a part of K; rows of C in groups whose partial results stay in the cache.
void by_depth(const Operands& o) {
  const int64_t width = panels(o.n) * PANEL, block = depth(o.k, o.n);
  const int64_t blocks = (o.k + block - 1) / block;
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), blocks);
  const int64_t groups = std::max<int64_t>(1, 4 * width * o.m / PARTIAL_BYTES);
  const int64_t group = padded((o.m + groups - 1) / groups, PANEL);
  const int64_t rows = group;
  std::vector<Packed> partial;
  for (int64_t i = 0; i < parts; i++) partial.emplace_back(2 * rows * width);
  for (int64_t first = 0; first < o.m; first += group) {
    const int64_t count = std::min(group, o.m - first);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles;
      Packed a(PANEL * block), b(width * block);
      for (int64_t part = begin; part < end; part++) {
        float* c = reinterpret_cast<float*>(partial[part].get());
        const int64_t low = blocks * part / parts, high = blocks * (part + 1) / parts;
        for (int64_t i = low; i < high; i++) {
          const int64_t from = i * block, to = std::min(from + block, o.k), steps = (to - from + STEP - 1) / STEP;
          for (int64_t s = 0; s < steps; s++)  // all columns of a few lines: B is read as it lies
            for (int64_t j = 0; j < o.n; j += PANEL) {
              const int64_t k = from + s * STEP;
              pack_b(o, j, k, std::min(k + STEP, to), b.get() + (j / PANEL * steps + s) * 2 * TILE);
            }
          for (int64_t r = 0; r < count; r += PANEL) {
            pack_a(o, first + r, from, to, a.get());
            for (int64_t j = 0; j < o.n; j += PANEL)
              multiply(a.get(), b.get() + j / PANEL * steps * 2 * TILE, steps, c + r * width + j, width, PANEL, PANEL,
                       i > low);
          }
        }
      }
    });
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        float* c = o.c + (first + r) * o.ldc;
        for (int64_t part = 0; part < parts; part++) {
          const float* x = reinterpret_cast<const float*>(partial[part].get()) + r * width;
          const bool add = o.add || part > 0;
          for (int64_t j = 0; j < o.n; j++) c[j] = add ? c[j] + x[j] : x[j];
        }
      }
    });
  }
}

bool supported() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, avx512bw = 1u << 30, xsave = 3u << 26;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & xsave) != xsave) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile) || !(b & avx512bw)) return false;
  constexpr long request = 0x1023, data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, data) == 0;
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

extern "C" {

// Whether burnish_product may be called: the compiler knew the tiles, the CPU has them, the system lends them.
EXPORT int32_t burnish_product_supported() {
#if defined(HAS_AMX)
  static const bool found = supported();
  return found;
#else
  return 0;
#endif
}

EXPORT void burnish_product(const void* a, int64_t lda, int32_t a_columns, const void* b, int64_t ldb,
                            int32_t b_columns, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k, int32_t add) {
#if defined(HAS_AMX)
  const Operands o{static_cast<const Word*>(a), static_cast<const Word*>(b), c, m, n, k, lda, ldb, ldc,
                   a_columns != 0, b_columns != 0, add != 0};
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; !add && i < m; i++) std::memset(c + i * ldc, 0, n * sizeof(float));
  } else if (k >= 4 * std::max(m, n)) {
    by_depth(o);
  } else {
    by_panels(o, m >= n);
  }
#endif
}
}
