// CUDA kernels of umer1::gather_rows and umer1::scatter_rows; umer1/ops/gather_hidden.py says what they compute.
//
// One block takes one row, in accesses of 16 bytes where every row starts on 16 bytes, which it reads once and holds in
// registers.  Rows of any other length, or longer than 16 KiB, are read an element at a time and again from the cache.
// No atomics: every sum has a fixed order, so that results do not change from run to run.
//
// Includes nothing of CUDA or torch: tests/ops/cuda_on_cpu.h runs the kernels where there is no GPU.
#pragma once

#include "gather_hidden_layout.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace umer1 {
namespace {

constexpr int kThreads = 512;         // at most, of a block: leaves 128 registers a thread
constexpr int kHeld = 2;              // accesses of 16 bytes that a thread holds of its row
constexpr int64_t kRunChunk = 64;     // sorted positions summed by one block where a run of equal indices is longer
constexpr int64_t kWeightBlocks = 512;  // blocks that share the sum for norm_weight; a constant keeps its order

template <class S>
using Acc = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) Packed {
  T of[WIDTH];
};

// Memory of the host that the device writes: what the next call on the host reads without waiting for the device.
struct BadIndex {
  int64_t index, total;
  int is_set;
};

__device__ inline void report(BadIndex* bad, int64_t index, int64_t total) {
  bad->index = index;
  bad->total = total;
  __threadfence_system();
  *static_cast<volatile int*>(&bad->is_set) = 1;
}

// The columns of one row that this thread takes, `WIDTH` at a time: body(slot, first column).
template <int WIDTH, int HELD, class F>
__device__ inline void each_column(int columns, F body) {
  if constexpr (HELD > 0) {
#pragma unroll
    for (int slot = 0; slot < HELD; ++slot) {
      const int column = (threadIdx.x + slot * blockDim.x) * WIDTH;
      if (column < columns) body(slot, column);
    }
  } else {
    for (int column = threadIdx.x * WIDTH; column < columns; column += blockDim.x * WIDTH) body(0, column);
  }
}

template <class T, int WIDTH>
__device__ inline Packed<T, WIDTH> read(const T* at) {
  return *reinterpret_cast<const Packed<T, WIDTH>*>(at);
}

// The sum over the block, in the same order always; every thread gets it.
template <class A>
__device__ inline A block_sum(A value) {
  __shared__ A parts[kThreads / 32];
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) value += __shfl_xor_sync(~0u, value, lane);
  __syncthreads();  // the parts of the sum before have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  A total = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) total += parts[warp];
  return total;
}

// One row x and its values after the RMSNorm, rounded as transformers' RMSNorm rounds them.
template <class S, int WIDTH, int HELD>
struct Row {
  using A = Acc<S>;
  const S* x;
  const S* weight;  // null: no RMSNorm
  int columns;
  A scale = 1;
  Packed<S, WIDTH> held[HELD > 0 ? HELD : 1];

  __device__ Row(const S* x, const S* weight, int columns, A eps) : x(x), weight(weight), columns(columns) {
    if constexpr (HELD > 0) {
      each_column<WIDTH, HELD>(columns, [&](int slot, int column) { held[slot] = read<S, WIDTH>(x + column); });
    }
    if (weight) {
      A squares = 0;
      each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
        const auto raw = get(slot, column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) squares += A(raw.of[i]) * A(raw.of[i]);
      });
      scale = A(1) / sqrt(block_sum(squares) / A(columns) + eps);
    }
  }
  __device__ Packed<S, WIDTH> get(int slot, int column) const {
    if constexpr (HELD > 0) return held[slot];
    return read<S, WIDTH>(x + column);
  }
  __device__ A normed(S raw) const { return A(S(A(raw) * scale)); }
  __device__ Packed<A, WIDTH> values(int slot, int column) const {
    const auto raw = get(slot, column);
    Packed<A, WIDTH> y;
    if (weight) {
      const auto factors = read<S, WIDTH>(weight + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) y.of[i] = A(S(normed(raw.of[i]) * A(factors.of[i])));
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) y.of[i] = A(raw.of[i]);
    }
    return y;
  }
};

template <class S, class O, int WIDTH, int HELD>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const S* hidden, Layout layout, const int64_t* index, const S* weight, Acc<S> eps, bool l2_normalize, int columns,
    O* out, S* kept, BadIndex* bad) {
  using A = Acc<S>;
  const int64_t asked = index[blockIdx.x], row = asked - layout.offset, to = int64_t(blockIdx.x) * columns;
  if (row < 0 || row >= layout.rows) {
    const bool legal = asked >= 0 && asked < layout.total;
    if (!legal && threadIdx.x == 0) report(bad, asked, layout.total);
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
      out[to + column] = O(legal ? 0.f : nanf(""));
      if (kept) kept[to + column] = S(0.f);
    }
    return;
  }
  const Row<S, WIDTH, HELD> x(hidden + layout.start(row), weight, columns, eps);
  A length = 1;
  if (l2_normalize) {
    A squares = 0;
    each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
      const auto y = x.values(slot, column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) squares += y.of[i] * y.of[i];
    });
    length = sqrt(block_sum(squares));
    if (length < A(kSmallestNorm)) length = A(kSmallestNorm);  // not fmax: a norm that is not a number stays so
  }
  each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
    if (kept) *reinterpret_cast<Packed<S, WIDTH>*>(kept + to + column) = x.get(slot, column);
    const auto y = x.values(slot, column);
    Packed<O, WIDTH> result;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) result.of[i] = O(l2_normalize ? y.of[i] / length : y.of[i]);
    *reinterpret_cast<Packed<O, WIDTH>*>(out + to + column) = result;
  });
}

// Level one of long runs: the part of a run that lies in one chunk of sorted positions, for runs that leave the chunk.
// pieces [2 * chunks, columns]: of chunk c, row 2c is the piece at its start, row 2c + 1 one that starts later in it.
template <class S, class G, int WIDTH>
__global__ void __launch_bounds__(kThreads) pieces_kernel(
    const G* grad, const int64_t* sorted_index, const int64_t* order, int64_t count, int columns, Acc<S>* pieces) {
  using A = Acc<S>;
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
  const int64_t first = blockIdx.x * kRunChunk, last = min(first + kRunChunk, count);
  if (column >= columns) return;
  const auto add = [&](int64_t from, int64_t to, int64_t slot) {
    Packed<A, WIDTH> sum = {};
    for (int64_t position = from; position < to; ++position) {
      const auto part = read<G, WIDTH>(grad + order[position] * columns + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) sum.of[i] += A(part.of[i]);
    }
    *reinterpret_cast<Packed<A, WIDTH>*>(pieces + slot * columns + column) = sum;
  };
  const int64_t head = sorted_index[first], tail = sorted_index[last - 1];
  const bool comes_in = first > 0 && sorted_index[first - 1] == head;
  const bool goes_out = last < count && sorted_index[last] == tail;
  if (comes_in || (goes_out && head == tail)) {
    int64_t end = first + 1;
    while (end < last && sorted_index[end] == head) ++end;
    add(first, end, 2 * int64_t(blockIdx.x));
  }
  if (goes_out && head != tail) {
    int64_t start = last - 1;
    while (sorted_index[start - 1] == tail) --start;
    add(start, last, 2 * int64_t(blockIdx.x) + 1);
  }
}

// The gradients of the copies of one row: positions [first, end), or the pieces of a run that leaves its chunk.
template <class S, class G, int WIDTH>
struct Run {
  using A = Acc<S>;
  const G* grad;
  const int64_t* sorted_index;
  const int64_t* order;
  const A* pieces;
  int64_t count, first, end;
  int columns;
  bool leaves;

  __device__ Run(
      const G* grad, const int64_t* sorted_index, const int64_t* order, const A* pieces, int64_t count, int64_t first,
      int columns)
      : grad(grad), sorted_index(sorted_index), order(order), pieces(pieces), count(count), first(first),
        end(first + 1), columns(columns) {
    const int64_t chunk_end = min((first / kRunChunk + 1) * kRunChunk, count);
    while (end < chunk_end && sorted_index[end] == sorted_index[first]) ++end;
    leaves = end == chunk_end && end < count && sorted_index[end] == sorted_index[first];
  }
  __device__ Packed<A, WIDTH> sum(int column) const {
    Packed<A, WIDTH> total = {};
    if (!leaves) {
      for (int64_t position = first; position < end; ++position) {
        const auto part = read<G, WIDTH>(grad + order[position] * columns + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) total.of[i] += A(part.of[i]);
      }
      return total;
    }
    int64_t chunk = first / kRunChunk, slot = 2 * chunk + (first % kRunChunk != 0);
    do {
      const auto part = read<A, WIDTH>(pieces + slot * columns + column);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) total.of[i] += part.of[i];
      slot = 2 * ++chunk;
    } while (chunk * kRunChunk < count && sorted_index[chunk * kRunChunk] == sorted_index[first]);
    return total;
  }
};

// Level two: the gradient of each row that was gathered.  A block takes the first positions of runs one after another
// and adds to its own row of weight_parts [blocks, columns].
template <class S, class G, int WIDTH, int HELD>
__global__ void __launch_bounds__(kThreads, 1) scatter_kernel(
    const G* grad, const S* rows, const int64_t* sorted_index, const int64_t* order, const Acc<S>* pieces,
    const S* weight, Acc<S> eps, bool l2_normalize, int64_t count, int columns, int64_t offset, int64_t num_rows,
    S* out, Acc<S>* weight_parts) {
  using A = Acc<S>;
  for (int64_t first = blockIdx.x; first < count; first += gridDim.x) {
    const int64_t asked = sorted_index[first], row = asked - offset;
    if (row < 0 || row >= num_rows || (first > 0 && sorted_index[first - 1] == asked)) continue;
    const Run<S, G, WIDTH> run(grad, sorted_index, order, pieces, count, first, columns);
    S* to = out + row * columns;
    if (!weight && !l2_normalize) {
      each_column<WIDTH, HELD>(columns, [&](int, int column) {
        const auto sum = run.sum(column);
        Packed<S, WIDTH> result;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) result.of[i] = S(sum.of[i]);
        *reinterpret_cast<Packed<S, WIDTH>*>(to + column) = result;
      });
      continue;
    }
    const Row<S, WIDTH, HELD> x(rows + order[first] * columns, weight, columns, eps);
    Packed<A, WIDTH> held[HELD > 0 ? HELD : 1];
    if constexpr (HELD > 0) {
      each_column<WIDTH, HELD>(columns, [&](int slot, int column) { held[slot] = run.sum(column); });
    }
    const auto incoming = [&](int slot, int column) {
      if constexpr (HELD > 0) return held[slot];
      return run.sum(column);
    };
    // y / |y|: (g - y (y.g) / |y|^2) / |y|, and g / floor where the norm is below its floor.
    A length = 1, along = 0;
    if (l2_normalize) {
      A squares = 0, dot = 0;
      each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
        const auto y = x.values(slot, column);
        const auto g = incoming(slot, column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          squares += y.of[i] * y.of[i];
          dot += y.of[i] * g.of[i];
        }
      });
      length = sqrt(block_sum(squares));
      dot = block_sum(dot);
      const bool below = length < A(kSmallestNorm);
      if (below) length = A(kSmallestNorm);
      along = below ? A(0) : dot / length / length;
    }
    // The gradient at the row's values after the RMSNorm.
    const auto at_values = [&](int slot, int column) {
      auto g = incoming(slot, column);
      if (l2_normalize) {
        const auto y = x.values(slot, column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) g.of[i] = (g.of[i] - y.of[i] * along) / length;
      }
      return g;
    };
    // r x w with r = (mean x^2 + eps)^-1/2: r (g w - x r^2 mean(x g w)).
    A mean = 0;
    if (weight) {
      A dot = 0;
      A* parts = weight_parts + int64_t(blockIdx.x) * columns;
      each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
        const auto raw = x.get(slot, column);
        const auto g = at_values(slot, column);
        const auto factors = read<S, WIDTH>(weight + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          parts[column + i] += g.of[i] * x.normed(raw.of[i]);
          dot += A(raw.of[i]) * g.of[i] * A(factors.of[i]);
        }
      });
      mean = block_sum(dot) / A(columns);
    }
    each_column<WIDTH, HELD>(columns, [&](int slot, int column) {
      auto g = at_values(slot, column);
      if (weight) {
        const auto raw = x.get(slot, column);
        const auto factors = read<S, WIDTH>(weight + column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          g.of[i] = x.scale * (g.of[i] * A(factors.of[i]) - A(raw.of[i]) * x.scale * x.scale * mean);
        }
      }
      Packed<S, WIDTH> result;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) result.of[i] = S(g.of[i]);
      *reinterpret_cast<Packed<S, WIDTH>*>(to + column) = result;
    });
  }
}

}  // namespace
}  // namespace umer1
