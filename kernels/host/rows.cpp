/* Row kernels for the CPU: the C++ form of rows_triton.py, one thread a row.

Operands, for a tile of N rows and V columns that starts at column `start` of the vocabulary:

    z      (N, V)  raw logits, fp32 / fp64 / bf16 / fp16, any row stride, unit column stride
    t      (N, V)  raw teacher logits, the same; its dtype may be another
    state  (19, N) online state         (contract.STATE)
    coef   (17, N) gradient scalars     (contract.COEF)
    y      (N,)    int64 labels over the whole vocabulary

A row is walked in blocks of BLOCK columns.  A block is brought into the accumulator's dtype A (fp32, or fp64
for fp64 tiles) and stays in the core's first cache while several short loops pass over it, so that the tile
itself is read from memory once.

fold: with m the block's maximum and M the row's so far, M' = max(M, m),

    S'[g] = S[g] e^{M - M'} + sum_k e^{z_k - M'} g_k

once each for z (g in 1, z, e^{z - M'}, t), for the mix m = alpha z + eta t (g in 1, z) and for t (g in 1, z, t).

grad: reads a logit once and writes it once,

    dz_k = p_k (a_k + b z_k + c p_k + e t_k) + d q_k + f T_k + u + g p_k (s_k - jsd_p) + scatter

rounded once; `out` may be `z`.  The label's entry is formed apart, by the same exponential.

A row's order of summation depends on V and on the vector width, never on N, on other rows or on the number of
threads.  Columns beyond a ragged end are filled with -inf, a masked logit, which adds exactly 0 everywhere.
The exponential is good to 1.5 units of fp32; below e^-87.3 it is 0.

Plain C interface, called through ctypes: no Python, no torch types, one small object file. */

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "convert.h"
#include "rows.h"

namespace {

// contract.STATE and contract.COEF, in order; rows_host.py compares the names
#define STATE_ROWS(X)                                                                                       \
  X(z_max) X(z_sum) X(z_label) X(z_exp) X(p_square) X(z_total) X(z_count) X(t_exp) X(m_max) X(m_sum) X(m_exp) \
  X(t_max) X(t_sum) X(t_z) X(t_t) X(t_label) X(argmax) X(jsd_t) X(jsd_p)
#define COEF_ROWS(X)                                                                              \
  X(z_max) X(z_log) X(m_max) X(m_log) X(t_max) X(t_log) X(a) X(a_label) X(b) X(c) X(e) X(d) X(f) X(u) \
  X(label) X(g) X(jsd_p)
#define STATE_NAME(name) S_##name,
#define COEF_NAME(name) C_##name,
#define AS_TEXT(name) #name ","
enum StateRow { STATE_ROWS(STATE_NAME) STATE_COUNT };
enum CoefRow { COEF_ROWS(COEF_NAME) COEF_COUNT };

enum Flag : int32_t {
  TEACHER = 1, MEAN = 2, SQUARE = 4, UNIFORM = 8, OTHER = 16, MIX = 32, FOLD_T = 64, CROSS = 128, T_ENTROPY = 256,
  T_LABEL = 512, HIT = 1024, JSD = 2048, TEMP = 4096, T_TEMP = 8192, MIX_MEAN = 16384
};

// four blocks in fp32 fill half of a first-level cache of 32 KiB
constexpr int64_t BLOCK = 1024;
constexpr int64_t MIN_WORK = 1 << 15;  // entries below which a thread is not worth waking

}  // namespace

namespace {

template <typename A>
constexpr A INF = std::numeric_limits<A>::infinity();

// v where x is not below `low`, else 0; NaN is not below
template <typename A>
inline Vec<A> unless_below(Vec<A> v, Vec<A> x, A low) {
#if defined(CPU_CAPABILITY_AVX512)  // at::vec makes vectors of its masks and masks of them again
  if constexpr (std::is_same_v<A, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_NLT_UQ), v);
#endif
  return Vec<A>::blendv(v, Vec<A>(A(0)), x < Vec<A>(low));
}

// v where z is not a masked logit, else 0
template <typename A>
inline Vec<A> unmasked(Vec<A> v, Vec<A> z) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_set1_ps(-INF<A>), _CMP_NEQ_UQ), v);
#endif
  return Vec<A>::blendv(v, Vec<A>(A(0)), z == Vec<A>(-INF<A>));
}

// e^x for x <= 0 up to rounding: x = n log 2 + r, a polynomial in r (Cephes), n added to the exponent's bits
inline Vec<float> exp_(Vec<float> x) {
  const Vec<float> magic(12582912.0f + 127.0f);  // 1.5 2^23: rounds to an integer
  const auto shifted = at::vec::fmadd(x, Vec<float>(1.44269504088896341f), magic);
  const auto n = shifted - magic;
  auto r = at::vec::fmadd(n, Vec<float>(-0.693359375f), x);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  auto p = at::vec::fmadd(r, Vec<float>(1.9875691500e-4f), Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
  const auto power = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23));
  return unless_below<float>(p * power, x, -87.33654f);
}

inline Vec<double> exp_(Vec<double> x) {
  return x.exp();
}

// tanh x up to two roundings (Cephes): odd polynomial below 0.625, else by e = e^-2|x|, which the caller has
inline Vec<float> tanh_(Vec<float> x, Vec<float> e) {
  const Vec<float> one(1.0f), size = x.abs(), z = x * x;
  auto p = at::vec::fmadd(z, Vec<float>(-5.70498872745e-3f), Vec<float>(2.06390887954e-2f));
  p = at::vec::fmadd(p, z, Vec<float>(-5.37397155531e-2f));
  p = at::vec::fmadd(p, z, Vec<float>(1.33314422036e-1f));
  p = at::vec::fmadd(p, z, Vec<float>(-3.33332819422e-1f));
  p = at::vec::fmadd(p * z, x, x);
  const auto large = (one - e) / (one + e);
  const auto with_sign = Vec<float>::blendv(large, large.neg(), x < Vec<float>(0.0f));
  return Vec<float>::blendv(with_sign, p, size < Vec<float>(0.625f));  // NaN is not below, and large has it
}

inline Vec<double> tanh_(Vec<double> x, Vec<double>) {
  return x.tanh();
}

template <typename A>
inline A exp_one(A x) {  // the same bits as an entry of a vector
  A lanes[Vec<A>::size()];
  exp_(Vec<A>(x)).store(lanes);
  return lanes[0];
}

template <typename A>
inline Vec<A> finite(Vec<A> x) {  // factor of products whose other factor is exactly 0 where x is -inf
  return unmasked(x, x);
}

template <typename A>
inline A finite_one(A x) {
  return x == -INF<A> ? A(0) : x;
}

template <typename A>
inline A total(Vec<A> x) {
  A lanes[Vec<A>::size()], sum = 0;
  x.store(lanes);
  for (int i = 0; i < Vec<A>::size(); i++) sum += lanes[i];
  return sum;
}

// n is a multiple of the width; four chains hide the latency of an addition
template <typename A, typename F>
inline A sum_over(int64_t n, F term) {
  constexpr int64_t w = Vec<A>::size();
  Vec<A> s0(A(0)), s1(A(0)), s2(A(0)), s3(A(0));
  int64_t k = 0;
  for (; k + 4 * w <= n; k += 4 * w) {
    s0 = s0 + term(k);
    s1 = s1 + term(k + w);
    s2 = s2 + term(k + 2 * w);
    s3 = s3 + term(k + 3 * w);
  }
  for (; k < n; k += w) s0 = s0 + term(k);
  return total((s0 + s1) + (s2 + s3));
}

template <typename A>
inline A max_over(const A* x, int64_t n) {
  constexpr int64_t w = Vec<A>::size();
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    // the instruction drops a NaN of its first operand: they are looked for apart, two vectors at a time
    __m512 even = _mm512_set1_ps(-INF<A>), odd = even, last = even;
    __mmask16 nan = 0;
    int64_t k = 0;
    for (; k + 2 * w <= n; k += 2 * w) {
      const __m512 a = load(x + k), b = load(x + k + w);
      even = _mm512_max_ps(even, a), odd = _mm512_max_ps(odd, b);
      nan |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    }
    if (k < n) last = load(x + k);
    nan |= _mm512_cmp_ps_mask(last, last, _CMP_UNORD_Q);
    return nan ? std::numeric_limits<A>::quiet_NaN() : _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(even, odd), last));
  }
#endif
  Vec<A> m0(-INF<A>), m1(-INF<A>), m2(-INF<A>), m3(-INF<A>);
  int64_t k = 0;
  for (; k + 4 * w <= n; k += 4 * w) {  // at::vec's maximum keeps a NaN
    m0 = at::vec::maximum(m0, load(x + k));
    m1 = at::vec::maximum(m1, load(x + k + w));
    m2 = at::vec::maximum(m2, load(x + k + 2 * w));
    m3 = at::vec::maximum(m3, load(x + k + 3 * w));
  }
  for (; k < n; k += w) m0 = at::vec::maximum(m0, load(x + k));
  A lanes[Vec<A>::size()];
  at::vec::maximum(at::vec::maximum(m0, m1), at::vec::maximum(m2, m3)).store(lanes);
  A top = lanes[0];
  for (int i = 1; i < w; i++) top = std::isnan(top) || top > lanes[i] ? top : lanes[i];
  return top;
}

template <typename A>
inline A dot_finite(const A* e, const A* x, int64_t n) {
  return sum_over<A>(n, [=](int64_t k) { return load(e + k) * finite(load(x + k)); });
}

// Tiles

template <typename A>
constexpr int32_t own_type() {
  return std::is_same_v<A, double> ? FP64 : FP32;
}

// raw -> scale -> cap tanh(. / cap) -> inv_temp, over the padded width; slope, where asked for, is sech^2 of the cap
template <typename A>
void transform(A* x, int64_t n, double scale, double cap, const A* inv_temp, A* slope) {
  constexpr int64_t w = Vec<A>::size();
  for (int64_t k = 0; k < n; k += w) {
    auto v = load(x + k);
    if (scale != 1.0) v = v * Vec<A>(A(scale));
    if (cap != 0.0) {
      const auto inner = v / Vec<A>(A(cap)), e = exp_(inner.abs() * Vec<A>(A(-2)));
      if (slope) {  // 1 - tanh^2 without the cancellation
        const auto one = e + Vec<A>(A(1));
        (e * Vec<A>(A(4)) / (one * one)).store(slope + k);
      }
      v = tanh_(inner, e) * Vec<A>(A(cap));
    }
    if (inv_temp) v = v * Vec<A>(*inv_temp);
    v.store(x + k);
  }
}

// One row's view of a tile: blocks in the accumulator's dtype, -inf beyond the ragged end.
template <typename A>
struct Tile {
  const char* row;
  int32_t type;
  double scale, cap;
  const A* inv_temp;
  bool plain;

  Tile(const void* base, int64_t stride, int32_t type, int64_t row, double scale, double cap, const void* inv, bool temp)
      : row(static_cast<const char*>(base) + row * stride * item(type)), type(type), scale(scale), cap(cap),
        inv_temp(temp ? static_cast<const A*>(inv) + row : nullptr),
        plain(scale == 1.0 && cap == 0.0 && !temp) {}

  const A* block(int64_t first, int64_t n, A* buffer, A* slope = nullptr) const {
    constexpr int64_t w = Vec<A>::size();
    const char* from = row + first * item(type);
    if (plain && type == own_type<A>() && n % w == 0) return reinterpret_cast<const A*>(from);
    const int64_t wide = padded(n, w);
    std::fill(buffer + n, buffer + wide, A(0));
    read(from, type, buffer, n);
    if (!plain) transform(buffer, wide, scale, cap, inv_temp, slope);
    std::fill(buffer + n, buffer + wide, -INF<A>);
    return buffer;
  }
};

template <typename A>
Tile<A> student(const Launch& l, int64_t row) {
  return {l.z, l.z_stride, l.z_type, row, l.scale, l.cap, l.inv_temp, (l.flags & TEMP) != 0};
}

template <typename A>
Tile<A> teacher(const Launch& l, int64_t row) {
  return {l.t, l.t_stride, l.t_type, row, l.t_scale, l.t_cap, l.t_inv_temp, (l.flags & T_TEMP) != 0};
}

// the teacher's block, on the student's support wherever more than the mix reads it (which masks by itself)
template <typename A>
const A* teacher_block(const Tile<A>& tile, int64_t first, int64_t n, const A* z, A* buffer, int32_t flags) {
  constexpr int64_t w = Vec<A>::size();
  const A* t = tile.block(first, n, buffer);
  if (!(flags & (OTHER | FOLD_T | CROSS | T_LABEL | JSD))) return t;
  for (int64_t k = 0; k < n; k += w)
    Vec<A>::blendv(load(t + k), Vec<A>(-INF<A>), load(z + k) == Vec<A>(-INF<A>)).store(buffer + k);
  return buffer;
}

// alpha z + eta t; masked entries are put back by hand: alpha may be 0 (0 * -inf is NaN) or negative
template <typename A>
inline Vec<A> mix(Vec<A> z, const A* t, A alpha, A eta) {
  auto m = finite(z) * Vec<A>(alpha);
  if (t) m = at::vec::fmadd(load(t), Vec<A>(eta), m);
  return Vec<A>::blendv(m, Vec<A>(-INF<A>), z == Vec<A>(-INF<A>));
}

// An online softmax: its maximum, and the decay of what was summed under the old one.
template <typename A>
struct Online {
  A max;
  A safe = 0, decay = 1;

  void meet(A top) {
    const A old = max;
    max = std::isnan(old) || old > top ? old : top;
    safe = max == -INF<A> ? A(0) : max;  // a block may hold only masked entries
    decay = old == max ? A(1) : std::exp(old - safe);
  }
};

// sum of e^{x - shift}; the exponentials go to e where one is given (x itself may be it)
template <typename A>
inline A exp_sum(const A* x, int64_t n, A shift, A* e) {
  const Vec<A> s(shift);
  if (!e) return sum_over<A>(n, [=](int64_t k) { return exp_(load(x + k) - s); });
  return sum_over<A>(n, [=](int64_t k) {
    const auto v = exp_(load(x + k) - s);
    v.store(e + k);
    return v;
  });
}

template <typename A>
void fold_row(const Launch& l, int64_t row) {
  constexpr int64_t w = Vec<A>::size();
  alignas(64) A z_buffer[BLOCK], t_buffer[BLOCK], e[BLOCK], other[BLOCK];
  const int32_t f = l.flags;
  const bool keep = f & (MEAN | SQUARE | OTHER);
  A* state = static_cast<A*>(l.vectors) + row;
  const auto at = [&](int r) -> A& { return state[r * l.vectors_stride]; };
  const auto add = [&](int r, A decay, A sum) { at(r) = at(r) * decay + sum; };
  const auto z_tile = student<A>(l, row);
  const auto t_tile = teacher<A>(l, row);
  const int64_t y = l.y[row] - l.start;
  const A alpha = A(l.alpha), eta = A(l.eta);
  Online<A> zs{at(S_z_max)}, ms{at(S_m_max)}, ts{at(S_t_max)};
  A z_sum = at(S_z_sum);
  for (int64_t first = 0; first < l.columns; first += l.block) {
    const int64_t n = std::min(l.block, l.columns - first), wide = padded(n, w), label = y - first;
    const bool here = label >= 0 && label < n;
    const A* z = z_tile.block(first, n, z_buffer);
    if (here) at(S_z_label) = z[label];
    const A top = max_over(z, wide);
    // only strictly larger beats what came before: lowest column on ties
    if ((f & HIT) && top > zs.max) at(S_argmax) = here && std::find(z, z + label, top) == z + label && z[label] == top;
    zs.meet(top);
    z_sum = z_sum * zs.decay + exp_sum(z, wide, zs.safe, keep ? e : nullptr);
    if (f & MEAN) add(S_z_exp, zs.decay, dot_finite(e, z, wide));
    if (f & SQUARE)
      add(S_p_square, zs.decay * zs.decay, sum_over<A>(wide, [&](int64_t k) { return load(e + k) * load(e + k); }));
    if (f & UNIFORM) {
      const Vec<A> one(A(1));
      add(S_z_total, 1, sum_over<A>(wide, [=](int64_t k) { return finite(load(z + k)); }));
      add(S_z_count, 1, sum_over<A>(wide, [=](int64_t k) { return unmasked(one, load(z + k)); }));
    }
    const A* t = nullptr;
    if (f & TEACHER) {
      t = teacher_block(t_tile, first, n, z, t_buffer, f);
      if ((f & T_LABEL) && here) at(S_t_label) = t[label];
      if (f & OTHER) add(S_t_exp, zs.decay, dot_finite(e, t, wide));
    }
    if (f & MIX) {
      const A* with = f & TEACHER && eta != 0 ? t : nullptr;
      for (int64_t k = 0; k < wide; k += w) mix(load(z + k), with ? with + k : nullptr, alpha, eta).store(other + k);
      ms.meet(max_over(other, wide));
      add(S_m_sum, ms.decay, exp_sum(other, wide, ms.safe, f & MIX_MEAN ? other : nullptr));
      if (f & MIX_MEAN) add(S_m_exp, ms.decay, dot_finite(other, z, wide));
    }
    if (f & FOLD_T) {
      ts.meet(max_over(t, wide));
      add(S_t_sum, ts.decay, exp_sum(t, wide, ts.safe, other));
      if (f & CROSS) add(S_t_z, ts.decay, dot_finite(other, z, wide));
      if (f & T_ENTROPY) add(S_t_t, ts.decay, dot_finite(other, t, wide));
    }
  }
  at(S_z_max) = zs.max;
  at(S_z_sum) = z_sum;
  if (f & MIX) at(S_m_max) = ms.max;
  if (f & FOLD_T) at(S_t_max) = ts.max;
}

// log x - log(beta T + (1 - beta) p), in the log domain; 0 where it only meets a zero factor
template <typename A>
struct LogRatio {
  Vec<A> log_m;

  LogRatio(Vec<A> logp, Vec<A> logt, A beta) {
    const Vec<A> low(-INF<A>);
    auto safe = at::vec::maximum(logp, logt);
    safe = Vec<A>::blendv(safe, Vec<A>(A(0)), safe == low);
    // one exponential is 1, so for 0 < beta < 1 the sum is at least min(beta, 1 - beta)
    log_m = safe + (Vec<A>(beta) * exp_(logt - safe) + Vec<A>(A(1) - beta) * exp_(logp - safe)).log();
  }

  Vec<A> of(Vec<A> logx) const {
    const Vec<A> low(-INF<A>), none(A(0));
    return Vec<A>::blendv(Vec<A>::blendv(logx - log_m, none, logx == low), none, log_m == low);
  }
};

template <typename A>
void jsd_row(const Launch& l, int64_t row) {
  alignas(64) A z_buffer[BLOCK], t_buffer[BLOCK];
  A* state = static_cast<A*>(l.vectors) + row;
  const auto at = [&](int r) -> A& { return state[r * l.vectors_stride]; };
  const auto z_tile = student<A>(l, row);
  const auto t_tile = teacher<A>(l, row);
  const Vec<A> z_max(at(S_z_max)), z_log(std::log(at(S_z_sum))), t_max(at(S_t_max)), t_log(std::log(at(S_t_sum)));
  const A beta = A(l.beta);
  A sum_t = 0, sum_p = 0;
  for (int64_t first = 0; first < l.columns; first += l.block) {
    const int64_t n = std::min(l.block, l.columns - first), wide = padded(n, Vec<A>::size());
    const A* z = z_tile.block(first, n, z_buffer);
    const A* t = teacher_block(t_tile, first, n, z, t_buffer, JSD);
    Vec<A> of_t(A(0)), of_p(A(0));
    for (int64_t k = 0; k < wide; k += Vec<A>::size()) {
      const auto logp = load(z + k) - z_max - z_log, logt = load(t + k) - t_max - t_log;
      const LogRatio<A> ratio(logp, logt, beta);
      of_t = of_t + exp_(logt) * ratio.of(logt);
      of_p = of_p + exp_(logp) * ratio.of(logp);
    }
    sum_t += total(of_t);
    sum_p += total(of_p);
  }
  at(S_jsd_t) += sum_t;
  at(S_jsd_p) += sum_p;
}

template <typename A>
void grad_row(const Launch& l, int64_t row) {
  constexpr int64_t w = Vec<A>::size();
  alignas(64) A z_buffer[BLOCK], t_buffer[BLOCK], dz_buffer[BLOCK], slope[BLOCK];
  const int32_t f = l.flags;
  const A* coef = static_cast<const A*>(l.vectors) + row;
  const auto c = [&](int r) { return coef[r * l.vectors_stride]; };
  const auto z_tile = student<A>(l, row);
  const auto t_tile = teacher<A>(l, row);
  const int64_t y = l.y[row] - l.start;
  char* out = static_cast<char*>(l.out) + row * l.out_stride * item(l.out_type);
  const A a = c(C_a), beta = A(l.beta), alpha = A(l.alpha), eta = A(l.eta);
  const A b = f & MEAN ? c(C_b) : A(0), cc = f & SQUARE ? c(C_c) : A(0), e = f & OTHER ? c(C_e) : A(0);
  const A z_max = c(C_z_max), z_log = c(C_z_log);
  const bool poly = f & (MEAN | SQUARE | OTHER), more = f & (MIX | CROSS | UNIFORM | JSD);
  const A temp = f & TEMP ? static_cast<const A*>(l.inv_temp)[row] : A(1), scale = A(l.scale);
  const Vec<A> vmax(z_max), vlog(z_log);
  for (int64_t first = 0; first < l.columns; first += l.block) {
    const int64_t n = std::min(l.block, l.columns - first), wide = padded(n, w), label = y - first;
    const bool here = label >= 0 && label < n;
    const A* z = z_tile.block(first, n, z_buffer, slope);
    const A* t = f & TEACHER ? teacher_block(t_tile, first, n, z, t_buffer, f) : nullptr;
    // the fastest form writes where it reads; others need z again
    const bool direct = !more && !l.count && z_tile.plain && l.out_type == own_type<A>() && n % w == 0;
    A* dz = direct ? reinterpret_cast<A*>(out + first * item(l.out_type)) : dz_buffer;

    A at_label = 0, z_label = 0;
    if (here) {
      z_label = z[label];
      const A p = exp_one((z_label - z_max) - z_log);
      A sum = c(C_a_label);
      if (f & MEAN) sum += b * finite_one(z_label);
      if (f & SQUARE) sum += cc * p;
      if (f & OTHER) sum += e * finite_one(t[label]);
      at_label = p * sum;
    }
    // each term leaves a masked entry at exactly 0, even from a coefficient that is NaN
    const auto put = [&](int64_t k, Vec<A> v) { unmasked(v, load(z + k)).store(dz + k); };
    if (!poly) {
      const Vec<A> va(a);
      for (int64_t k = 0; k < wide; k += w) {
        const auto v = load(z + k);
        unmasked(va * exp_((v - vmax) - vlog), v).store(dz + k);
      }
    } else {
      const Vec<A> va(a), vb(b), vc(cc), ve(e);
      const A* with = f & OTHER ? t : z;  // z times 0 where there is no teacher
      for (int64_t k = 0; k < wide; k += w) {
        const auto v = load(z + k), p = exp_((v - vmax) - vlog);
        auto sum = at::vec::fmadd(vb, finite(v), va);
        sum = at::vec::fmadd(vc, p, sum);
        sum = at::vec::fmadd(ve, finite(load(with + k)), sum);
        unmasked(p * sum, v).store(dz + k);
      }
    }
    if (here) dz[label] = at_label;
    if (f & MIX) {
      const A* with = f & TEACHER && eta != 0 ? t : nullptr;
      const Vec<A> vd(c(C_d)), m_max(c(C_m_max)), m_log(c(C_m_log));
      for (int64_t k = 0; k < wide; k += w) {
        const auto q = exp_((mix(load(z + k), with ? with + k : nullptr, alpha, eta) - m_max) - m_log);
        put(k, at::vec::fmadd(vd, q, load(dz + k)));
      }
    }
    if (f & CROSS) {
      const Vec<A> vf(c(C_f)), t_max(c(C_t_max)), t_log(c(C_t_log));
      for (int64_t k = 0; k < wide; k += w)
        put(k, at::vec::fmadd(vf, exp_((load(t + k) - t_max) - t_log), load(dz + k)));
    }
    if (f & UNIFORM) {
      const Vec<A> vu(c(C_u));
      for (int64_t k = 0; k < wide; k += w) put(k, load(dz + k) + vu);
    }
    if (f & JSD) {
      const Vec<A> vg(c(C_g)), jsd_p(c(C_jsd_p)), t_max(c(C_t_max)), t_log(c(C_t_log));
      for (int64_t k = 0; k < wide; k += w) {
        const auto logp = (load(z + k) - vmax) - vlog, logt = (load(t + k) - t_max) - t_log;
        const auto ratio = LogRatio<A>(logp, logt, beta).of(logp) - jsd_p;
        put(k, at::vec::fmadd(vg, exp_(logp) * ratio, load(dz + k)));
      }
    }
    if (here) {
      dz[label] += c(C_label);
      if (z_label == -INF<A>) dz[label] = 0;
    }
    for (int64_t i = 0; i < l.count; i++) {  // padding, -1, is no column of any tile
      const int64_t id = l.ids[row * l.count + i], k = id - l.start - first;
      if (id >= 0 && k >= 0 && k < n && z[k] != -INF<A>) dz[k] += static_cast<const A*>(l.ids_grad)[row * l.count + i];
    }
    if (!z_tile.plain)
      for (int64_t k = 0; k < wide; k += w) {
        auto v = load(dz + k);
        if (l.cap != 0.0) v = v * load(slope + k);
        v = v * Vec<A>(temp);
        if (l.scale != 1.0) v = v * Vec<A>(scale);
        v.store(dz + k);
      }
    if (!direct) write(dz, out + first * item(l.out_type), l.out_type, n);
  }
}

template <typename F>
void over_rows(const Launch& l, F row) {
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / std::max<int64_t>(1, l.columns));
  at::parallel_for(0, l.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

}  // namespace

void fold_rows(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) fold_row<float>(l, r);
}

void grad_rows(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) grad_row<float>(l, r);
}

EXPORT void burnish_fold(const Launch* l, int32_t wide) {
  if (wide) over_rows(*l, [&](int64_t r) { fold_row<double>(*l, r); });
  else over_rows(*l, [&](int64_t r) { fold_row<float>(*l, r); });
}

EXPORT void burnish_fold_jsd(const Launch* l, int32_t wide) {
  if (wide) over_rows(*l, [&](int64_t r) { jsd_row<double>(*l, r); });
  else over_rows(*l, [&](int64_t r) { jsd_row<float>(*l, r); });
}

EXPORT void burnish_grad(const Launch* l, int32_t wide) {
  if (wide) over_rows(*l, [&](int64_t r) { grad_row<double>(*l, r); });
  else over_rows(*l, [&](int64_t r) { grad_row<float>(*l, r); });
}

void write_scaled(float* x, float factor, void* out, int64_t at, int32_t type, int64_t n) {
  constexpr int64_t w = Vec<float>::size();
  const int64_t whole = n / w * w;
  for (int64_t k = 0; k < whole; k += w) (load(x + k) * Vec<float>(factor)).store(x + k);
  for (int64_t k = whole; k < n; k++) x[k] *= factor;
  write(x, static_cast<char*>(out) + at * item(type), type, n);
}

// out = factor x, rounded once to its type
EXPORT void burnish_scaled(const float* x, float factor, void* out, int32_t type, int64_t n) {
  at::parallel_for(0, (n + BLOCK - 1) / BLOCK, MIN_WORK / BLOCK, [=](int64_t begin, int64_t end) {
    alignas(64) float buffer[BLOCK];
    for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, n); first += BLOCK) {
      const int64_t count = std::min(BLOCK, n - first);
      std::copy_n(x + first, count, buffer);
      write_scaled(buffer, factor, out, first, type, count);
    }
  });
}

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

// "state names;coefficient names;instruction set": rows_host.py refuses a library with another layout than its own
EXPORT const char* burnish_layout() {
  return STATE_ROWS(AS_TEXT) ";" COEF_ROWS(AS_TEXT) ";" TEXT_OF(CPU_CAPABILITY);
}

EXPORT int64_t burnish_launch_bytes() {
  return sizeof(Launch);
}
