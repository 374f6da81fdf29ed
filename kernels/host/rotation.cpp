/* The block rotation for the CPU; the maths and the operands are in rotation.py.

    x, dy    (N, d)  fp32 / fp64 / bf16 / fp16, any row stride, unit column stride; d = blocks * b
    delta    (blocks, b, p) of the accumulator's dtype A, or one block for all; p is b up to a multiple of PAD, zeros there
    y, dx    (N, d)  contiguous
    dr       (splits, blocks, b, b)  of A: a share of the rows each

ROWS rows of a group of blocks are read in memory's own order into a panel of A, which stays in the core's second cache;
a small product of registers runs over each block of it (a tile of MR rows and NV vectors of columns, one row of delta at
a time), and the panel leaves rounded once.

    rotate     a thread takes some rows, group after group:                 y = x + x delta
    backward   a thread takes a group of blocks and a share of the rows:    dx = dy + dy delta^T,  dr += x^T dy
               in one pass: x and dy are read once, dx is written once

Shares are a function of the shapes, a share's sums run over its rows in order, and shares are added in order by the
caller: no bit depends on the number of threads. */

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convert.h"

extern "C" {

// One launch: rotation_host.py mirrors these fields in ctypes.
struct Rotation {
  const void* x;
  const void* dy;     // backward alone
  const void* delta;  // transposed for backward
  void* out;          // y, or dx; null where backward is not asked for it
  void* dr;
  int64_t rows, blocks, size, padded, delta_stride, x_stride, dy_stride, group, splits;
  int32_t type;
};

}  // extern "C"

namespace {

constexpr int64_t ROWS = 48, PAD = 16;  // of a panel: whole tiles of 16, 12, 8 and 6 rows

// Where a panel keeps a row and a block: side by side as in memory where b is a whole number of vectors (and rows apart by
// no power of two, which would share the cache's few lines), else a block after the other, each row padded with zeros.
struct Layout {
  int64_t group, size, padded, row, block;

  Layout(const Rotation& l)
      : group(l.group), size(l.size), padded(l.padded), row(beside() ? group * size + PAD : padded),
        block(beside() ? size : ROWS * padded) {}

  bool beside() const { return size == padded; }
  int64_t entries() const { return (beside() ? ROWS * row : group * block) + PAD; }
};

// out[m] = start[m] + sum_k a[m][k] b[k], for MR rows and NV vectors of columns; a[m][k] is at a + m a_row + k, or at
// a + k a_row + m where LINES run along m
template <typename A, int MR, int NV, bool LINES>
inline void tile(const A* start, int64_t start_row, const A* a, int64_t a_row, const A* b, int64_t b_row, int64_t depth,
                 A* out, int64_t out_row) {
  constexpr int64_t w = Vec<A>::size();
  Vec<A> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v] = load(start + m * start_row + v * w);
  for (int64_t k = 0; k < depth; k++) {
    Vec<A> next[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) next[v] = load(b + k * b_row + v * w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const Vec<A> factor(LINES ? a[k * a_row + m] : a[m * a_row + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[m][v] = at::vec::fmadd(factor, next[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v].store(out + m * out_row + v * w);
}

// Registers hold MR NV sums, NV vectors of a row and a factor: 32 with AVX-512, 16 with AVX2.
#if defined(CPU_CAPABILITY_AVX512)
#define FOR_TILES(RUN) \
  switch (vectors - v > 3 ? 4 : vectors - v) { \
    case 4: RUN(6, 4) \
    case 3: RUN(8, 3) \
    case 2: RUN(12, 2) \
    default: RUN(16, 1) \
  }
#else
#define FOR_TILES(RUN) \
  switch (vectors - v > 1 ? 2 : 1) { \
    case 2: RUN(6, 2) \
    default: RUN(12, 1) \
  }
#endif

// Both run over a panel, whose rows are ROWS, a multiple of every MR; dr has rows to spare behind its last, which take
// what a last tile's extra rows find.
template <typename A>
void turn(const A* in, const Layout& at, const A* d, int64_t rows, A* out) {
  constexpr int64_t w = Vec<A>::size();
  const int64_t vectors = at.padded / w, row = at.row;
  for (int64_t v = 0; v < vectors;) {
#define RUN(MR, NV)                                                                                             \
  for (int64_t m = 0; m < rows; m += MR) {                                                                      \
    const A* from = in + m * row;                                                                               \
    tile<A, MR, NV, false>(from + v * w, row, from, row, d + v * w, at.padded, at.size, out + m * row + v * w, row); \
  }                                                                                                             \
  v += NV;                                                                                                      \
  break;
    FOR_TILES(RUN)
#undef RUN
  }
}

template <typename A>
void outer(const A* x, const A* dy, const Layout& at, int64_t rows, A* dr) {
  constexpr int64_t w = Vec<A>::size();
  const int64_t vectors = at.padded / w, p = at.padded;
  for (int64_t v = 0; v < vectors;) {
#define RUN(MR, NV)                                                                                             \
  for (int64_t i = 0; i < at.size; i += MR) {                                                                   \
    A* to = dr + i * p + v * w;                                                                                 \
    tile<A, MR, NV, true>(to, p, x + i, at.row, dy + v * w, at.row, rows, to, p);                               \
  }                                                                                                             \
  v += NV;                                                                                                      \
  break;
    FOR_TILES(RUN)
#undef RUN
  }
}

template <typename A>
void bring(const void* base, int32_t type, int64_t row_stride, int64_t first, int64_t rows, int64_t col, int64_t blocks,
           const Layout& at, A* panel) {
  const char* from = static_cast<const char*>(base) + (first * row_stride + col) * item(type);
  for (int64_t m = 0; m < rows; m++, from += row_stride * item(type)) {
    if (at.beside()) {
      read(from, type, panel + m * at.row, blocks * at.size);
      continue;
    }
    for (int64_t i = 0; i < blocks; i++)
      read(from + i * at.size * item(type), type, panel + i * at.block + m * at.row, at.size);
  }
}

template <typename A>
void leave(const A* panel, const Layout& at, void* base, int32_t type, int64_t width, int64_t first, int64_t rows,
           int64_t col, int64_t blocks) {
  char* to = static_cast<char*>(base) + (first * width + col) * item(type);
  for (int64_t m = 0; m < rows; m++, to += width * item(type)) {
    if (at.beside()) {
      write(panel + m * at.row, to, type, blocks * at.size);
      continue;
    }
    for (int64_t i = 0; i < blocks; i++)
      write(panel + i * at.block + m * at.row, to + i * at.size * item(type), type, at.size);
  }
}

template <typename A>
void rotate(const Rotation& l) {
  const int64_t width = l.blocks * l.size, chunks = (l.rows + ROWS - 1) / ROWS;
  const Layout at(l);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> in(at.entries(), A(0)), out(at.entries());
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t first = chunk * ROWS, rows = std::min(ROWS, l.rows - first);
      for (int64_t start = 0; start < l.blocks; start += l.group) {
        const int64_t blocks = std::min(l.group, l.blocks - start), col = start * l.size;
        bring(l.x, l.type, l.x_stride, first, rows, col, blocks, at, in.data());
        for (int64_t i = 0; i < blocks; i++)
          turn(in.data() + i * at.block, at, static_cast<const A*>(l.delta) + (start + i) * l.delta_stride, rows,
               out.data() + i * at.block);
        leave(out.data(), at, l.out, l.type, width, first, rows, col, blocks);
      }
    }
  });
}

template <typename A>
void backward(const Rotation& l) {
  const int64_t width = l.blocks * l.size, square = l.size * l.size;
  const int64_t groups = (l.blocks + l.group - 1) / l.group, share = (l.rows + l.splits - 1) / l.splits;
  const Layout at(l);
  at::parallel_for(0, groups * l.splits, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums = (l.size + PAD) * l.padded;  // of a block, and rows to spare
    std::vector<A> x(at.entries(), A(0)), dy(at.entries(), A(0)), out(at.entries()), dr(l.group * sums);
    for (int64_t task = begin; task < end; task++) {
      const int64_t split = task / groups, start = task % groups * l.group, col = start * l.size;
      const int64_t blocks = std::min(l.group, l.blocks - start), last = std::min(l.rows, (split + 1) * share);
      std::fill(dr.begin(), dr.end(), A(0));
      for (int64_t first = split * share; first < last; first += ROWS) {
        const int64_t rows = std::min(ROWS, last - first);
        bring(l.x, l.type, l.x_stride, first, rows, col, blocks, at, x.data());
        bring(l.dy, l.type, l.dy_stride, first, rows, col, blocks, at, dy.data());
        for (int64_t i = 0; i < blocks; i++) {
          outer(x.data() + i * at.block, dy.data() + i * at.block, at, rows, dr.data() + i * sums);
          if (l.out)
            turn(dy.data() + i * at.block, at, static_cast<const A*>(l.delta) + (start + i) * l.delta_stride, rows,
                 out.data() + i * at.block);
        }
        if (l.out) leave(out.data(), at, l.out, l.type, width, first, rows, col, blocks);
      }
      for (int64_t block = 0; block < blocks; block++) {
        A* to = static_cast<A*>(l.dr) + (split * l.blocks + start + block) * square;
        const A* from = dr.data() + block * sums;
        for (int64_t i = 0; i < l.size; i++) std::copy_n(from + i * l.padded, l.size, to + i * l.size);
      }
    }
  });
}

}  // namespace

EXPORT int64_t burnish_rotation_layout() { return sizeof(Rotation) * 1000 + PAD; }

EXPORT void burnish_rotate(const Rotation* l, int32_t wide) {
  wide ? rotate<double>(*l) : rotate<float>(*l);
}

EXPORT void burnish_rotation_backward(const Rotation* l, int32_t wide) {
  wide ? backward<double>(*l) : backward<float>(*l);
}
