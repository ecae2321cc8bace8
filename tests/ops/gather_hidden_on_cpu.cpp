// The kernels of csrc/gather_hidden_kernels.cuh in fp64 for ctypes: "wide" in accesses of two elements held in
// registers, "narrow" in single elements.
#include <cmath>

#include "cuda_on_cpu.h"
#include "gather_hidden_kernels.cuh"

using namespace umer1;

#define KERNELS(NAME, WIDTH, HELD)                                                                                    \
  extern "C" int gather_##NAME(                                                                                       \
      const double* hidden, const Layout* layout, const int64_t* index, int64_t count, const double* weight,          \
      double eps, int l2_normalize, int columns, double* out, double* kept, int64_t* bad_index, unsigned threads) {   \
    BadIndex bad{0, 0, 0};                                                                                            \
    launch({unsigned(count), 1}, threads, [&] {                                                                       \
      gather_kernel<double, double, WIDTH, HELD>(                                                                     \
          hidden, *layout, index, weight, eps, l2_normalize, columns, out, kept, &bad);                               \
    });                                                                                                               \
    *bad_index = bad.index;                                                                                           \
    return bad.is_set;                                                                                                \
  }                                                                                                                   \
  extern "C" void scatter_##NAME(                                                                                     \
      const double* grad, const double* rows, const int64_t* sorted_index, const int64_t* order, double* pieces,      \
      const double* weight, double eps, int l2_normalize, int64_t count, int columns, int64_t offset,                 \
      int64_t num_rows, double* out, double* parts, int64_t blocks, unsigned threads) {                               \
    const unsigned chunks = (count + kRunChunk - 1) / kRunChunk, tile = WIDTH * threads;                              \
    launch({chunks, (columns + tile - 1) / tile}, threads, [&] {                                                      \
      pieces_kernel<double, double, WIDTH>(grad, sorted_index, order, count, columns, pieces);                        \
    });                                                                                                               \
    launch({unsigned(blocks), 1}, threads, [&] {                                                                      \
      scatter_kernel<double, double, WIDTH, HELD>(                                                                    \
          grad, rows, sorted_index, order, pieces, weight, eps, l2_normalize, count, columns, offset, num_rows, out,  \
          parts);                                                                                                     \
    });                                                                                                               \
  }

KERNELS(wide, 2, kHeld)
KERNELS(narrow, 1, 0)
