/* The row kernels of rows.cpp as other files call them. */

#pragma once

#include <cstdint>

extern "C" {

// One launch: rows_host.py mirrors these fields in ctypes.
struct Launch {
  const void* z;
  const void* t;
  void* out;
  void* vectors;  // state of fold, coefficients of grad
  const int64_t* y;
  const void* inv_temp;
  const void* t_inv_temp;
  const int64_t* ids;
  const void* ids_grad;
  int64_t rows, columns, start, count, block;  // count: ids a row; block: at most BLOCK, a multiple of the width
  int64_t z_stride, t_stride, out_stride, vectors_stride;
  double alpha, eta, beta, scale, cap, t_scale, t_cap;
  int32_t flags, z_type, t_type, out_type;
};

}  // extern "C"

// fp32 rows [begin, end) of a launch, in the calling thread
void fold_rows(const Launch& l, int64_t begin, int64_t end);
void grad_rows(const Launch& l, int64_t begin, int64_t end);

// numbers `at` .. at + n of a matrix of `type`: factor x, rounded once; x may be written over
void write_scaled(float* x, float factor, void* out, int64_t at, int32_t type, int64_t n);
