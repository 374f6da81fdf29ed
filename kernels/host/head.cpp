/* A slab of a head in bf16 against a tile of tokens, on CPUs with tile registers (AMX): the logits never leave a core's
second cache.

    z = X W^T + b            X (N, H), W (V, H) bf16, z fp32;  t = X_t W_t^T + b_t likewise, where a teacher has a head
    fold                     the statistics of rows.cpp over z
    gradient                 dz of rows.cpp, rounded to bf16;  dX += dz W;  dW = dz^T X, or +=

A slab is walked in parts of SLAB columns.  Their rows of W are packed once, by all threads; then each thread takes its
tokens, ROWS at a time: their logits into a buffer of its own, the row kernel over it, and with the gradient dX from dz
as it lies.  dz of all tokens stays for the part's dW, whose rows the threads share out.

An element of z, of dX and of dW is a sum in steps of 32 in an order that shapes alone fix; a row's statistics do not
depend on other rows, nor on the number of threads.

Plain C interface, called through ctypes. */

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "tiles.h"

extern "C" {

// head_host.py mirrors these fields in ctypes.
struct HeadLaunch {
  const void* x;        // X packed by burnish_pack
  const void* x_pairs;  // X packed as the second operand of dW, or null
  const void* weight;   // (V, H), rows contiguous
  const float* bias;    // (V,), or null
  const void* t_x;      // a teacher's hidden states (N, H_t), packed, or null: its logits may be given, or not needed
  const void* t_weight; // its head (V, H_t), rows contiguous
  const float* t_bias;
  float* dx;            // (N, H), or null
  float* dw;            // (V, H) where tokens come in several tiles, or null
  void* out;            // (V, H) = factor dW of all tiles, rounded once to out_type, or null
  void* work;           // burnish_head_bytes
  int64_t threads, hidden, weight_stride, t_hidden, t_weight_stride, dx_stride, dw_stride, out_stride;
  float factor;
  int32_t dw_add, out_type;
};

}  // extern "C"

#if defined(HAS_AMX)

namespace {

constexpr int64_t SLAB = 512;          // columns of a part
constexpr int64_t ROWS = 128;          // tokens of a block
constexpr int64_t WIDTH = SLAB + 16;   // of a row of z: rows a power of two apart would share a cache's sets
constexpr int64_t DZ_WIDTH = SLAB + 32;
constexpr int64_t DW_PANELS = 4;       // of 32 rows of dW, that a thread takes together

struct Work {
  int64_t threads, rows, deep, t_deep;  // panels of tokens, of a hidden state, and of a teacher's
  Word *weight[2], *t_weight[2];  // rows of a head packed: two parts of it, or one part in two forms
  Word *dz, *columns;             // dz (N, DZ_WIDTH), and what a thread packs of its columns
  float *z, *t, *dw;              // a thread's block of logits, of the teacher's, and of dW
  int64_t bytes = 0;

  Work(char* base, int64_t n, int64_t hidden, int64_t t_hidden, int64_t threads)
      : threads(threads), rows(panels(n)), deep(panels(hidden)), t_deep(panels(t_hidden)) {
    for (Word*& w : weight) w = take<Word>(base, SLAB * deep * PANEL);
    for (Word*& w : t_weight) w = take<Word>(base, SLAB * t_deep * PANEL);
    dz = take<Word>(base, rows * PANEL * DZ_WIDTH);
    columns = take<Word>(base, threads * columns_size());
    z = take<float>(base, threads * z_size());
    t = take<float>(base, t_deep ? threads * z_size() : 0);
    dw = take<float>(base, threads * dw_size());
  }

  int64_t columns_size() const { return DW_PANELS * rows * PANEL * PANEL; }
  int64_t z_size() const { return ROWS * WIDTH; }
  int64_t dw_size() const { return DW_PANELS * PANEL * deep * PANEL; }

 private:
  template <typename T>
  T* take(char* base, int64_t n) {
    T* here = reinterpret_cast<T*>(base + bytes);
    bytes += padded(n * sizeof(T), 64);
    return here;
  }
};

// C (rows, columns) = or += of panels; `a` gives a panel's lines
template <typename F>
void product(F a, const Word* b, int64_t steps, float* c, int64_t ldc, int64_t rows, int64_t columns, bool add) {
  const int64_t most = cut(steps);
  for (int64_t s = 0; s < steps; s += most) {
    const int64_t count = std::min(most, steps - s);
    for (int64_t i = 0; i < rows; i += PANEL)
      for (int64_t j = 0; j < columns; j += PANEL)
        multiply<false>(a(i).from(s), b + (j / PANEL * steps + s) * 2 * TILE, count, c + i * ldc + j, ldc, rows - i,
                        columns - j, add || s > 0);
  }
}

// One call: what each of `threads` threads does of each phase.
struct Walk {
  const HeadLaunch& h;
  const Launch& all;
  Work work;

  Walk(const HeadLaunch& h, const Launch& all)
      : h(h), all(all), work(static_cast<char*>(h.work), all.rows, h.hidden, h.t_x ? h.t_hidden : 0, h.threads) {}

  // `mine` of `items` for a thread, in order
  template <typename F>
  void share(int64_t items, int64_t thread, F mine) const {
    mine(items * thread / work.threads, items * (thread + 1) / work.threads);
  }

  int64_t width(int64_t first) const { return std::min(SLAB, all.columns - first); }

  // rows of a head from `first`, for its logits
  void pack_rows(const void* head, int64_t ld, int64_t hidden, int64_t first, Word* out, int64_t thread) const {
    const Word* from = static_cast<const Word*>(head) + first * ld;
    share(panels(width(first)), thread, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        pack(from, ld, false, true, p * PANEL, width(first), 0, hidden, out + p * panels(hidden) * 2 * TILE);
    });
  }

  void pack_heads(int64_t first, int64_t slot, int64_t thread) const {
    pack_rows(h.weight, h.weight_stride, h.hidden, first, work.weight[slot], thread);
    if (h.t_x) pack_rows(h.t_weight, h.t_weight_stride, h.t_hidden, first, work.t_weight[slot], thread);
  }

  // the same rows of W as the second operand of dX
  void pack_for_dx(int64_t first, int64_t thread) const {
    const Word* from = static_cast<const Word*>(h.weight) + first * h.weight_stride;
    share(work.deep, thread, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        pack(from, h.weight_stride, true, true, p * PANEL, h.hidden, 0, width(first),
             work.weight[1] + p * panels(width(first)) * 2 * TILE);
    });
  }

  // z (count, v) of tokens from `low`: X is packed to whole panels, so rows and columns beyond the last are zeros
  void logits(const void* x, const Word* weight, int64_t deep, const float* bias, int64_t low, int64_t count, int64_t v,
              float* z) const {
    const Word* lines = static_cast<const Word*>(x) + low / PANEL * deep * 2 * TILE;
    product([&](int64_t i) { return Lines{lines + i / PANEL * deep * 2 * TILE}; }, weight, deep, z, WIDTH,
            padded(count, PANEL), padded(v, PANEL), false);
    for (int64_t i = 0; bias && i < count; i++)
      for (int64_t j = 0; j < v; j++) z[i * WIDTH + j] += bias[j];
  }

  // logits, and what is made of them; the heads' rows are packed in `slot`
  template <bool GRAD>
  void tokens(int64_t first, int64_t slot, int64_t thread) const {
    const int64_t v = width(first), wide = panels(v) * PANEL;
    float *z = work.z + thread * work.z_size(), *t = work.t + thread * work.z_size();
    Launch l = all;
    l.columns = v, l.start = all.start + first, l.z_type = FP32, l.z_stride = WIDTH;
    if (l.t) l.t = static_cast<const char*>(l.t) + first * item(l.t_type);
    if (h.t_x) l.t_type = FP32, l.t_stride = WIDTH;
    l.out = work.dz, l.out_stride = DZ_WIDTH, l.out_type = BF16;
    share(work.rows, thread, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * PANEL, all.rows);
      for (int64_t low = begin * PANEL; low < last; low += ROWS) {
        const int64_t high = std::min(low + ROWS, last), count = high - low;
        logits(h.x, work.weight[slot], work.deep, h.bias ? h.bias + first : nullptr, low, count, v, z);
        l.z = z - low * WIDTH;
        if (h.t_x) {
          logits(h.t_x, work.t_weight[slot], work.t_deep, h.t_bias ? h.t_bias + first : nullptr, low, count, v, t);
          l.t = t - low * WIDTH;
        }
        if (!GRAD) {
          fold_rows(l, low, high);
          continue;
        }
        grad_rows(l, low, high);
        for (int64_t i = low; v < wide && i < high; i++) std::fill_n(work.dz + i * DZ_WIDTH + v, wide - v, Word(0));
        if (h.dx)
          product([&](int64_t i) { return as_they_lie(work.dz + (low + i) * DZ_WIDTH, DZ_WIDTH); }, work.weight[1],
                  wide / STEP, h.dx + low * h.dx_stride, h.dx_stride, count, h.hidden, true);
      }
    });
  }

  // dW of a part from dz of all tokens
  void weight_grad(int64_t first, int64_t thread) const {
    const int64_t v = width(first), wide = panels(v), steps = work.rows, most = cut(steps);
    const Word* pairs = static_cast<const Word*>(h.x_pairs);
    Word* own = work.columns + thread * work.columns_size();
    share(wide, thread, [&](int64_t begin, int64_t end) {
      for (int64_t from = begin; from < end; from += DW_PANELS) {
        const int64_t to = std::min(from + DW_PANELS, end), low = from * PANEL, high = std::min(to * PANEL, v);
        float* c = h.dw ? h.dw + (first + low) * h.dw_stride : work.dw + thread * work.dw_size();
        const int64_t ldc = h.dw ? h.dw_stride : work.deep * PANEL;
        for (int64_t p = from; p < to; p++)
          pack(work.dz, DZ_WIDTH, true, false, p * PANEL, v, 0, all.rows, own + (p - from) * steps * 2 * TILE);
        for (int64_t s = 0; s < steps; s += most)
          for (int64_t j = 0; j < h.hidden; j += PANEL)
            for (int64_t p = from; p < to; p++)
              multiply<false>(Lines{own + ((p - from) * steps + s) * 2 * TILE},
                              pairs + (j / PANEL * steps + s) * 2 * TILE, std::min(most, steps - s),
                              c + (p - from) * PANEL * ldc + j, ldc, v - p * PANEL, h.hidden - j,
                              (h.dw && h.dw_add) || s > 0);
        if (h.out)
          for (int64_t i = low; i < high; i++)
            write_scaled(c + (i - low) * ldc, h.factor, h.out, (first + i) * h.out_stride, h.out_type, h.hidden);
      }
    });
  }

  template <typename F>
  void phase(F each) const {
    at::parallel_for(0, work.threads, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles;
      for (int64_t t = begin; t < end; t++) each(t);
    });
  }

  // a part is packed while the one before it is folded
  void fold() const {
    phase([&](int64_t t) { pack_heads(0, 0, t); });
    for (int64_t first = 0, slot = 0; first < all.columns; first += SLAB, slot ^= 1)
      phase([&](int64_t t) {
        tokens<false>(first, slot, t);
        if (first + SLAB < all.columns) pack_heads(first + SLAB, slot ^ 1, t);
      });
  }

  void gradient() const {
    const auto open = [&](int64_t first, int64_t t) {
      pack_heads(first, 0, t);
      if (h.dx) pack_for_dx(first, t);
    };
    phase([&](int64_t t) { open(0, t); });
    for (int64_t first = 0; first < all.columns; first += SLAB) {
      phase([&](int64_t t) { tokens<true>(first, 0, t); });
      phase([&](int64_t t) {
        if (h.x_pairs) weight_grad(first, t);
        if (first + SLAB < all.columns) open(first + SLAB, t);
      });
    }
  }
};

}  // namespace

#endif

#include "tiles_end.h"

extern "C" {

// Numbers of a packed matrix of `lines` lines and `depth` numbers each.
EXPORT int64_t burnish_packed_numbers(int64_t lines, int64_t depth) {
#if defined(HAS_AMX)
  return panels(lines) * PANEL * padded(depth, STEP);
#else
  return 0;
#endif
}

// `x`: element (line, k) at x + line ld + k, or at x + k ld + line where `columns`; packed as rows of A, or columns of B.
EXPORT void burnish_pack(const void* x, int64_t ld, int32_t columns, int32_t pairs, int64_t lines, int64_t depth,
                         void* out) {
#if defined(HAS_AMX)
  const int64_t size = padded(depth, STEP) * PANEL;
  at::parallel_for(0, panels(lines), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      pack(static_cast<const Word*>(x), ld, columns != 0, pairs != 0, p * PANEL, lines, 0, depth,
           static_cast<Word*>(out) + p * size);
  });
#endif
}

// `t_hidden`: of a teacher whose logits are made here, or 0
EXPORT int64_t burnish_head_bytes(int64_t rows, int64_t hidden, int64_t t_hidden, int64_t threads) {
#if defined(HAS_AMX)
  return Work(nullptr, rows, hidden, t_hidden, threads).bytes;
#else
  return 0;
#endif
}

EXPORT int64_t burnish_head_launch_bytes() {
  return sizeof(HeadLaunch);
}

// Only z and out are not read of `rows`: they are made here.
EXPORT void burnish_head_fold(const HeadLaunch* h, const Launch* rows) {
#if defined(HAS_AMX)
  Walk(*h, *rows).fold();
#endif
}

EXPORT void burnish_head_grad(const HeadLaunch* h, const Launch* rows) {
#if defined(HAS_AMX)
  Walk(*h, *rows).gradient();
#endif
}

}  // extern "C"
