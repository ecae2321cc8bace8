// Launches of the CUDA kernels in gather_hidden_kernels.cuh, and their registration.

#include "gather_hidden.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "gather_hidden_kernels.cuh"

#include <algorithm>
#include <new>
#include <tuple>

namespace umer1 {
namespace {

BadIndex* bad_index() {
  static BadIndex* const bad = [] {
    void* memory = nullptr;
    STD_CUDA_CHECK(cudaHostAlloc(&memory, sizeof(BadIndex), cudaHostAllocMapped | cudaHostAllocPortable));
    return new (memory) BadIndex{0, 0, 0};
  }();
  return bad;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class F>
void by_type(ScalarType type, F body) {
  switch (type) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(__nv_bfloat16());
    case ScalarType::Half: return body(__half());
    default: STD_TORCH_CHECK(false, "hidden states of this dtype have no rows to gather");
  }
}

// body(S of the hidden states, type of the rows outside).
template <class F>
void by_types(ScalarType type, bool l2_normalize, F body) {
  by_type(type, [&](auto zero) {
    using S = decltype(zero);
    if (l2_normalize && !std::is_same_v<S, Acc<S>>) return body(S(), Acc<S>());
    body(S(), S());
  });
}

// body(width of an access in elements, accesses held in registers, threads of a block).
template <class S, class F>
void by_shape(bool aligned, int64_t columns, F body) {
  constexpr int kWidth = 16 / sizeof(S);
  const auto threads = [](int64_t wanted) { return unsigned(std::min<int64_t>(kThreads, (wanted + 31) / 32 * 32)); };
  const int64_t accesses = columns / kWidth;
  if (aligned && columns % kWidth == 0 && accesses <= kHeld * kThreads) {
    const unsigned count = threads((accesses + kHeld - 1) / kHeld);
    return body(std::integral_constant<int, kWidth>(), std::integral_constant<int, kHeld>(), count);
  }
  body(std::integral_constant<int, 1>(), std::integral_constant<int, 0>(), threads(columns));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

void check_columns(int64_t columns) {
  STD_TORCH_CHECK(columns < (int64_t(1) << 30), "rows of 2^30 columns or more are not supported on CUDA");
}

std::tuple<Tensor, Tensor> gather_rows(
    const Tensor& hidden, const Tensor& index, const std::optional<Tensor>& norm_weight, double eps, bool l2_normalize,
    bool keep_rows, int64_t offset, int64_t total) {
  const Layout layout = check_gather(hidden, index, norm_weight, offset, total);
  const ScalarType type = hidden.scalar_type(), out_type = l2_normalize ? sum_type(type) : type;
  const int64_t count = index.size(0), columns = hidden.size(2);
  check_columns(columns);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  Tensor out = torch::stable::new_empty(hidden, {count, columns}, out_type);
  Tensor kept = torch::stable::new_empty(hidden, {keep_rows ? count : 0, columns}, type);
  if (count == 0) return {out, kept};
  BadIndex* bad = bad_index();
  const cudaStream_t stream = current_stream(hidden);
  by_types(type, l2_normalize, [&](auto from_zero, auto to_zero) {
    using S = decltype(from_zero);
    using O = decltype(to_zero);
    const S* from = static_cast<const S*>(hidden.data_ptr());
    const S* weight = data_or_null<S>(norm_weight);
    S* raw = keep_rows ? static_cast<S*>(kept.data_ptr()) : nullptr;
    const int64_t strides = layout.step_stride | layout.batch_stride;
    const bool wide = aligned(from) && aligned(weight) && strides * int64_t(sizeof(S)) % 16 == 0;
    by_shape<S>(wide, columns, [&](auto width, auto held, unsigned threads) {
      gather_kernel<S, O, width, held><<<unsigned(count), threads, 0, stream>>>(
          from, layout, static_cast<const int64_t*>(index.data_ptr()), weight, Acc<S>(eps), l2_normalize, int(columns),
          static_cast<O*>(out.data_ptr()), raw, bad);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor> scatter_rows(
    const Tensor& grad, const Tensor& rows, const Tensor& sorted_index, const Tensor& order,
    const std::optional<Tensor>& norm_weight, double eps, bool l2_normalize, int64_t steps, int64_t batch,
    int64_t offset) {
  const ScalarType type = rows.scalar_type();
  check_scatter(grad, rows, sorted_index, order, norm_weight, l2_normalize, type);
  const int64_t count = grad.size(0), columns = grad.size(1), chunks = (count + kRunChunk - 1) / kRunChunk;
  check_columns(columns);
  const bool weighted = norm_weight.has_value();
  const int64_t blocks = weighted ? std::min(count, kWeightBlocks) : count;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor out = torch::stable::new_zeros(rows, {steps, batch, columns});
  Tensor parts = torch::stable::new_zeros(rows, {weighted ? blocks : 0, weighted ? columns : 0}, sum_type(type));
  Tensor pieces = torch::stable::new_empty(rows, {2 * chunks, columns}, sum_type(type));
  if (count > 0) {
    const cudaStream_t stream = current_stream(grad);
    by_types(type, l2_normalize, [&](auto from_zero, auto grad_zero) {
      using S = decltype(from_zero);
      using G = decltype(grad_zero);
      using A = Acc<S>;
      const G* incoming = static_cast<const G*>(grad.data_ptr());
      const S* saved = static_cast<const S*>(rows.data_ptr());
      const S* weight = data_or_null<S>(norm_weight);
      const auto* asked = static_cast<const int64_t*>(sorted_index.data_ptr());
      const auto* place = static_cast<const int64_t*>(order.data_ptr());
      A* sums = static_cast<A*>(pieces.data_ptr());
      const bool wide = aligned(incoming) && aligned(saved) && aligned(weight);
      by_shape<S>(wide, columns, [&](auto width, auto held, unsigned threads) {
        const unsigned tiles = unsigned((columns + int64_t(width) * threads - 1) / (int64_t(width) * threads));
        pieces_kernel<S, G, width><<<dim3(unsigned(chunks), tiles), threads, 0, stream>>>(
            incoming, asked, place, count, int(columns), sums);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        scatter_kernel<S, G, width, held><<<unsigned(blocks), threads, 0, stream>>>(
            incoming, saved, asked, place, sums, weight, A(eps), l2_normalize, count, int(columns), offset,
            steps * batch, static_cast<S*>(out.data_ptr()), static_cast<A*>(parts.data_ptr()));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  }
  const int64_t over_blocks[] = {0};
  return {out, torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(over_blocks, 1))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(umer1, CUDA, library) {
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}

}  // namespace umer1

#define UMER1_TEXT(...) #__VA_ARGS__
#define UMER1_TEXT_OF(...) UMER1_TEXT(__VA_ARGS__)

// Called by umer1/ops/extension.py through ctypes.
extern "C" {

// What this library was compiled for, e.g. "80_90": compute capabilities in rising order, the last one as PTX too.
__attribute__((visibility("default"))) const char* umer1_cuda_archs() { return UMER1_TEXT_OF(UMER1_CUDA_ARCHS); }

// Whether a gather met an index out of range since the last call; if so, that index and the number of legal ones.
__attribute__((visibility("default"))) int umer1_take_bad_index(int64_t* index, int64_t* total) {
  umer1::BadIndex* bad = umer1::bad_index();
  if (!*static_cast<volatile int*>(&bad->is_set)) return 0;
  *index = bad->index;
  *total = bad->total;
  bad->is_set = 0;
  return 1;
}

}
