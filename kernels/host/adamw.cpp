/* AdamW over tiles of a flat space, for the CPU: the C++ form of adamw_triton.py, one thread a tile.

The maths, the operands and their layout are those of kernels/adamw.py.  For T tiles of TILE elements:

    table             (T, 3)       int64: address of the first weight element, number of valid elements, its index
    grad, master      (T TILE,)    fp32
    m, v              (T TILE,)    fp32, or uint8 codes with m_scale, v_scale (T TILE / BLOCK,) fp32
    scale, found_inf  (1,)         fp32

A tile stays in the core's first cache while short loops pass over it; what is no fp32 vector in place, the ragged end
of a segment included, is worked on in buffers.  Every element goes through the same operations, so that its bits
depend neither on its place nor on the number of threads.  They are those of torch.optim.AdamW(foreach=False): two
fused multiply-adds, written as such, and otherwise a rounding an operation.  A compiler may contract a product and a
sum that it sees into one rounding: where torch rounds in between, there is a store in between, or a sum with -0.
Where `exact` is not asked for, the square root alone is another: the rounded one.

Plain C interface, called through ctypes: no Python, no torch types. */

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "convert.h"

// torch's square root where it has MKL.  It need not be the rounded one (on an AMD EPYC it is 1 ulp off for one number
// in six), and with another AdamW has not the bits of torch.
#if defined(__GNUC__) && !defined(__APPLE__)
extern "C" {
__attribute__((weak)) void vmsSqrt(int64_t n, const float* from, float* to, int64_t mode);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}
#define HAS_MKL (vmsSqrt && MKL_Set_Num_Threads_Local)
#else
inline void vmsSqrt(int64_t, const float*, float*, int64_t) {}
inline int MKL_Set_Num_Threads_Local(int) { return 0; }
#define HAS_MKL false
#endif

namespace {

constexpr int64_t TILE = 1024, BLOCK = 256;
constexpr int64_t MIN_TILES = 32;         // below which a thread is not worth waking
constexpr int64_t MKL_MODE = 0x00140102;  // high accuracy, subnormals kept, no error handling: ATen/cpu/vml.h
constexpr uint32_t GOLDEN = 0x9E3779B9;
constexpr int32_t M_LEVELS = 127, V_LEVELS = 255;

}  // namespace

extern "C" {

// One launch: adamw_host.py mirrors these fields in ctypes.
struct AdamW {
  const int64_t* table;
  const float* grad;
  float* master;  // or null
  void* m;
  void* v;
  float* m_scale;  // null: m and v are fp32
  float* v_scale;
  const float* scale;      // or null
  const float* found_inf;  // or null
  int64_t tiles;
  float decay, weight, beta2, rest, root, eps, step;  // contract: Scalars
  uint32_t key, m_key, v_key, weight_key;
  int32_t small, type, stochastic, exact;
};

}  // extern "C"

namespace {

constexpr int64_t W = Vec<float>::size();

// Random bits: mix(mix(low ^ key) ^ (high golden) ^ stream's key)

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// what the streams of n elements from index `first` share
void hash(int64_t first, uint32_t key, uint32_t* h, int64_t n) {
  const uint32_t low = uint32_t(first), high = uint32_t(uint64_t(first) >> 32);
  for (int64_t k = 0; k < n; k++) {
    const uint32_t at = low + uint32_t(k);
    h[k] = mix(at ^ key) ^ ((high + (at < low)) * GOLDEN);
  }
}

inline float uniform(uint32_t bits) {
  return float(int32_t(bits >> 8)) * 0x1p-24f;
}

// Moments of 8 bits

// What code c is worth: (c / levels)^4.  A sum with -0 keeps the last product from being contracted with what follows.
inline Vec<float> worth(Vec<float> c, Vec<float> unit) {
  const auto root = c * unit, square = root * root;
  return at::vec::fmadd(square, square, Vec<float>(-0.0f));
}

// codes of `levels` magnitudes; above them lie the negative ones
void unpack(const uint8_t* code, const float* scale, int32_t levels, int64_t n, float* x) {
  const float unit = 1.0f / float(levels);
  for (int64_t first = 0; first < n; first += BLOCK)
    for (int64_t k = first; k < std::min(first + BLOCK, n); k++) {
      const float root = float(code[k] & levels) * unit, square = root * root, size = square * square;
      x[k] = (code[k] > levels ? -size : size) * scale[first / BLOCK];
    }
}

// x[n], zeros up to whole vectors -> codes: worth(c) <= |x| / scale < worth(c + 1), and chance takes one of the two.
// A rounded root may give a code one off where a neighbour is all but certain: chance then takes that one.
void pack(const float* x, int64_t n, int32_t levels, const uint32_t* h, uint32_t key, uint8_t* code, float* scale) {
  alignas(64) float u[BLOCK] = {}, codes[BLOCK];
  const Vec<float> none(0.0f), one(1.0f), most(static_cast<float>(levels)), unit(1.0f / float(levels)), minus(128.0f);
  for (int64_t first = 0; first < n; first += BLOCK, x += BLOCK, h += BLOCK, code += BLOCK) {
    const int64_t count = std::min(BLOCK, n - first);
    auto largest = none;
    for (int64_t k = 0; k < count; k += W) largest = at::vec::maximum(largest, load(x + k).abs());
    alignas(64) float lanes[W];
    largest.store(lanes);
    const float top = scale[first / BLOCK] = *std::max_element(lanes, lanes + W);
    for (int64_t k = 0; k < count; k++) u[k] = uniform(mix(h[k] ^ key));
    for (int64_t k = 0; k < count; k += W) {
      const auto raw = load(x + k), a = raw.abs() / Vec<float>(top > 0 ? top : 1.0f);
      auto c = (a.sqrt().sqrt() * most).floor();
      c = Vec<float>::blendv(none, Vec<float>::blendv(most, c, c < most), c > none);
      const auto low = worth(c, unit), high = worth(c + one, unit);
      c = Vec<float>::blendv(c, c + one, (load(u + k) * (high - low) < a - low) & (c < most));
      if (levels == M_LEVELS) c = Vec<float>::blendv(c, c + minus, (raw < none) & (c > none));
      else c = Vec<float>::blendv(c, one, (raw > none) & (c < one));
      c.store(codes + k);
    }
    for (int64_t k = 0; k < count; k++) code[k] = uint8_t(int32_t(codes[k]));
  }
}

// Weights

// x, rounded by chance to a neighbour in bf16 or fp16, still as fp32; infinities and NaN stay
void round_stochastic(float* x, int64_t n, int32_t type, const uint32_t* h, uint32_t key) {
  for (int64_t k = 0; k < n; k++) {
    uint32_t pattern;
    std::memcpy(&pattern, x + k, 4);
    const bool finite = (pattern & 0x7F800000u) != 0x7F800000u;
    const uint32_t bits = mix(h[k] ^ key);
    if (type == BF16) {  // random bits below the last one that is kept carry into it
      pattern = finite ? (pattern + (bits & 0xFFFFu)) & 0xFFFF0000u : pattern;
      std::memcpy(x + k, &pattern, 4);
      continue;
    }
    // in units of the spacing at |x|: 2^-10 of its power of two, and 2^-24 below 2^-14
    float power;
    pattern &= 0x7F800000u;
    std::memcpy(&power, &pattern, 4);
    const float unit = std::max(power * 0x1p-10f, 0x1p-24f), size = std::fabs(x[k]) / unit, low = std::floor(size);
    const float rounded = (low + float(uniform(bits) < size - low)) * unit;
    x[k] = finite ? std::copysign(rounded, x[k]) : x[k];
  }
}

void tile(const AdamW& a, int64_t t) {
  alignas(64) float g_buffer[TILE], p_buffer[TILE], m_buffer[TILE], v_buffer[TILE], s[TILE];
  alignas(64) uint32_t h[TILE];
  const int64_t* row = a.table + 3 * t;
  const int64_t n = row[1], wide = padded(n, W), first = t * TILE, block = first / BLOCK;
  void* weight = reinterpret_cast<void*>(row[0]);

  // n elements in place, or, where the last vector would be ragged, in a buffer that ends with zeros
  const auto in = [&](float* at, float* buffer) {
    if (n == wide) return at;
    std::fill(std::copy_n(at, n, buffer), buffer + wide, 0.0f);
    return buffer;
  };
  const auto out = [&](const float* x, float* at) {
    if (x != at) std::copy_n(x, n, at);
  };
  float* own = a.master ? a.master + first : static_cast<float*>(weight);  // where p lives, if in fp32
  const bool narrow = !a.master && a.type != FP32;
  float* p = p_buffer;
  if (narrow) {
    read(weight, a.type, p, n);
    std::fill(p + n, p + wide, 0.0f);
  } else {
    p = in(own, p_buffer);
  }
  float *m = m_buffer, *v = v_buffer;
  auto *m_code = static_cast<uint8_t*>(a.m) + first, *v_code = static_cast<uint8_t*>(a.v) + first;
  if (a.m_scale) {
    unpack(m_code, a.m_scale + block, M_LEVELS, n, m);
    unpack(v_code, a.v_scale + block, V_LEVELS, n, v);
    std::fill(m + n, m + wide, 0.0f);
    std::fill(v + n, v + wide, 0.0f);
  } else {
    m = in(static_cast<float*>(a.m) + first, m_buffer);
    v = in(static_cast<float*>(a.v) + first, v_buffer);
  }
  const float* g = in(const_cast<float*>(a.grad) + first, g_buffer);
  if (a.scale) {
    for (int64_t k = 0; k < wide; k += W) (load(g + k) * Vec<float>(*a.scale)).store(g_buffer + k);
    g = g_buffer;
  }

  const Vec<float> part(a.weight), beta2(a.beta2), rest(a.rest);
  const Vec<float> decay(a.decay), root(a.root), eps(a.eps), step(a.step), none(-0.0f);
  const auto moments = [&](int64_t k) {
    const auto grad = load(g + k), old = load(m + k);
    at::vec::fmadd(part, grad - old, a.small ? old : grad).store(m + k);
    at::vec::fmadd(rest * grad, grad, load(v + k) * beta2).store(v + k);
  };
  const auto move = [&](int64_t k, Vec<float> root_of_v) {
    const auto by = step * load(m + k) / (root_of_v / root + eps);
    (at::vec::fmadd(load(p + k), decay, none) + by).store(p + k);  // a product of its own, and then a sum
  };
  if (a.exact && HAS_MKL) {
    for (int64_t k = 0; k < wide; k += W) moments(k);
    vmsSqrt(wide, v, s, MKL_MODE);
    for (int64_t k = 0; k < wide; k += W) move(k, load(s + k));
  } else {
    for (int64_t k = 0; k < wide; k += W) {
      moments(k);
      move(k, load(v + k).sqrt());
    }
  }

  const bool random = a.m_scale || a.stochastic;
  if (random) hash(row[2], a.key, h, n);
  if (!narrow) out(p, own);
  if (narrow && a.stochastic) round_stochastic(p, n, a.type, h, a.weight_key);
  if (a.type != FP32) write(p, weight, a.type, n);
  if (a.m_scale) {
    pack(m, n, M_LEVELS, h, a.m_key, m_code, a.m_scale + block);
    pack(v, n, V_LEVELS, h, a.v_key, v_code, a.v_scale + block);
  } else {
    out(m, static_cast<float*>(a.m) + first);
    out(v, static_cast<float*>(a.v) + first);
  }
}

}  // namespace

EXPORT void burnish_adamw(const AdamW* a) {
  if (a->found_inf && *a->found_inf != 0) return;
  at::parallel_for(0, a->tiles, MIN_TILES, [&](int64_t begin, int64_t end) {
    const int threads = HAS_MKL ? MKL_Set_Num_Threads_Local(1) : 0;  // it would wake others for a tile's square roots
    for (int64_t t = begin; t < end; t++) tile(*a, t);
    if (HAS_MKL) MKL_Set_Num_Threads_Local(threads);
  });
}

// the bits of n elements from index `first`, for the tests
EXPORT void burnish_random_bits(int64_t first, int64_t n, uint32_t key, uint32_t stream, uint32_t* bits) {
  hash(first, key, bits, n);
  for (int64_t k = 0; k < n; k++) bits[k] = mix(bits[k] ^ stream);
}

// bytes of a launch, tile and block: adamw_host.py refuses a library with another layout than its own
EXPORT int64_t burnish_adamw_layout() {
  return (int64_t(sizeof(AdamW)) * 10000 + TILE) * 1000 + BLOCK;
}
