// 4-bit decode with the rank-R update of one modality added in float32 before the one rounding.
//
// A warp takes 32 rows by 64 columns. The update is a product of a [32, R] and an [R, 64] matrix on the tensor cores, each
// float32 factor split into two tf32 parts (three products: 21 bits or better). The tile's columns are numbered so that the
// accumulators of a lane are eight neighbouring columns: one packed word in, one 16-byte store out, nothing exchanged.
#include "launchers.h"

namespace sda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpRows = 32;
constexpr int kWarpColumns = 64;
constexpr int kColumnWarps = 4;
constexpr int kTileRows = kWarpRows * (kThreads / 32 / kColumnWarps);
constexpr int kTileColumns = kWarpColumns * kColumnWarps;

struct FoldPointers {
  const void* lora_A;
  const void* lora_B;
  const float* gates;
  float scaling;
  int rank;
  int ranks_per_expert;
  int rows, columns;
};

template <typename Lora>
__device__ __forceinline__ float lora_value(const void* matrix, int index) {
  return Lora::widen(load_cached(static_cast<const typename Lora::Storage*>(matrix) + index));
}

__device__ __forceinline__ float scaled_gate(const FoldPointers& fold, int rank_index) {
  return multiply_rounded(fold.scaling, load_cached(fold.gates + rank_index / fold.ranks_per_expert));
}

struct Split {
  uint32_t high, low;
};

__device__ __forceinline__ Split split_tf32(float value) {
  const uint32_t high = float_bits(value) & 0xFFFFE000u;
  return {high, float_bits(value - bits_float(high))};
}

// Column (within a lane's group of 32) that row-of-B `n` of matrix tile `tile` (0..3) stands for: lanes 4g..4g+3 end up
// with columns 8t..8t+7, two from each tile.
__device__ __forceinline__ int permuted_column(int tile, int n) { return (n >> 1) * 8 + tile * 2 + (n & 1); }

template <typename Out, typename Lora>
__global__ void __launch_bounds__(kThreads, 2) decode_fold_kernel(PackedWeight weight, FoldPointers fold, uint16_t* out) {
  SDA_SHARED float code[16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const unsigned column_tiles = (fold.columns + kTileColumns - 1) / kTileColumns;
  const int first_row = blockIdx.x / column_tiles * kTileRows + warp / kColumnWarps * kWarpRows;
  const int first_column = blockIdx.x % column_tiles * kTileColumns + warp % kColumnWarps * kWarpColumns;
  if (threadIdx.x < 16) code[threadIdx.x] = load_cached(weight.code + threadIdx.x);

  uint32_t words[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + i * 8 + group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first_column + half * 32 + member * 8;
      const bool inside = row < fold.rows && column < fold.columns;
      const int64_t element = inside ? int64_t(row) * fold.columns + column : 0;
      words[i][half] = load_cached(reinterpret_cast<const uint32_t*>(weight.packed + (element >> 1)));
    }
  }

  float sums[2][8][4] = {};  // [row tile of 16][column tile of 8][accumulators]
  for (int first_rank = 0; first_rank < fold.rank; first_rank += 8) {
    const int rank0 = first_rank + member, rank1 = first_rank + member + 4;
    const bool has_rank0 = rank0 < fold.rank, has_rank1 = rank1 < fold.rank;
    const float gate0 = has_rank0 ? scaled_gate(fold, rank0) : 0.f, gate1 = has_rank1 ? scaled_gate(fold, rank1) : 0.f;
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + tile * 16 + (i & 1) * 8 + group;
        const bool inside = row < fold.rows && (i < 2 ? has_rank0 : has_rank1);
        const float b = inside ? lora_value<Lora>(fold.lora_B, row * fold.rank + (i < 2 ? rank0 : rank1)) : 0.f;
        const Split split = split_tf32(multiply_rounded(i < 2 ? gate0 : gate1, b));
        high[tile][i] = split.high;
        low[tile][i] = split.low;
      }
    }
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      const int column = first_column + (tile >> 2) * 32 + permuted_column(tile & 3, group);
      const bool inside = column < fold.columns;
      const Split a0 =
          split_tf32(inside && has_rank0 ? lora_value<Lora>(fold.lora_A, rank0 * fold.columns + column) : 0.f);
      const Split a1 =
          split_tf32(inside && has_rank1 ? lora_value<Lora>(fold.lora_A, rank1 * fold.columns + column) : 0.f);
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
        mma_tf32_16x8x8(sums[rows][tile], low[rows], a0.high, a1.high);
        mma_tf32_16x8x8(sums[rows][tile], high[rows], a0.low, a1.low);
        mma_tf32_16x8x8(sums[rows][tile], high[rows], a0.high, a1.high);
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + i * 8 + group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first_column + half * 32 + member * 8;
      const int64_t element = int64_t(row) * fold.columns + column;
      if (row >= fold.rows || column >= fold.columns) continue;
      const float scale = block_scale(weight, element >> weight.log2_block_size);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float update = sums[i >> 1][half * 4 + (j >> 1)][(i & 1) * 2 + (j & 1)];
        values[j] = multiply_add(code[(words[i][half] >> nibble_shift(j)) & 15], scale, update);
      }
      *reinterpret_cast<uint4*>(out + element) = uint4{Out::pack(values[0], values[1]), Out::pack(values[2], values[3]),
                                                       Out::pack(values[4], values[5]), Out::pack(values[6], values[7])};
    }
  }
}

// Any K and any alignment, one element a thread.
template <typename Out, typename Lora>
__global__ void __launch_bounds__(kThreads) decode_fold_any_kernel(PackedWeight weight, FoldPointers fold, uint16_t* out) {
  for (int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x; element < weight.numel;
       element += int64_t(gridDim.x) * kThreads) {
    const int row = int(element / fold.columns);
    const int column = int(element - int64_t(row) * fold.columns);
    float sum = 0.f;
    for (int r = 0; r < fold.rank; ++r) {
      const float b = multiply_rounded(scaled_gate(fold, r), lora_value<Lora>(fold.lora_B, row * fold.rank + r));
      sum = multiply_add(b, lora_value<Lora>(fold.lora_A, r * fold.columns + column), sum);
    }
    const float code = load_cached(weight.code + nibble_at(weight, element));
    out[element] = Out::round(multiply_add(code, block_scale(weight, element >> weight.log2_block_size), sum));
  }
}

template <typename Out, typename Lora>
cudaError_t launch(const PackedWeight& weight, const FoldPointers& fold, uint16_t* out, cudaStream_t stream) {
  const unsigned tiles = unsigned(fold.rows + kTileRows - 1) / kTileRows *
                         (unsigned(fold.columns + kTileColumns - 1) / kTileColumns);
  if (fold.columns % 8 == 0 && is_aligned(weight.packed, 4) && is_aligned(out, 16)) {
    SDA_LAUNCH((decode_fold_kernel<Out, Lora>), tiles, kThreads, stream, weight, fold, out);
  } else {
    const unsigned grid = grid_size((weight.numel + kThreads - 1) / kThreads, int64_t(1) << 20);
    SDA_LAUNCH((decode_fold_any_kernel<Out, Lora>), grid, kThreads, stream, weight, fold, out);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t decode_fold(const PackedWeight& weight, const FoldArguments& arguments, void* out, ScalarKind out_kind,
                        cudaStream_t stream) {
  if (weight.numel == 0) return cudaSuccess;
  const FoldPointers fold{arguments.lora_A, arguments.lora_B,
                          arguments.gates,  arguments.scaling,
                          arguments.rank,   arguments.rank / arguments.num_experts,
                          int(arguments.rows), int(arguments.columns)};
  uint16_t* target = static_cast<uint16_t*>(out);
  const bool wide = arguments.lora_kind == ScalarKind::kFloat32;
  if (out_kind == ScalarKind::kBFloat16) {
    return wide ? launch<BFloat16, Float32>(weight, fold, target, stream)
                : launch<BFloat16, BFloat16>(weight, fold, target, stream);
  }
  return wide ? launch<Float16, Float32>(weight, fold, target, stream)
              : launch<Float16, BFloat16>(weight, fold, target, stream);
}

}  // namespace sda
