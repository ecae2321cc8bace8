// Operators of umer1::gather_rows and their CPU form; umer1/ops/gather_hidden.py says what they compute.

#include "gather_hidden.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

namespace umer1 {
namespace {

// Rows of one thread of a parallel loop: fewer are not worth a thread.
constexpr int64_t kRowsPerThread = 64;

template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class F>
void by_type(ScalarType type, F body) {
  switch (type) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(c10::BFloat16());
    case ScalarType::Half: return body(c10::Half());
    default: STD_TORCH_CHECK(false, "hidden states of this dtype have no rows to gather");
  }
}

// Sum of term(0) ... term(count - 1) in a fixed order; lanes let the compiler use vector instructions.
template <class F>
double sum_of(int64_t count, F term) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  double total = 0;
  for (; i < count; ++i) total += term(i);
  for (double lane : lanes) total += lane;
  return total;
}

// `value` as it is once stored as S.  By its bits for bfloat16: a loop over c10's conversion is not vectorised.
template <class S>
Acc<S> rounded(Acc<S> value) {
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    bits = value != value ? bits : even;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
  } else {
    return Acc<S>(S(value));
  }
}

// One row at a time in the type of sums: as it is, and after the RMSNorm as transformers' RMSNorm rounds it.
template <class S>
struct Row {
  using A = Acc<S>;
  const int64_t columns;
  const double eps;
  std::vector<A> weight;  // empty: no RMSNorm
  std::vector<A> raw, normed, value;
  A scale = 1;

  Row(const S* weight, int64_t columns, double eps) : columns(columns), eps(eps), raw(columns), value(columns) {
    if (!weight) return;
    this->weight.assign(weight, weight + columns);
    normed.resize(columns);
  }
  bool weighted() const { return !weight.empty(); }
  void load(const S* x) {
    A* to = weighted() ? raw.data() : value.data();
    for (int64_t i = 0; i < columns; ++i) to[i] = A(x[i]);
    if (!weighted()) return;
    const A* from = raw.data();
    const double squares = sum_of(columns, [=](int64_t i) { const double v = from[i]; return v * v; });
    const A factor = scale = A(1 / std::sqrt(squares / double(columns) + eps));
    A *unit = normed.data(), *out = value.data();
    const A* times = weight.data();
    for (int64_t i = 0; i < columns; ++i) {
      unit[i] = rounded<S>(from[i] * factor);
      out[i] = rounded<S>(unit[i] * times[i]);
    }
  }
  // Not below the smallest norm; a norm that is not a number stays so.
  double length() const {
    const A* y = value.data();
    const double norm = std::sqrt(sum_of(columns, [=](int64_t i) { const double v = y[i]; return v * v; }));
    return norm < kSmallestNorm ? kSmallestNorm : norm;
  }
};

template <class S>
const S* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const S*>(tensor->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> gather_rows(
    const Tensor& hidden, const Tensor& index, const std::optional<Tensor>& norm_weight, double eps, bool l2_normalize,
    bool keep_rows, int64_t offset, int64_t total) {
  const Layout layout = check_gather(hidden, index, norm_weight, offset, total);
  const ScalarType type = hidden.scalar_type(), out_type = l2_normalize ? sum_type(type) : type;
  const int64_t count = index.size(0), columns = hidden.size(2);
  const auto* asked = static_cast<const int64_t*>(index.data_ptr());
  for (int64_t n = 0; n < count; ++n) {
    STD_TORCH_CHECK(
        asked[n] >= 0 && asked[n] < total, "index[", n, "] = ", asked[n], " is out of range: there are ", total,
        " rows");
  }
  Tensor out = torch::stable::new_empty(hidden, {count, columns}, out_type);
  Tensor kept = torch::stable::new_empty(hidden, {keep_rows ? count : 0, columns}, type);
  by_type(type, [&](auto zero) {
    using S = decltype(zero);
    using A = Acc<S>;
    const S* from = static_cast<const S*>(hidden.data_ptr());
    const S* weight = data_or_null<S>(norm_weight);
    S* raw = keep_rows ? static_cast<S*>(kept.data_ptr()) : nullptr;
    torch::stable::parallel_for(0, count, kRowsPerThread, [&](int64_t begin, int64_t end) {
      Row<S> x(weight, columns, eps);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t row = asked[n] - layout.offset;
        const bool here = row >= 0 && row < layout.rows;
        S* plain = static_cast<S*>(out.data_ptr()) + n * columns;
        A* unit = static_cast<A*>(out.data_ptr()) + n * columns;
        if (!here) {
          for (int64_t i = 0; i < columns; ++i) l2_normalize ? void(unit[i] = A(0)) : void(plain[i] = S(0));
          if (raw) std::fill_n(raw + n * columns, columns, S(0));
          continue;
        }
        const S* source = from + layout.start(row);
        if (raw) std::copy_n(source, columns, raw + n * columns);
        if (!weight && !l2_normalize) {
          std::copy_n(source, columns, plain);
          continue;
        }
        x.load(source);
        const A* y = x.value.data();
        if (l2_normalize) {
          const A length = A(x.length());
          for (int64_t i = 0; i < columns; ++i) unit[i] = y[i] / length;
        } else {
          for (int64_t i = 0; i < columns; ++i) plain[i] = S(y[i]);
        }
      }
    });
  });
  return {out, kept};
}

// The gradient at the loaded row of hidden from `grad`, the sum of the gradients at its copies; adds to `weight_grad`.
template <class S>
void row_gradient(const Row<S>& x, std::vector<double>& sums, bool l2_normalize, double* weight_grad, S* to) {
  using A = Acc<S>;
  const int64_t columns = x.columns;
  double* grad = sums.data();
  if (l2_normalize) {  // y / |y|: (g - y (y.g) / |y|^2) / |y|, and g / floor where the norm is below its floor
    const A* y = x.value.data();
    const double length = x.length();
    double along = sum_of(columns, [=](int64_t i) { return y[i] * grad[i]; }) / (length * length);
    if (length == kSmallestNorm) along = 0;
    for (int64_t i = 0; i < columns; ++i) grad[i] = (grad[i] - y[i] * along) / length;
  }
  if (x.weighted()) {  // r x w with r = (mean x^2 + eps)^-1/2: r (g w - x r^2 mean(x g w))
    const double scale = x.scale;
    const A *raw = x.raw.data(), *normed = x.normed.data(), *weight = x.weight.data();
    for (int64_t i = 0; i < columns; ++i) {
      weight_grad[i] += grad[i] * normed[i];
      grad[i] *= weight[i];
    }
    const double mean = sum_of(columns, [=](int64_t i) { return raw[i] * grad[i]; }) / double(columns);
    for (int64_t i = 0; i < columns; ++i) grad[i] = scale * (grad[i] - raw[i] * scale * scale * mean);
  }
  for (int64_t i = 0; i < columns; ++i) to[i] = S(rounded<S>(A(grad[i])));
}

std::tuple<Tensor, Tensor> scatter_rows(
    const Tensor& grad, const Tensor& rows, const Tensor& sorted_index, const Tensor& order,
    const std::optional<Tensor>& norm_weight, double eps, bool l2_normalize, int64_t steps, int64_t batch,
    int64_t offset) {
  const ScalarType type = rows.scalar_type();
  check_scatter(grad, rows, sorted_index, order, norm_weight, l2_normalize, type);
  const int64_t count = grad.size(0), columns = grad.size(1);
  Tensor out = torch::stable::new_zeros(rows, {steps, batch, columns});
  Tensor weight_grad = torch::stable::new_empty(rows, {norm_weight.has_value() ? columns : 0}, sum_type(type));
  const auto* asked = static_cast<const int64_t*>(sorted_index.data_ptr());
  const auto* place = static_cast<const int64_t*>(order.data_ptr());
  by_type(type, [&](auto zero) {
    using S = decltype(zero);
    using A = Acc<S>;
    const S* weight = data_or_null<S>(norm_weight);
    std::vector<double> sum(columns), weight_sum(weight ? columns : 0);
    Row<S> x(weight, columns, eps);
    for (int64_t first = 0, last = 0; first < count; first = last) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (last = first; last < count && asked[last] == asked[first]; ++last) {
        const int64_t n = place[last] * columns;
        for (int64_t i = 0; i < columns; ++i) {
          sum[i] += l2_normalize ? static_cast<const A*>(grad.data_ptr())[n + i]
                                 : A(static_cast<const S*>(grad.data_ptr())[n + i]);
        }
      }
      const int64_t row = asked[first] - offset;
      if (row < 0 || row >= steps * batch) continue;
      if (weight || l2_normalize) x.load(static_cast<const S*>(rows.data_ptr()) + place[first] * columns);
      row_gradient(x, sum, l2_normalize, weight_sum.data(), static_cast<S*>(out.data_ptr()) + row * columns);
    }
    for (size_t i = 0; i < weight_sum.size(); ++i) static_cast<A*>(weight_grad.data_ptr())[i] = A(weight_sum[i]);
  });
  return {out, weight_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(umer1, library) {
  library.def(
      "gather_rows(Tensor hidden, Tensor index, Tensor? norm_weight, float eps, bool l2_normalize, bool keep_rows, "
      "int offset, int total) -> (Tensor, Tensor)");
  library.def(
      "scatter_rows(Tensor grad, Tensor rows, Tensor sorted_index, Tensor order, Tensor? norm_weight, float eps, "
      "bool l2_normalize, int steps, int batch, int offset) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(umer1, CPU, library) {
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}

}  // namespace umer1
