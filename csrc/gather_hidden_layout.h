// How rows are found in hidden states, on the host and on the device.
#pragma once

#include <cstdint>

namespace umer1 {

// The floor of the L2 norm that torch.nn.functional.normalize divides by.
constexpr double kSmallestNorm = 1e-12;

// hidden [steps, batch, columns] with any strides over steps and batch; its row r is (r / batch, r % batch).
//
// `offset` is the index of row 0 and `total` the number of legal indices, of which other ranks may hold a part.
struct Layout {
  int64_t rows, batch, step_stride, batch_stride, offset, total;

#ifdef __CUDACC__
  __host__ __device__
#endif
  int64_t start(int64_t row) const {
    return (row / batch) * step_stride + (row % batch) * batch_stride;
  }
};

}  // namespace umer1
