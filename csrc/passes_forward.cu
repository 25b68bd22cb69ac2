// The two low-rank passes of forward: h = dropout(x) A^T, and (h * G) B^T added to y in place or written before y is.
//
// project: the warps of a CTA share 64 rows and split the columns of x; their sums meet in shared memory, in a fixed order.
// expand: a warp keeps the part of B that belongs to its 32 columns in registers and goes down the rows.
#include <algorithm>

#include "passes.cuh"

namespace sda {
namespace {

constexpr int kProjectThreads = 512;
constexpr int kProjectWarps = kProjectThreads / 32;
constexpr int kProjectRows = 64;

// Tiles of 16 rows of a warp; the warps below it read the same columns, so that A comes from the first-level cache.
__host__ __device__ constexpr int project_tiles(int rank_tiles) { return rank_tiles <= 4 ? 2 : 1; }
__host__ __device__ constexpr int project_slices(int rank_tiles) {
  return kProjectWarps * project_tiles(rank_tiles) * 16 / kProjectRows;
}

constexpr int kExpandThreads = 256;
constexpr int kExpandRows = 64;
constexpr int kExpandColumns = kExpandThreads / 32 * kWarpColumns;

template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kProjectThreads) project_kernel(ProjectArguments arguments) {
  constexpr int kTiles = project_tiles(kRankTiles), kSlices = project_slices(kRankTiles);
  constexpr int kWarpRows = kTiles * 16, kRowGroups = kProjectRows / kWarpRows;
  SDA_SHARED float partial[kProjectWarps][kWarpRows * 8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const int slice = warp / kRowGroups, first_row = blockIdx.x * kProjectRows + warp % kRowGroups * kWarpRows;
  const bool is_float32 = arguments.lora_kind == ScalarKind::kFloat32;
  const Dropout dropout(arguments.dropout, arguments.K);
  const int steps = divide_up(arguments.K, kWarpColumns);
  const int steps_per_split = divide_up(steps, int(gridDim.y));
  const int last_step = min(steps, (int(blockIdx.y) + 1) * steps_per_split);

  const auto load = [&](int step, uint4(&values)[kTiles][2]) {
    const int column = step * kWarpColumns + member * 8;
    load_tiles(values, step < last_step && column < arguments.K, arguments.x, arguments.x_stride, first_row + group,
               arguments.M, column);
  };

  float sums[kRankTiles][kTiles][4] = {};
  int step = int(blockIdx.y) * steps_per_split + slice;
  uint4 values[kTiles][2], following[kTiles][2];
  load(step, values);
  for (; step < last_step; step += kSlices) {
    load(step + kSlices, following);
    const int column = step * kWarpColumns + member * 8;
    if (dropout.active) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 words = dropout.words(first_row + tile * 16 + half * 8 + group, column);
          values[tile][half] = dropout.masked(values[tile][half], words);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRankTiles; ++r) {
      const int rank = r * 8 + group;
      const bool inside = rank < arguments.R && column < arguments.K;
      const uint4 factor = inside ? lora_row<T>(arguments.lora_A, int64_t(rank) * arguments.K + column, is_float32)
                                  : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply_rows<T>(sums[r][tile], values[tile], factor);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) values[tile][half] = following[tile][half];
    }
  }

  const int row_in_block = threadIdx.x / 8, rank_in_tile = threadIdx.x % 8;  // of the sum that this thread finishes
  const int row = blockIdx.x * kProjectRows + row_in_block;
  float* out = arguments.h + row * arguments.h_stride;
  if (arguments.splits > 1) out = arguments.parts + (int64_t(blockIdx.y) * arguments.M + row) * arguments.R;
#pragma unroll
  for (int r = 0; r < kRankTiles; ++r) {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partial[warp][(tile * 16 + i / 2 * 8 + group) * 8 + member * 2 + i % 2] = sums[r][tile][i];
      }
    }
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      sum += partial[s * kRowGroups + row_in_block / kWarpRows][row_in_block % kWarpRows * 8 + rank_in_tile];
    }
    const int rank = r * 8 + rank_in_tile;
    if (row < arguments.M && rank < arguments.R) out[rank] = sum * dropout.scale;
  }
}

template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kExpandThreads, 2) expand_kernel(ExpandArguments arguments, int blocks_per_chunk) {
  constexpr int kRanks = kRankTiles * 8, kWords = fragment_row_words(kRanks);
  SDA_SHARED uint32_t gated[2][kExpandRows][kWords];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  // CTAs that share rows follow each other, so that h and the gates stay in the cache.
  const int column_blocks = divide_up(arguments.N, kExpandColumns);
  const int first_column = blockIdx.x % column_blocks * kExpandColumns + warp * kWarpColumns;
  const int column = first_column + member * 8;
  const bool is_column = column < arguments.N;
  const int first_block = blockIdx.x / column_blocks * blocks_per_chunk;
  const int last_block = min(first_block + blocks_per_chunk, divide_up(arguments.M, kExpandRows));
  const Dropout dropout(arguments.dropout, arguments.N);

  uint32_t factor[kRankTiles][4];
  load_expanding<T>(factor, arguments.lora_B, arguments.lora_kind == ScalarKind::kFloat32, arguments.lora_stride_column,
                    arguments.lora_stride_rank, first_column, arguments.N, arguments.R, group, member);
  float bias[4][2] = {};  // where the sums start
  if (arguments.bias != nullptr && is_column) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bias[i / 2][i % 2] = T::widen(load_cached(static_cast<const uint16_t*>(arguments.bias) + column + i));
    }
  }
  const LowRankRows low_rank{arguments.h, arguments.h_stride, arguments.gate, arguments.M, arguments.R};
  StagedRows<kExpandThreads, kExpandRows, kRanks> staged(low_rank, 0);
  for (int block = first_block; block < last_block; ++block) {
    uint32_t(&rows)[kExpandRows][kWords] = gated[block & 1];
    const int first_row = block * kExpandRows + group;
    uint4 before[kExpandRows / 16][2];
    load_tiles(before, arguments.adds && is_column, arguments.y, arguments.y_stride, first_row, arguments.M, column);
    staged.load(low_rank, 0, block);
    staged.template store<T>([&](int row, int rank, uint16_t bits) { store_half(rows[row], rank, bits); });
    // Two buffers: whoever is here has left the block before, so that the next one may be written.
    __syncthreads();
    uint16_t* y = static_cast<uint16_t*>(arguments.y) + first_row * arguments.y_stride + column;
#pragma unroll
    for (int tile = 0; tile < kExpandRows / 16; ++tile) {
      float update[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) update[j][i] = bias[j][i % 2];
      }
      expand_rows<T, kRankTiles, kWords>(update, rows + tile * 16, factor, group, member);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * 16 + half * 8;
        const uint4 words = dropout.active ? dropout.words(first_row + row, column) : uint4{0, 0, 0, 0};
        if (is_column && first_row + row < arguments.M) {
          const uint4 result = updated<T>(update, half, dropout, words, before[tile][half]);
          *reinterpret_cast<uint4*>(y + row * arguments.y_stride) = result;
        }
      }
    }
  }
}

template <typename T, int kRankTiles>
void launch_project(const ProjectArguments& arguments, cudaStream_t stream) {
  const dim3 grid(divide_up(arguments.M, kProjectRows), arguments.splits);
  SDA_LAUNCH((project_kernel<T, kRankTiles>), grid, kProjectThreads, stream, arguments);
}

template <typename T>
void launch_project(const ProjectArguments& arguments, cudaStream_t stream) {
  if (arguments.R <= 8) return launch_project<T, 1>(arguments, stream);
  if (arguments.R <= 16) return launch_project<T, 2>(arguments, stream);
  if (arguments.R <= 32) return launch_project<T, 4>(arguments, stream);
  launch_project<T, 8>(arguments, stream);
}

template <typename T, int kRankTiles>
void launch_expand(const ExpandArguments& arguments, cudaStream_t stream) {
  const int column_blocks = divide_up(arguments.N, kExpandColumns), row_blocks = divide_up(arguments.M, kExpandRows);
  // Four waves of two CTAs on each multiprocessor: B is read once for several blocks of rows, and the last wave is short.
  const int chunks = chunks_of_rows(row_blocks, column_blocks, 8 * multiprocessor_count(), 0);
  SDA_LAUNCH((expand_kernel<T, kRankTiles>), unsigned(column_blocks) * chunks, kExpandThreads, stream, arguments,
             divide_up(row_blocks, chunks));
}

template <typename T>
void launch_expand(const ExpandArguments& arguments, cudaStream_t stream) {
  if (arguments.R <= 8) return launch_expand<T, 1>(arguments, stream);
  if (arguments.R <= 16) return launch_expand<T, 2>(arguments, stream);
  if (arguments.R <= 32) return launch_expand<T, 4>(arguments, stream);
  launch_expand<T, 8>(arguments, stream);
}

}  // namespace

int project_splits(const ProjectArguments& arguments, int wanted) {
  const int steps = divide_up(arguments.K, kWarpColumns);
  // A part keeps two steps for every warp: below that it saves less than adding the parts takes.
  const int slices = project_slices(divide_up(arguments.R, 8));
  int splits = wanted;
  if (wanted <= 0) {
    splits = std::min(multiprocessor_count() / std::max(divide_up(arguments.M, kProjectRows), 1), steps / (2 * slices));
  }
  splits = std::min(splits, steps);
  return splits <= 1 ? 1 : divide_up(steps, divide_up(steps, splits));
}

cudaError_t project(const ProjectArguments& arguments, cudaStream_t stream) {
  if (arguments.M == 0 || arguments.R == 0) return cudaSuccess;
  if (arguments.kind == ScalarKind::kBFloat16) {
    launch_project<BFloat16>(arguments, stream);
  } else {
    launch_project<Float16>(arguments, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || arguments.splits == 1) return error;
  return add_parts(arguments.parts, arguments.splits, arguments.M, arguments.R, arguments.h, arguments.h_stride, stream);
}

cudaError_t expand(const ExpandArguments& arguments, cudaStream_t stream) {
  if (arguments.M == 0 || arguments.N == 0) return cudaSuccess;
  if (arguments.kind == ScalarKind::kBFloat16) {
    launch_expand<BFloat16>(arguments, stream);
  } else {
    launch_expand<Float16>(arguments, stream);
  }
  return cudaGetLastError();
}

}  // namespace sda
