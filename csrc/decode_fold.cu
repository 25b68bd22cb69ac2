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

__device__ __forceinline__ int clamp_to(int index, int size) { return index < size ? index : size - 1; }

// Numbering of the columns: of the 32 in a half, lane `member` of every group of four decodes 8 * member ... + 7. Its
// accumulators are columns 2 * member and + 1 of matrix tiles 0..3, so row n of B in tile p is column 8 * (n / 2) + 2p + n % 2.
template <typename Out, typename Lora>
__global__ void __launch_bounds__(kThreads, 2) decode_fold_kernel(PackedWeight weight, FoldPointers fold, uint16_t* out) {
  SDA_SHARED float code[16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const unsigned column_tiles = (fold.columns + kTileColumns - 1) / kTileColumns;
  const int first_row = blockIdx.x / column_tiles * kTileRows + warp / kColumnWarps * kWarpRows;
  const int first_column = blockIdx.x % column_tiles * kTileColumns + warp % kColumnWarps * kWarpColumns;
  if (threadIdx.x < 16) code[threadIdx.x] = load_cached(weight.code + threadIdx.x);

  int rows[4];     // of this lane; clamped, as the stores alone are masked
  int columns[2];  // where the two groups of 32 columns start
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = clamp_to(first_row + i * 8 + group, fold.rows);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    columns[half] = first_column + half * 32 < fold.columns ? first_column + half * 32 : 0;
  }

  uint32_t words[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t element = int64_t(rows[i]) * fold.columns + columns[half] + member * 8;
      words[i][half] = load_cached(reinterpret_cast<const uint32_t*>(weight.packed + (element >> 1)));
    }
  }

  float sums[2][8][4] = {};  // [row tile of 16][column tile of 8][accumulators]
  for (int first_rank = 0; first_rank < fold.rank; first_rank += 8) {
    // A rank beyond the last one reads the last and is multiplied by zero.
    const int rank0 = clamp_to(first_rank + member, fold.rank), rank1 = clamp_to(first_rank + member + 4, fold.rank);
    const float gate0 = first_rank + member < fold.rank ? scaled_gate(fold, rank0) : 0.f;
    const float gate1 = first_rank + member + 4 < fold.rank ? scaled_gate(fold, rank1) : 0.f;
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split split0 = split_tf32(multiply_rounded(gate0, lora_value<Lora>(fold.lora_B, rows[i] * fold.rank + rank0)));
      const Split split1 = split_tf32(multiply_rounded(gate1, lora_value<Lora>(fold.lora_B, rows[i] * fold.rank + rank1)));
      high[i / 2][i % 2] = split0.high, low[i / 2][i % 2] = split0.low;
      high[i / 2][i % 2 + 2] = split1.high, low[i / 2][i % 2 + 2] = split1.low;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = columns[half] + group / 2 * 8 + group % 2;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const Split a0 = split_tf32(lora_value<Lora>(fold.lora_A, rank0 * fold.columns + column + 2 * pair));
        const Split a1 = split_tf32(lora_value<Lora>(fold.lora_A, rank1 * fold.columns + column + 2 * pair));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float(&sum)[4] = sums[tile][half * 4 + pair];
          mma_tf32_16x8x8(sum, low[tile], a0.high, a1.high);
          mma_tf32_16x8x8(sum, high[tile], a0.low, a1.low);
          mma_tf32_16x8x8(sum, high[tile], a0.high, a1.high);
        }
      }
    }
  }
  __syncthreads();

  const uint8_t* code_bytes = reinterpret_cast<const uint8_t*>(code);
  const BlockScales block_scales(weight);
  // 32 neighbouring columns share a block: a lane fetches the two scales of one row for all lanes.
  float row_scales[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t element = int64_t(clamp_to(first_row + lane, fold.rows)) * fold.columns + columns[half];
    row_scales[half] = block_scales.at(element >> weight.log2_block_size);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = shuffle_from(row_scales[half], i * 8 + group);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float update = sums[i / 2][half * 4 + j / 2][(i % 2) * 2 + j % 2];
        values[j] = multiply_add(*reinterpret_cast<const float*>(code_bytes + nibble_offset(words[i][half], j)), scale, update);
      }
      if (first_row + i * 8 + group < fold.rows && first_column + half * 32 < fold.columns) {
        const int64_t element = int64_t(rows[i]) * fold.columns + columns[half] + member * 8;
        *reinterpret_cast<uint4*>(out + element) = uint4{Out::pack(values[0], values[1]), Out::pack(values[2], values[3]),
                                                         Out::pack(values[4], values[5]), Out::pack(values[6], values[7])};
      }
    }
  }
}

// Any K and any alignment, one element a thread.
template <typename Out, typename Lora>
__global__ void __launch_bounds__(kThreads) decode_fold_any_kernel(PackedWeight weight, FoldPointers fold, uint16_t* out) {
  const BlockScales scales(weight);
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
    out[element] = Out::round(multiply_add(code, scales.at(element >> weight.log2_block_size), sum));
  }
}

template <typename Out, typename Lora>
cudaError_t launch(const PackedWeight& weight, const FoldPointers& fold, uint16_t* out, cudaStream_t stream) {
  const unsigned tiles = unsigned(fold.rows + kTileRows - 1) / kTileRows *
                         (unsigned(fold.columns + kTileColumns - 1) / kTileColumns);
  if (fold.columns % 32 == 0 && is_aligned(weight.packed, 4) && is_aligned(out, 16)) {
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
