// What the CPU and the CUDA library share: the checks of the operators' arguments.
//
// Stable ABI of torch alone (no ATen, no c10, no Python headers), so that one build serves torch 2.11 and later.
#pragma once

#include "gather_hidden_layout.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace umer1 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

// What sums are kept in, and what normalised rows come out as.
inline ScalarType sum_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_index(const Tensor& index, const char* name) {
  STD_TORCH_CHECK(
      index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.is_contiguous(),
      name, " must be a contiguous int64 vector");
}

inline void check_weight(const std::optional<Tensor>& weight, ScalarType type, int64_t columns) {
  if (weight.has_value()) {
    STD_TORCH_CHECK(
        weight->dim() == 1 && weight->size(0) == columns && weight->scalar_type() == type && weight->is_contiguous(),
        "norm_weight must be a contiguous vector of one value per column, of the dtype of the hidden states");
  }
}

inline Layout check_gather(
    const Tensor& hidden, const Tensor& index, const std::optional<Tensor>& weight, int64_t offset, int64_t total) {
  STD_TORCH_CHECK(hidden.dim() == 3 && is_float(hidden.scalar_type()), "hidden must be floating point [S, B, H]");
  STD_TORCH_CHECK(hidden.size(2) > 0 && hidden.stride(2) == 1, "hidden must have columns that lie side by side");
  check_index(index, "index");
  check_weight(weight, hidden.scalar_type(), hidden.size(2));
  return {hidden.size(0) * hidden.size(1), hidden.size(1), hidden.stride(0), hidden.stride(1), offset, total};
}

inline void check_scatter(
    const Tensor& grad, const Tensor& rows, const Tensor& sorted_index, const Tensor& order,
    const std::optional<Tensor>& weight, bool l2_normalize, ScalarType type) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.is_contiguous(), "grad must be contiguous [N, H]");
  STD_TORCH_CHECK(
      is_float(type) && grad.scalar_type() == (l2_normalize ? sum_type(type) : type),
      "grad must be of the dtype of the gathered rows");
  check_index(sorted_index, "sorted_index");
  check_index(order, "order");
  STD_TORCH_CHECK(
      sorted_index.size(0) == grad.size(0) && order.size(0) == grad.size(0), "one index for each row of grad");
  if (weight.has_value() || l2_normalize) {
    STD_TORCH_CHECK(
        rows.dim() == 2 && rows.is_contiguous() && rows.size(0) == grad.size(0) && rows.size(1) == grad.size(1),
        "rows must be the rows that were gathered, contiguous [N, H]");
  }
  check_weight(weight, type, grad.size(1));
}

}  // namespace umer1
