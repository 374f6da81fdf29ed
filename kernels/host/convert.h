/* What the CPU kernels share: vectors, and rows of any floating dtype read into fp32 or fp64 and written from them. */

#pragma once

#include <ATen/cpu/vec/functional.h>  // with AVX-512 vec.h only declares the conversions from float
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

using at::vec::Vectorized;

template <typename A>
using Vec = Vectorized<A>;

enum Type : int32_t { FP32, FP64, BF16, FP16 };

template <typename A>
inline Vec<A> load(const A* x) {
  return Vec<A>::loadu(x);
}

inline int64_t padded(int64_t n, int64_t width) {
  return (n + width - 1) / width * width;
}

inline int64_t item(int32_t type) {
  return type == FP64 ? 8 : type == FP32 ? 4 : 2;
}

template <typename S, typename A>
inline void read_as(const void* from, A* to, int64_t n) {
  const S* x = static_cast<const S*>(from);
  int64_t k = 0;
  if constexpr (at::vec::is_reduced_floating_point_v<S> && std::is_same_v<A, float>) {
    constexpr int64_t w = Vectorized<S>::size();
    for (; k + w <= n; k += w) {
      const auto pair = at::vec::convert_to_float<S>(Vectorized<S>::loadu(x + k));
      std::get<0>(pair).store(to + k);
      std::get<1>(pair).store(to + k + w / 2);
    }
  }
  for (; k < n; k++) to[k] = static_cast<A>(x[k]);
}

template <typename S, typename A>
inline void write_as(const A* from, void* to, int64_t n) {
  S* x = static_cast<S*>(to);
  int64_t k = 0;
  if constexpr (at::vec::is_reduced_floating_point_v<S> && std::is_same_v<A, float>) {
    constexpr int64_t w = Vectorized<S>::size(), half = w / 2;
    for (; k + w <= n; k += w) at::vec::convert_from_float<S>(load(from + k), load(from + k + half)).store(x + k);
  }
  for (; k < n; k++) x[k] = static_cast<S>(from[k]);
}

template <typename A>
inline void read(const void* from, int32_t type, A* to, int64_t n) {
  switch (type) {
    case FP32: return read_as<float>(from, to, n);
    case FP64: return read_as<double>(from, to, n);
    case BF16: return read_as<at::BFloat16>(from, to, n);
    default: return read_as<at::Half>(from, to, n);
  }
}

template <typename A>
inline void write(const A* from, void* to, int32_t type, int64_t n) {
  switch (type) {
    case FP32: return write_as<float>(from, to, n);
    case FP64: return write_as<double>(from, to, n);
    case BF16: return write_as<at::BFloat16>(from, to, n);
    default: return write_as<at::Half>(from, to, n);
  }
}

}  // namespace
