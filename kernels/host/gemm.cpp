/* Products of bf16 matrices with fp32 results, C (M, N) = A (M, K) B (K, N), or +=, on CPUs whose cores have tile
registers (AMX): torch has no such product on a CPU, and a copy of the operands in fp32 costs four times the time.

    A     element (m, k) at a + m lda + k, or at a + k lda + m where `a_columns`
    B     element (k, n) at b + k ldb + n, or at b + n ldb + k where `b_columns`
    C     element (m, n) at c + m ldc + n

Operands are packed as tiles.h says, a panel of 32 rows (or columns) and all of a block of K at a time.  Which operand
is packed once and which panel by panel follows from the shape:

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
#include <vector>

#include "tiles.h"

#if defined(HAS_AMX)

namespace {

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

inline void pack_a(const Operands& o, int64_t first, int64_t from, int64_t to, Word* out) {
  pack(o.a, o.lda, o.a_columns, false, first, o.m, from, to, out);
}

inline void pack_b(const Operands& o, int64_t first, int64_t from, int64_t to, Word* out) {
  pack(o.b, o.ldb, !o.b_columns, true, first, o.n, from, to, out);
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
    const int64_t most = cut(steps);
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
        for (int64_t s = 0; s < steps; s += most) {
          const int64_t count = std::min(most, steps - s);
          for (int64_t q = 0; q < once; q++) {
            const Word* other = shared.get() + q * size + s * 2 * TILE;
            for (int64_t p = g; p < last; p++) {
              const Word* panel = own.get() + (p - g) * size + s * 2 * TILE;
              const int64_t i = (by_rows ? p : q) * PANEL, j = (by_rows ? q : p) * PANEL;
              multiply<true>({by_rows ? panel : other}, by_rows ? other : panel, count, o.c + i * o.ldc + j, o.ldc,
                             o.m - i, o.n - j, add || s > 0);
            }
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
              multiply<true>({a.get()}, b.get() + j / PANEL * steps * 2 * TILE, steps, c + r * width + j, width, PANEL,
                             PANEL, i > low);
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

#endif

#include "tiles_end.h"

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
