/* The block rotation for the CPU; the maths and the operands are in rotation.py.

    x, dy    (N, d)  fp32 / fp64 / bf16 / fp16, any row stride, unit column stride; d = blocks * b
    delta    (blocks, b, p) of the accumulator's dtype A, or one block for all; p is b up to a multiple of PAD, zeros there
    y, dx    (N, d)  contiguous
    dr       (splits, blocks, b, b)  of A: a share of the rows each

A panel, ROWS rows of one block, is brought into A beside the first cache, once; a small product of registers runs over
it (a tile of MR rows and NV vectors of columns, one row of delta at a time), and the panel leaves rounded once.

    rotate     a thread takes panels of all blocks of its rows:             y = x + x delta
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

// out[m] = in[m] + sum_k in[m][k] d[k], for MR rows and NV vectors of columns
template <typename A, int MR, int NV>
inline void turn_tile(const A* in, int64_t stride, const A* d, int64_t d_stride, int64_t depth, int64_t col, A* out,
                      int64_t out_stride) {
  constexpr int64_t w = Vec<A>::size();
  Vec<A> sum[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v] = load(in + m * stride + col + v * w);
  for (int64_t k = 0; k < depth; k++) {
    Vec<A> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) row[v] = load(d + k * d_stride + col + v * w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const Vec<A> factor(in[m * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[m][v] = at::vec::fmadd(factor, row[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v].store(out + m * out_stride + col + v * w);
}

// dr[i + m] += sum over rows of x[row][i + m] dy[row], for MR rows of dr and NV vectors of columns
template <typename A, int MR, int NV>
inline void outer_tile(const A* x, int64_t x_stride, const A* dy, int64_t dy_stride, int64_t rows, int64_t i,
                       int64_t col, A* dr, int64_t dr_stride) {
  constexpr int64_t w = Vec<A>::size();
  Vec<A> sum[MR][NV];
  A* at = dr + i * dr_stride + col;
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v] = load(at + m * dr_stride + v * w);
  for (int64_t r = 0; r < rows; r++) {
    Vec<A> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) row[v] = load(dy + r * dy_stride + col + v * w);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const Vec<A> factor(x[r * x_stride + i + m]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) sum[m][v] = at::vec::fmadd(factor, row[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sum[m][v].store(at + m * dr_stride + v * w);
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

// a panel of `rows` rows, a multiple of the tile's or with rows to spare behind it
template <typename A>
void turn(const A* in, int64_t in_stride, const A* d, int64_t d_stride, int64_t depth, int64_t rows, A* out,
          int64_t out_stride) {
  constexpr int64_t w = Vec<A>::size();
  const int64_t vectors = d_stride / w;
  for (int64_t v = 0; v < vectors;) {
#define RUN(MR, NV)                                                                                       \
  for (int64_t m = 0; m < rows; m += MR)                                                                  \
    turn_tile<A, MR, NV>(in + m * in_stride, in_stride, d, d_stride, depth, v * w, out + m * out_stride, out_stride); \
  v += NV;                                                                                                \
  break;
    FOR_TILES(RUN)
#undef RUN
  }
}

// dr has rows to spare behind its last: they take what the tile's extra rows find
template <typename A>
void outer(const A* x, const A* dy, int64_t stride, int64_t rows, int64_t size, A* dr) {
  constexpr int64_t w = Vec<A>::size();
  const int64_t vectors = stride / w;
  for (int64_t v = 0; v < vectors;) {
#define RUN(MR, NV)                                                                          \
  for (int64_t i = 0; i < size; i += MR)                                                     \
    outer_tile<A, MR, NV>(x, stride, dy, stride, rows, i, v * w, dr, stride);                \
  v += NV;                                                                                   \
  break;
    FOR_TILES(RUN)
#undef RUN
  }
}

template <typename A>
void bring(const void* base, int32_t type, int64_t row_stride, int64_t first, int64_t rows, int64_t col, int64_t size,
           A* panel, int64_t stride) {
  const char* from = static_cast<const char*>(base) + (first * row_stride + col) * item(type);
  for (int64_t m = 0; m < rows; m++) read(from + m * row_stride * item(type), type, panel + m * stride, size);
}

template <typename A>
void leave(const A* panel, int64_t stride, void* base, int32_t type, int64_t width, int64_t first, int64_t rows,
           int64_t col, int64_t size) {
  char* to = static_cast<char*>(base) + (first * width + col) * item(type);
  for (int64_t m = 0; m < rows; m++) write(panel + m * stride, to + m * width * item(type), type, size);
}

template <typename A>
void rotate(const Rotation& l) {
  const int64_t width = l.blocks * l.size, chunks = (l.rows + ROWS - 1) / ROWS, p = l.padded;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> in(ROWS * p, A(0)), out(ROWS * p);
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t first = chunk * ROWS, rows = std::min(ROWS, l.rows - first);
      for (int64_t block = 0; block < l.blocks; block++) {
        const A* d = static_cast<const A*>(l.delta) + block * l.delta_stride;
        bring(l.x, l.type, l.x_stride, first, rows, block * l.size, l.size, in.data(), p);
        turn(in.data(), p, d, p, l.size, rows, out.data(), p);
        leave(out.data(), p, l.out, l.type, width, first, rows, block * l.size, l.size);
      }
    }
  });
}

template <typename A>
void backward(const Rotation& l) {
  const int64_t width = l.blocks * l.size, p = l.padded, square = l.size * l.size;
  const int64_t groups = (l.blocks + l.group - 1) / l.group, share = (l.rows + l.splits - 1) / l.splits;
  at::parallel_for(0, groups * l.splits, 1, [&](int64_t begin, int64_t end) {
    const int64_t sums = (l.size + PAD) * p;  // of a block, and rows to spare
    std::vector<A> x(ROWS * p + PAD, A(0)), dy(ROWS * p, A(0)), out(ROWS * p), dr(l.group * sums);
    for (int64_t task = begin; task < end; task++) {
      const int64_t split = task / groups, start = task % groups * l.group;
      const int64_t stop = std::min(l.blocks, start + l.group), last = std::min(l.rows, (split + 1) * share);
      std::fill(dr.begin(), dr.end(), A(0));
      for (int64_t first = split * share; first < last; first += ROWS) {
        const int64_t rows = std::min(ROWS, last - first);
        for (int64_t block = start; block < stop; block++) {
          const int64_t col = block * l.size;
          bring(l.x, l.type, l.x_stride, first, rows, col, l.size, x.data(), p);
          bring(l.dy, l.type, l.dy_stride, first, rows, col, l.size, dy.data(), p);
          outer(x.data(), dy.data(), p, rows, l.size, dr.data() + (block - start) * sums);
          if (!l.out) continue;
          turn(dy.data(), p, static_cast<const A*>(l.delta) + block * l.delta_stride, p, l.size, rows, out.data(), p);
          leave(out.data(), p, l.out, l.type, width, first, rows, col, l.size);
        }
      }
      for (int64_t block = start; block < stop; block++) {
        A* to = static_cast<A*>(l.dr) + (split * l.blocks + block) * square;
        const A* from = dr.data() + (block - start) * sums;
        for (int64_t i = 0; i < l.size; i++) std::copy_n(from + i * p, l.size, to + i * l.size);
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
