// 4-bit decode with the rank-R update of one modality added in float32 before the one rounding.
//
// A warp takes 32 rows by 64 columns at a time and goes down the rows. The update is a product of a [32, R] and an [R, 64]
// matrix on the tensor cores, each float32 factor split into two tf32 parts (three products: 21 bits or better). A, times the
// gates, is laid out once for the whole CTA as the fragments that its lanes multiply.
//
// The ranks of a chunk of eight are numbered so that lane `member` of a group of four has the neighbours 2 * member and + 1.
// The tile's columns are numbered so that the accumulators of a lane are eight neighbouring columns of four rows, twice: one
// 16-byte store each. Codes come in 16 bytes a lane, through shared memory, from where each lane takes the words it needs.
// The sixteen codes lie in the lanes of a warp, and a shuffle looks one up: its index needs no mask.
//
// Of the next step a warp has the codes, the scales and (with eight ranks) its rows of B under way while it decodes.
#include <algorithm>

#include "launchers.h"

namespace sda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = 32;
constexpr int kWarpColumns = 64;
constexpr int kStagedPieces = 8;  // of A, each eight ranks by the columns of a warp: 2 KiB
constexpr int kMostSteps = 8;

struct FoldPointers {
  const void* lora_A;
  const void* lora_B;
  const float* gates;
  float scaling;
  int rank;
  int ranks_per_expert;
  int rows, columns;
};

struct FoldTiling {
  int log2_column_warps;  // of the eight warps of a CTA, so many share the rows
  int steps;              // tiles of rows a CTA goes through
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

__device__ __forceinline__ int clamp_to(int index, int size) { return min(index, size - 1); }

// Numbering of the columns: of the 32 in a half, lane `member` of every group of four decodes 8 * member ... + 7. Its
// accumulators are columns 2 * member and + 1 of matrix tiles 0..3, so row n of B in tile p is column 8 * (n / 2) + 2p + n % 2.
template <typename Out, typename Lora, bool kEightRanks>
__global__ void __launch_bounds__(kThreads, 2)
    decode_fold_kernel(PackedWeight weight, FoldPointers fold, FoldTiling tiling, uint16_t* out) {
  SDA_SHARED uint4 factors[kStagedPieces * 4][32];   // [piece and two tiles of eight columns][lane]
  SDA_SHARED uint4 codes[kWarps][2][kWarpRows * 2];  // [warp][stage][row, half]
  SDA_SHARED float nested_code[256];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const int column_warps = 1 << tiling.log2_column_warps;
  const int cta_columns = kWarpColumns << tiling.log2_column_warps;
  const int cta_rows = (kWarps * kWarpRows) >> tiling.log2_column_warps;
  const int staged_chunks = kStagedPieces >> tiling.log2_column_warps;  // of eight ranks
  const unsigned column_tiles = (fold.columns + cta_columns - 1) / cta_columns;
  const int cta_row = blockIdx.x / column_tiles * tiling.steps * cta_rows;
  const int cta_column = blockIdx.x % column_tiles * cta_columns;
  const int column_warp = warp % column_warps;
  const int row_of_warp = (warp >> tiling.log2_column_warps) * kWarpRows;
  const int first_column = cta_column + column_warp * kWarpColumns;
  const auto half_start = [&](int start) { return start < fold.columns ? start : 0; };  // the stores alone are masked
  const int columns[2] = {half_start(first_column), half_start(first_column + 32)};

  const auto copy_codes = [&](int first_row, int stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = i * 16 + lane / 2, half = lane % 2;
      const int64_t element = int64_t(clamp_to(first_row + row, fold.rows)) * fold.columns + (half ? columns[1] : columns[0]);
      copy_async(&codes[warp][stage][row * 2 + (half ^ (row >> 2 & 1))], weight.packed + (element >> 1));
    }
  };
  // 32 neighbouring columns share a block: a lane fetches the two scales of one row for all lanes.
  const BlockScales scales(weight);
  const bool one_block = weight.log2_block_size >= 6 && fold.columns % 64 == 0;
  LoadedScale loaded[2];
  const auto load_scales = [&](int first_row) {
    const int64_t element = int64_t(clamp_to(first_row + lane, fold.rows)) * fold.columns;
    loaded[0] = loaded[1] = scales.load((element + columns[0]) >> weight.log2_block_size);
    if (!one_block) loaded[1] = scales.load((element + columns[1]) >> weight.log2_block_size);
  };
  float ranks[4][2];  // of B, of a chunk
  const auto load_ranks = [&](int first_row, int first_rank) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = clamp_to(first_row + i * 8 + group, fold.rows) * fold.rank;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int rank = first_rank + member * 2 + j;
        ranks[i][j] = lora_value<Lora>(fold.lora_B, row + (kEightRanks ? rank : clamp_to(rank, fold.rank)));
      }
    }
  };
  copy_codes(cta_row + row_of_warp, 0);
  commit_copies();
  load_scales(cta_row + row_of_warp);
  if (kEightRanks) load_ranks(cta_row + row_of_warp, 0);

  // The gates of a lane's two ranks; a rank beyond the last one is the last, times zero.
  const auto gates_of = [&](int first_rank, float(&gates)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int rank = first_rank + member * 2 + j;
      gates[j] = kEightRanks || rank < fold.rank ? scaled_gate(fold, rank) : 0.f;
    }
  };
  const auto stage_unit = [&](int unit, int first_rank, const float(&gates)[2]) {
    const int start = cta_column + unit / 4 % column_warps * kWarpColumns + unit % 4 / 2 * 32;
    const int column = half_start(start) + group / 2 * 8 + group % 2 + unit % 2 * 4;
    uint32_t values[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int rank = first_rank + member * 2 + j;
      const int index = (kEightRanks ? rank : clamp_to(rank, fold.rank)) * fold.columns + column;
      values[j] = float_bits(multiply_rounded(gates[j], lora_value<Lora>(fold.lora_A, index)));
      values[j + 2] = float_bits(multiply_rounded(gates[j], lora_value<Lora>(fold.lora_A, index + 2)));
    }
    factors[unit][lane] = uint4{values[0], values[1], values[2], values[3]};
  };
  const auto stage_factors = [&](int first_rank) {
    float gates[2];
    if (kEightRanks) {
      gates_of(0, gates);
#pragma unroll
      for (int unit = warp; unit < warp + 2 * kWarps; unit += kWarps) {
        if (unit < column_warps * 4) stage_unit(unit, 0, gates);
      }
    } else {
      const int chunks = min((fold.rank - first_rank + 7) / 8, staged_chunks);
      for (int unit = warp; unit < chunks * column_warps * 4; unit += kWarps) {
        const int rank = first_rank + (unit / 4 >> tiling.log2_column_warps) * 8;
        gates_of(rank, gates);
        stage_unit(unit, rank, gates);
      }
    }
  };
  const LaneTable code(load_cached(weight.code + lane % 16));
  if (weight.nested_code != nullptr) nested_code[threadIdx.x] = load_cached(weight.nested_code + threadIdx.x);
  stage_factors(0);
  __syncthreads();

  // Where the words of either half are: swapped in every second four rows, so that no two lanes meet in a bank.
  const int first = (group >> 2) * 4, second = 4 - first;
  for (int step = 0; step < tiling.steps && cta_row + step * cta_rows < fold.rows; ++step) {
    const int first_row = cta_row + step * cta_rows + row_of_warp;
    const bool more = step + 1 < tiling.steps && cta_row + (step + 1) * cta_rows < fold.rows;
    if (more) copy_codes(first_row + cta_rows, (step + 1) % 2);
    commit_copies();

    float sums[2][8][4] = {};  // [row tile of 16][column tile of 8][accumulators]
    for (int first_rank = 0, chunk = 0; kEightRanks ? chunk < 1 : first_rank < fold.rank; first_rank += 8, ++chunk) {
      if (!kEightRanks && (chunk == staged_chunks || (chunk == 0 && step > 0 && fold.rank > staged_chunks * 8))) {
        chunk = 0;
        __syncthreads();
        stage_factors(first_rank);
        __syncthreads();
      }
      if (!kEightRanks) load_ranks(first_row, first_rank);
      uint32_t high[2][4], low[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Split split = split_tf32(ranks[i / 2][i % 2]);
        high[i / 4][i / 2 % 2 + i % 2 * 2] = split.high, low[i / 4][i / 2 % 2 + i % 2 * 2] = split.low;
      }
#pragma unroll
      for (int tiles = 0; tiles < 4; ++tiles) {
        const uint4 factor = factors[(chunk * column_warps + column_warp) * 4 + tiles][lane];
        const Split a[2][2] = {{split_tf32(bits_float(factor.x)), split_tf32(bits_float(factor.y))},
                               {split_tf32(bits_float(factor.z)), split_tf32(bits_float(factor.w))}};
#pragma unroll
        for (int product = Lora::kExactInTf32 ? 1 : 0; product < 3; ++product) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Split(&pair)[2] = a[i / 2];
            float(&sum)[4] = sums[i % 2][tiles * 2 + i / 2];
            if (product == 0) mma_tf32_16x8x8(sum, low[i % 2], pair[0].high, pair[1].high);
            if (product == 1) mma_tf32_16x8x8(sum, high[i % 2], pair[0].low, pair[1].low);
            if (product == 2) mma_tf32_16x8x8(sum, high[i % 2], pair[0].high, pair[1].high);
          }
        }
      }
    }

    wait_for_copies<1>();
    sync_warp();
    const float row_scales[2] = {scales.value(loaded[0], nested_code), scales.value(loaded[1], nested_code)};
    if (more) {
      load_scales(first_row + cta_rows);
      if (kEightRanks) load_ranks(first_row + cta_rows, 0);
    }
    const uint32_t* words = reinterpret_cast<const uint32_t*>(codes[warp][step % 2]) + group * 8 + member;
    uint16_t* target = out + int64_t(first_row + group) * fold.columns + first_column + member * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i, target += int64_t(8) * fold.columns) {
      const int row = i * 8 + group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = shuffle_from(row_scales[half], row);
        const uint32_t word = words[i * 64 + (half ? second : first)];
        float values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float update = sums[i / 2][half * 4 + j / 2][(i % 2) * 2 + j % 2];
          values[j] = multiply_add(code.at(nibble_in_low_bits(word, j)), scale, update);
        }
        const uint4 packed{Out::pack(values[0], values[1]), Out::pack(values[2], values[3]), Out::pack(values[4], values[5]),
                           Out::pack(values[6], values[7])};
        if (first_row + row < fold.rows && first_column + half * 32 < fold.columns) store_wide(target + half * 32, packed);
      }
    }
    sync_warp();
  }
  wait_for_copies<0>();
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
      const float a = multiply_rounded(scaled_gate(fold, r), lora_value<Lora>(fold.lora_A, r * fold.columns + column));
      sum = multiply_add(lora_value<Lora>(fold.lora_B, row * fold.rank + r), a, sum);
    }
    const float code = load_cached(weight.code + nibble_at(weight, element));
    out[element] = Out::round(multiply_add(code, scales.at(element >> weight.log2_block_size), sum));
  }
}

FoldTiling tiling_of(const FoldPointers& fold) {
  FoldTiling tiling{2, 1};
  const auto too_wide = [&](int log2) {
    return fold.rank > (kStagedPieces * 8 >> log2) || fold.columns <= (kWarpColumns << log2) / 2;
  };
  while (tiling.log2_column_warps > 0 && too_wide(tiling.log2_column_warps)) --tiling.log2_column_warps;
  return tiling;
}

template <typename Out, typename Lora>
cudaError_t launch(const PackedWeight& weight, const FoldPointers& fold, uint16_t* out, cudaStream_t stream) {
  if (fold.columns % 32 == 0 && is_aligned(weight.packed, 16) && is_aligned(out, 16)) {
    FoldTiling tiling = tiling_of(fold);
    const int cta_columns = kWarpColumns << tiling.log2_column_warps;
    const int cta_rows = (kWarps * kWarpRows) >> tiling.log2_column_warps;
    const int64_t column_tiles = (fold.columns + cta_columns - 1) / cta_columns;
    const int64_t row_tiles = (fold.rows + cta_rows - 1) / cta_rows;
    // Four rounds of CTAs or more: what the last one leaves idle, and the first one waits for, is then a small part.
    const int64_t rounds = column_tiles * row_tiles / (4 * 2 * multiprocessor_count());
    tiling.steps = int(std::max<int64_t>(1, std::min<int64_t>(rounds, kMostSteps)));
    const unsigned grid = unsigned(column_tiles * ((row_tiles + tiling.steps - 1) / tiling.steps));
    if (fold.rank == 8) {
      SDA_LAUNCH((decode_fold_kernel<Out, Lora, true>), grid, kThreads, stream, weight, fold, tiling, out);
    } else {
      SDA_LAUNCH((decode_fold_kernel<Out, Lora, false>), grid, kThreads, stream, weight, fold, tiling, out);
    }
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
