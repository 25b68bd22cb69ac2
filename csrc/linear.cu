// y = x W^T + bias + (h * G) B^T for 1 to 64 rows of x, straight from the packed weight.
//
// Reading W at the memory's speed leaves under four instructions an element, so the tensor cores multiply even for one row:
// 16 rows of W are the m16 side of mma.m16n8k16, eight rows of x the n8 side. A packed byte becomes the register with its
// two 16-bit values by one shared-memory load from a 256-entry table kept once per lane (no bank conflicts). Scales enter in
// float32: the products of one block are accumulated apart and added times the block's scale.
//
// The order of k inside a block is free as long as W and x agree: lane `member` of a group takes a quarter of the block,
// contiguous in both. Warps of a CTA share the rows and split K; partial sums meet in shared memory, in a fixed order.
//
// Where W has too few rows for all multiprocessors, CTAs split K as well (the grid's y): each writes the float32 sums of its
// part, and a second kernel adds the parts in order. Nothing is atomic: the same splits give the same bits.
#include <algorithm>

#include "launchers.h"

namespace sda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFinishThreads = 128;

struct LinearPointers {
  const uint16_t* x;
  const uint16_t* bias;
  const float* hidden;
  const void* lora_B;
  const float* gates;
  float scaling;
  int ranks_per_expert;
  uint16_t* out;
  float* parts;  // [splits, M, N] when splits > 1
  int splits;
  float code_multiplier, inverse_multiplier;
  int lora_is_float32;
  int rank;
  int M;
  int64_t N, K;
};

__device__ __forceinline__ float low_rank_term(const LinearPointers& linear, int m, int64_t n) {
  float sum = 0.f;
  for (int r = 0; r < linear.rank; ++r) {
    const int64_t index = n * linear.rank + r;
    const float b = linear.lora_is_float32 ? load_cached(static_cast<const float*>(linear.lora_B) + index)
                                           : BFloat16::widen(load_cached(static_cast<const uint16_t*>(linear.lora_B) + index));
    float h = load_cached(linear.hidden + int64_t(m) * linear.rank + r);
    if (linear.gates != nullptr) h *= linear.scaling * load_cached(linear.gates + r / linear.ranks_per_expert);
    sum = multiply_add(h, b, sum);
  }
  return sum;
}

// The end of every path: bias and low-rank part in float32, then the one rounding.
template <typename T>
__device__ __forceinline__ void store_output(const LinearPointers& linear, int m, int64_t n, float sum) {
  if (linear.bias != nullptr) sum += T::widen(load_cached(linear.bias + n));
  linear.out[m * linear.N + n] = T::round(sum + low_rank_term(linear, m, n));
}

// Reads kWords neighbouring 32-bit words with one load.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* address, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 1) {
    words[0] = load_cached(reinterpret_cast<const uint32_t*>(address));
  } else if constexpr (kWords == 2) {
    const uint2 pair = load_streaming(reinterpret_cast<const uint2*>(address));
    words[0] = pair.x, words[1] = pair.y;
  } else {
    const uint4 quad = load_streaming(reinterpret_cast<const uint4*>(address));
    words[0] = quad.x, words[1] = quad.y, words[2] = quad.z, words[3] = quad.w;
  }
}

__host__ __device__ constexpr int ctas_per_multiprocessor(int column_tiles) {
  return column_tiles == 1 ? 3 : (column_tiles == 8 ? 1 : 2);
}

// Steps that a warp of linear_kernel loads before it waits for the first.
__host__ __device__ constexpr int steps_in_flight(int words, int column_tiles) {
  return (column_tiles < 4 ? 4 : 2) / (words == 4 ? 2 : 1);
}

// kWords: packed words a lane reads of one step of 32 * kWords elements, all in one block.
// kColumnTiles: tiles of eight rows of x. kRowTiles: tiles of 16 rows of W in a CTA; the other warps split K.
template <typename T, int kWords, int kColumnTiles, int kRowTiles>
__global__ void __launch_bounds__(kThreads, ctas_per_multiprocessor(kColumnTiles))
    linear_kernel(PackedWeight weight, LinearPointers linear) {
  constexpr int kStep = 32 * kWords;
  constexpr int kUnroll = steps_in_flight(kWords, kColumnTiles);
  constexpr int kSlices = kWarps / kRowTiles;
  alignas(16) SDA_SHARED uint32_t table[256 * 32];  // filled 16 bytes at a time
  SDA_SHARED float partial[kWarps][8][16 + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const int row_tile = warp % kRowTiles, slice = warp / kRowTiles;

  {
    const float even = multiply_rounded(load_cached(weight.code + threadIdx.x / 16), linear.code_multiplier);
    const float odd = multiply_rounded(load_cached(weight.code + threadIdx.x % 16), linear.code_multiplier);
    const uint32_t pair = T::pack(even, odd);
    uint4* copies = reinterpret_cast<uint4*>(table + threadIdx.x * 32);
#pragma unroll
    for (int i = 0; i < 8; ++i) copies[(i + lane) & 7] = uint4{pair, pair, pair, pair};
  }
  __syncthreads();
  const uint8_t* lane_table = reinterpret_cast<const uint8_t*>(table) + lane * 4;

  const BlockScales block_scales(weight);
  const uint8_t* lane_bytes = weight.packed + member * (4 * kWords);
  const int log2_steps_per_block = weight.log2_block_size - (kWords == 1 ? 5 : (kWords == 2 ? 6 : 7));
  // This CTA's part of K: `steps` steps from `skipped` on.
  const int steps_of_row = int(linear.K / kStep);
  const int steps_per_part = (steps_of_row + int(gridDim.y) - 1) / int(gridDim.y);
  const int skipped = int(blockIdx.y) * steps_per_part;
  const int steps = min(steps_per_part, steps_of_row - skipped);
  const uint32_t lane_column = uint32_t(skipped) * kStep + member * (8 * kWords);
  const int row_blocks = int((linear.N + 16 * kRowTiles - 1) / (16 * kRowTiles));
  for (int row_block = blockIdx.x; row_block < row_blocks; row_block += gridDim.x) {
    const int first_row = (row_block * kRowTiles + row_tile) * 16;
    uint32_t first_unit[2];  // steps before the part of the row
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(first_row + i * 8 + group, int(linear.N) - 1);
      first_unit[i] = uint32_t(row) * uint32_t(steps_of_row) + skipped;
    }

    float sums[kColumnTiles][4] = {};
    for (int first_step = slice * kUnroll; first_step < steps; first_step += kSlices * kUnroll) {
      uint32_t words[kUnroll][2][kWords];
      float scale_of_member[2];  // each lane of a group fetches the scales of one step
      const int member_step = min(first_step + member % kUnroll, steps - 1);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale_of_member[i] = block_scales.at((first_unit[i] + member_step) >> log2_steps_per_block);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int step = min(first_step + u, steps - 1);
          load_words(lane_bytes + int64_t(first_unit[i] + step) * (kStep / 2), words[u][i]);
        }
      }
      float scales[kUnroll][2];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < 2; ++i) scales[u][i] = shuffle_from(scale_of_member[i], group * 4 + u);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first_step + u >= steps) break;
        const uint32_t k = uint32_t(first_step + u) * kStep + lane_column;
        float products[kColumnTiles][4] = {};
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          uint32_t fragments[2][4];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t word = words[u][j & 1][i];
            const int byte = j >> 1;
            const uint32_t offset = (byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7F80u;
            fragments[j >> 2][j & 3] = *reinterpret_cast<const uint32_t*>(lane_table + offset);
          }
#pragma unroll
          for (int tile = 0; tile < kColumnTiles; ++tile) {
            const int m = tile * 8 + group < linear.M ? tile * 8 + group : linear.M - 1;
            const uint4 values = load_cached(reinterpret_cast<const uint4*>(linear.x + (m * uint32_t(linear.K) + k)) + i);
            mma_16x8x16<T>(products[tile], fragments[0], values.x, values.y);
            mma_16x8x16<T>(products[tile], fragments[1], values.z, values.w);
          }
        }
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[tile][j] = multiply_add(products[tile][j], scales[u][j >> 1], sums[tile][j]);
        }
      }
    }

#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 4; ++j) partial[warp][member * 2 + (j & 1)][(j >> 1) * 8 + group] = sums[tile][j];
      __syncthreads();
      for (int i = threadIdx.x; i < kRowTiles * 16 * 8; i += kThreads) {
        const int row_in_block = i % (kRowTiles * 16);
        const int m_in_tile = i / (kRowTiles * 16);
        const int m = tile * 8 + m_in_tile;
        const int n = row_block * kRowTiles * 16 + row_in_block;
        if (m < linear.M && n < linear.N) {
          float sum = 0.f;
#pragma unroll
          for (int s = 0; s < kSlices; ++s) sum += partial[s * kRowTiles + row_in_block / 16][m_in_tile][row_in_block % 16];
          sum *= linear.inverse_multiplier;
          if (gridDim.y == 1) {
            store_output<T>(linear, m, n, sum);
          } else {
            linear.parts[int64_t(blockIdx.y * linear.M + m) * linear.N + n] = sum;
          }
        }
      }
    }
  }
}

// Any K, any alignment, any M: a warp computes one column of y, four rows of x at a time, in float32 throughout.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) linear_any_kernel(PackedWeight weight, LinearPointers linear) {
  const BlockScales scales(weight);
  const int lane = threadIdx.x % 32;
  for (int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; n < linear.N; n += int64_t(gridDim.x) * kWarps) {
    for (int first_m = 0; first_m < linear.M; first_m += 4) {
      float sums[4] = {};
      for (int64_t k = lane; k < linear.K; k += 32) {
        const float value = decode_element(weight, scales, n * linear.K + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = first_m + i < linear.M ? first_m + i : linear.M - 1;
          sums[i] = multiply_add(value, T::widen(load_cached(linear.x + m * linear.K + k)), sums[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int lanes = 16; lanes > 0; lanes /= 2) sums[i] += shuffle_xor(sums[i], lanes);
        const int m = first_m + i;
        if (lane == 0 && m < linear.M) {
          store_output<T>(linear, m, n, sums[i]);
        }
      }
    }
  }
}

// Adds the parts of linear_kernel in their order, one element of y a thread.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) linear_finish_kernel(LinearPointers linear) {
  const int64_t numel = linear.M * linear.N;
  for (int64_t element = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x; element < numel;
       element += int64_t(gridDim.x) * kFinishThreads) {
    float sum = 0.f;
    for (int split = 0; split < linear.splits; ++split) sum += load_cached(linear.parts + split * numel + element);
    store_output<T>(linear, int(element / linear.N), element % linear.N, sum);
  }
}

// Which instance of linear_kernel serves a product.
struct Shape {
  int words, column_tiles, row_tiles;
  int64_t step() const { return 32 * words; }
};

Shape shape_for(const PackedWeight& weight, int64_t M) {
  const int words = weight.log2_block_size == 5 ? 1 : (weight.log2_block_size == 6 ? 2 : 4);
  if (M <= 8) return {words, 1, 1};
  if (words == 1 || M > 32) return {words, 8, 4};  // blocks of 32 are rare: two instances do for them
  if (M <= 16) return {words, 2, 2};
  return {2, 4, 2};  // with four words it would spill
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, int kWords, int kColumnTiles, int kRowTiles>
void launch_tiles(const PackedWeight& weight, const LinearPointers& linear, cudaStream_t stream) {
  // A CTA fills its table once, so it takes several row blocks when there are more of them than the device holds CTAs.
  const int64_t resident = ctas_per_multiprocessor(kColumnTiles) * int64_t(multiprocessor_count());
  const unsigned row_blocks = grid_size(divide_up(linear.N, 16 * kRowTiles), std::max(resident / linear.splits, int64_t(1)));
  SDA_LAUNCH((linear_kernel<T, kWords, kColumnTiles, kRowTiles>), dim3(row_blocks, linear.splits), kThreads, stream, weight, linear);
}

template <typename T, int kWords>
void launch_words(const PackedWeight& weight, const LinearPointers& linear, int column_tiles, cudaStream_t stream) {
  if (column_tiles == 1) return launch_tiles<T, kWords, 1, 1>(weight, linear, stream);
  if constexpr (kWords > 1) {
    if (column_tiles == 2) return launch_tiles<T, kWords, 2, 2>(weight, linear, stream);
  }
  if constexpr (kWords == 2) {
    if (column_tiles == 4) return launch_tiles<T, kWords, 4, 2>(weight, linear, stream);
  }
  launch_tiles<T, kWords, 8, 4>(weight, linear, stream);
}

template <typename T>
void launch(const PackedWeight& weight, const LinearPointers& linear, bool fast, cudaStream_t stream) {
  if (!fast) {
    const unsigned grid = grid_size(divide_up(linear.N, kWarps), int64_t(1) << 20);
    SDA_LAUNCH((linear_any_kernel<T>), grid, kThreads, stream, weight, linear);
    return;
  }
  const Shape shape = shape_for(weight, linear.M);
  if (shape.words == 1) {
    launch_words<T, 1>(weight, linear, shape.column_tiles, stream);
  } else if (shape.words == 2) {
    launch_words<T, 2>(weight, linear, shape.column_tiles, stream);
  } else {
    launch_words<T, 4>(weight, linear, shape.column_tiles, stream);
  }
  if (linear.splits > 1) {
    const unsigned grid = grid_size(divide_up(linear.M * linear.N, kFinishThreads), int64_t(1) << 20);
    SDA_LAUNCH((linear_finish_kernel<T>), grid, kFinishThreads, stream, linear);
  }
}

}  // namespace

bool linear_has_fast_path(const PackedWeight& weight, const LinearArguments& arguments) {
  const int64_t step = shape_for(weight, arguments.M).step(), limit = int64_t(1) << 31;
  const bool counted_in_32_bits = arguments.N * (arguments.K / step) < limit && 64 * arguments.K < limit;
  return arguments.M <= 64 && arguments.K % step == 0 && arguments.K > 0 && counted_in_32_bits &&
         is_aligned(weight.packed, 16) && is_aligned(arguments.x, 16);
}

int linear_splits(const PackedWeight& weight, const LinearArguments& arguments, int wanted) {
  if (!linear_has_fast_path(weight, arguments)) return 1;
  const Shape shape = shape_for(weight, arguments.M);
  const int64_t steps = arguments.K / shape.step();
  int64_t splits = wanted;
  if (wanted == 0) {
    // As many as give every multiprocessor two CTAs, if it holds two. A part keeps at least two rounds of loads: below
    // that it saves less time than the second kernel takes.
    const int64_t ctas = std::min(2, ctas_per_multiprocessor(shape.column_tiles)) * int64_t(multiprocessor_count());
    const int64_t rounds = divide_up(steps, kWarps / shape.row_tiles * steps_in_flight(shape.words, shape.column_tiles));
    splits = std::min(ctas / divide_up(arguments.N, 16 * shape.row_tiles), rounds / 2);
  }
  splits = std::min(std::max(splits, int64_t(1)), steps);
  return int(divide_up(steps, divide_up(steps, splits)));  // no part is empty
}

cudaError_t linear(const PackedWeight& weight, const LinearArguments& arguments, cudaStream_t stream) {
  if (arguments.M == 0 || arguments.N == 0) return cudaSuccess;
  const LinearPointers pointers{static_cast<const uint16_t*>(arguments.x),
                                static_cast<const uint16_t*>(arguments.bias),
                                arguments.hidden,
                                arguments.lora_B,
                                arguments.gates,
                                arguments.scaling,
                                arguments.gates == nullptr ? 1 : arguments.rank / arguments.num_experts,
                                static_cast<uint16_t*>(arguments.out),
                                arguments.parts,
                                arguments.splits,
                                arguments.code_multiplier,
                                1.f / arguments.code_multiplier,
                                arguments.lora_kind == ScalarKind::kFloat32,
                                arguments.hidden == nullptr ? 0 : arguments.rank,
                                int(arguments.M),
                                arguments.N,
                                arguments.K};
  const bool fast = linear_has_fast_path(weight, arguments);
  if (arguments.kind == ScalarKind::kBFloat16) {
    launch<BFloat16>(weight, pointers, fast, stream);
  } else {
    launch<Float16>(weight, pointers, fast, stream);
  }
  return cudaGetLastError();
}

}  // namespace sda
