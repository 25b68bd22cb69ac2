// The two low-rank passes of backward, one over dy and one over x. A warp owns 32 columns and goes down the rows of its chunk:
// what it sums over rows stays in its registers, the factor for it is the transpose (movmatrix) of the registers it loaded.
//
// dy: dhg = dy B sums over columns, so the warps of a CTA meet in shared memory for every 16 rows, and CTAs write parts. A
// second kernel adds the parts of dhg, multiplies by the gates, sums for the gates' gradients, and adds the parts of dB.
// dx: dA = dh^T dropout(x), and dx updated with the same dropout samples.
#include <algorithm>

#include "passes.cuh"

namespace sda {
namespace {

constexpr int kDyThreads = 512;
constexpr int kDyWarps = kDyThreads / 32;
constexpr int kDyRows = 32;
constexpr int kDyColumns = kDyWarps * kWarpColumns;
constexpr int kDyRanks = 32;  // at most in one CTA: neighbours take the next ranks of the same dy, which is then in the L2

constexpr int kFinishThreads = 256;
constexpr int kFinishRows = 32;

constexpr int kDxThreads = 256;
constexpr int kDxColumns = kDxThreads / 32 * kWarpColumns;

__host__ __device__ constexpr int dx_rows(bool updates) { return updates ? 16 : 32; }

// sums[p][r] += values^T factor for 16 rows of the activations; factor is [rank][row] in shared memory, `first_word` where
// these rows start. sums[p][r][i] is column 8 (g / 2) + g % 2 + 2 (2p + i / 2), rank 8r + 2t + i % 2.
template <typename T, int kRankTiles, int kWords>
__device__ __forceinline__ void multiply_transposed(float (&sums)[2][kRankTiles][4], const uint4 (&values)[2],
                                                    uint32_t (*factor)[kWords], int first_word, int group, int member) {
  const uint32_t upper[4] = {transpose_8x8(values[0].x), transpose_8x8(values[0].y), transpose_8x8(values[0].z),
                             transpose_8x8(values[0].w)};
  const uint32_t lower[4] = {transpose_8x8(values[1].x), transpose_8x8(values[1].y), transpose_8x8(values[1].z),
                             transpose_8x8(values[1].w)};
#pragma unroll
  for (int r = 0; r < kRankTiles; ++r) {
    const uint32_t* row = factor[r * 8 + group] + first_word + member;
    const uint32_t b0 = row[0], b1 = row[4];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const uint32_t fragment[4] = {upper[2 * p], upper[2 * p + 1], lower[2 * p], lower[2 * p + 1]};
      mma_16x8x16<T>(sums[p][r], fragment, b0, b1);
    }
  }
}

// Writes the sums of multiply_transposed, times a scale.
template <int kRankTiles>
__device__ __forceinline__ void store_transposed(const float (&sums)[2][kRankTiles][4], float scale, float* out,
                                                 int64_t stride_column, int64_t stride_rank, int first_column, int width,
                                                 int first_rank, int R, int group, int member) {
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int r = 0; r < kRankTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first_column + group / 2 * 8 + group % 2 + 2 * (2 * p + i / 2);
        const int rank = first_rank + r * 8 + member * 2 + i % 2;
        if (column < width && rank < R) out[column * stride_column + rank * stride_rank] = sums[p][r][i] * scale;
      }
    }
  }
}

template <typename T, int kRankTiles>
__global__ void __launch_bounds__(kDyThreads) dy_kernel(DyArguments arguments, int blocks_per_chunk) {
  constexpr int kRanks = kRankTiles * 8, kWords = fragment_row_words(kDyRows);
  constexpr int kBuffers = kRankTiles <= 2 ? 2 : 1;
  static_assert(kRanks * 16 <= kDyThreads, "a thread finishes one sum");
  SDA_SHARED float partial[kBuffers][kDyWarps][kRanks * 16];
  SDA_SHARED uint32_t gated[2][kRanks][kWords];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const int rank_slices = divide_up(arguments.R, kRanks);
  const int first_rank = blockIdx.x % rank_slices * kRanks;
  const int column_block = blockIdx.x / rank_slices;
  const int first_column = column_block * kDyColumns + warp * kWarpColumns, column = first_column + member * 8;
  const bool is_column = column < arguments.N;
  const bool is_float32 = arguments.lora_kind == ScalarKind::kFloat32;
  const int first_block = blockIdx.y * blocks_per_chunk;
  const int last_block = min(first_block + blocks_per_chunk, divide_up(arguments.M, kDyRows));

  uint32_t lora_B[kRankTiles][4];  // columns 8t + 2j and 8t + 2j + 1 of rank 8r + g
#pragma unroll
  for (int r = 0; r < kRankTiles; ++r) {
    const int rank = first_rank + r * 8 + group;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t index = int64_t(column + 2 * j + i) * arguments.R + rank;
        pair[i] = is_column && rank < arguments.R ? lora_value<T>(arguments.lora_B, index, is_float32) : 0.f;
      }
      lora_B[r][j] = T::pack(pair[0], pair[1]);
    }
  }
  const auto load = [&](int block, uint4(&values)[kDyRows / 16][2]) {
    load_tiles(values, block < last_block && is_column, arguments.dy, arguments.dy_stride, block * kDyRows + group,
               arguments.M, column);
  };

  const LowRankRows low_rank{arguments.h, arguments.h_stride, arguments.gate, arguments.M, arguments.R};
  StagedRows<kDyThreads, kDyRows, kRanks> staged(low_rank, first_rank);
  float sums[2][kRankTiles][4] = {};
  uint4 values[kDyRows / 16][2], following[kDyRows / 16][2];
  load(first_block, values);
  if (arguments.dB_parts != nullptr) staged.load(low_rank, first_rank, first_block);
  for (int block = first_block; block < last_block; ++block) {
    load(block + 1, following);
    uint32_t(&factor)[kRanks][kWords] = gated[block & 1];
    if (arguments.dB_parts != nullptr) {
      staged.template store<T>([&](int row, int rank, uint16_t bits) { store_half(factor[rank], row, bits); });
      staged.load(low_rank, first_rank, block + 1);
    }
#pragma unroll
    for (int tile = 0; tile < kDyRows / 16; ++tile) {
      if (arguments.dhg_parts != nullptr) {
        float products[kRankTiles][4] = {};
#pragma unroll
        for (int r = 0; r < kRankTiles; ++r) {
          multiply_rows<T>(products[r], values[tile], uint4{lora_B[r][0], lora_B[r][1], lora_B[r][2], lora_B[r][3]});
        }
        if (kBuffers == 1) __syncthreads();  // the sums of the rows before are still read
        float* own = partial[tile % kBuffers][warp];
#pragma unroll
        for (int r = 0; r < kRankTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) own[r * 128 + (i / 2 * 8 + group) * 8 + member * 2 + i % 2] = products[r][i];
        }
        __syncthreads();
        const int i = threadIdx.x;  // of the sum that this thread finishes, if there are as many
        if (i < kRanks * 16) {
          float sum = 0.f;
#pragma unroll
          for (int w = 0; w < kDyWarps; ++w) sum += partial[tile % kBuffers][w][i];
          const int row = block * kDyRows + tile * 16 + i % 128 / 8, rank = first_rank + i / 128 * 8 + i % 8;
          if (row < arguments.M && rank < arguments.R) {
            arguments.dhg_parts[(int64_t(column_block) * arguments.M + row) * arguments.R + rank] = sum;
          }
        }
      } else if (tile == 0) {
        __syncthreads();
      }
      if (arguments.dB_parts != nullptr) {
        multiply_transposed<T, kRankTiles, kWords>(sums, values[tile], factor, tile * 8, group, member);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kDyRows / 16; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) values[tile][half] = following[tile][half];
    }
  }
  if (arguments.dB_parts != nullptr) {
    float* out = arguments.dB_parts + int64_t(blockIdx.y) * arguments.N * arguments.R;
    store_transposed<kRankTiles>(sums, 1.f, out, arguments.R, 1, first_column, arguments.N, first_rank, arguments.R, group,
                                 member);
  }
}

// The first gate_ctas CTAs: dhg, dh and the gates' gradients of 32 rows each; the others: dB.
__global__ void __launch_bounds__(kFinishThreads) dy_finish_kernel(DyArguments arguments, int gate_ctas) {
  SDA_SHARED float products[kFinishRows][kMaxPassRank];  // dhg * h
  SDA_SHARED float of_expert[kFinishRows][kMaxPassRank];
  if (int(blockIdx.x) >= gate_ctas) {
    const int64_t numel = int64_t(arguments.N) * arguments.R;
    for (int64_t element = int64_t(blockIdx.x - gate_ctas) * kFinishThreads + threadIdx.x; element < numel;
         element += int64_t(gridDim.x - gate_ctas) * kFinishThreads) {
      arguments.dB[element] = sum_of_parts(arguments.dB_parts + element, arguments.chunks, numel);
    }
    return;
  }
  const int R = arguments.R, E = arguments.gate.num_experts, ranks_per_expert = R / E;
  const int first_row = blockIdx.x * kFinishRows, rows = min(kFinishRows, arguments.M - first_row);
  const LowRankRows low_rank{arguments.h, arguments.h_stride, arguments.gate, arguments.M, R};
  const int64_t part_stride = int64_t(arguments.M) * R;
  for (int i = threadIdx.x; i < rows * R; i += kFinishThreads) {
    const int row = i / R, rank = i % R;
    const int64_t element = int64_t(first_row + row) * R + rank;
    const float dhg = sum_of_parts(arguments.dhg_parts + element, divide_up(arguments.N, kDyColumns), part_stride);
    if (arguments.dh != nullptr) {
      arguments.dh[(first_row + row) * arguments.dh_stride + rank] = dhg * low_rank.gate_at(first_row + row, rank / ranks_per_expert);
    }
    if (arguments.dgates != nullptr) {
      products[row][rank] = dhg * load_cached(arguments.h + (first_row + row) * arguments.h_stride + rank);
    }
  }
  if (arguments.dgates == nullptr) return;
  __syncthreads();
  const bool is_per_row = arguments.dgates_parts == nullptr;
  for (int i = threadIdx.x; i < rows * E; i += kFinishThreads) {
    const int row = i / E, expert = i % E;
    float sum = 0.f;
    for (int rank = 0; rank < ranks_per_expert; ++rank) sum += products[row][expert * ranks_per_expert + rank];
    sum *= arguments.gate.scaling;
    if (is_per_row) {
      arguments.dgates[int64_t(first_row + row) * E + expert] = sum;
    } else {
      of_expert[row][expert] = sum;
    }
  }
  if (is_per_row) return;
  __syncthreads();
  const int lines = arguments.gate.lines;
  for (int64_t i = threadIdx.x; i < int64_t(lines) * E; i += kFinishThreads) {
    const int line = int(i / E), expert = int(i % E);
    float sum = 0.f;
    for (int row = 0; row < rows; ++row) {
      if (low_rank.line(first_row + row) == line) sum += of_expert[row][expert];
    }
    arguments.dgates_parts[int64_t(blockIdx.x) * lines * E + i] = sum;
  }
}

template <typename T, int kRankTiles, bool kUpdates>
__global__ void __launch_bounds__(kDxThreads, 2) dx_kernel(DxArguments arguments, int blocks_per_chunk) {
  constexpr int kRanks = kRankTiles * 8, kRows = dx_rows(kUpdates), kTiles = kRows / 16;
  constexpr int kWords = fragment_row_words(kRows), kRowWords = fragment_row_words(kRanks);
  SDA_SHARED uint32_t by_rank[2][kRanks][kWords];
  SDA_SHARED uint32_t by_row[kUpdates ? 2 : 1][kUpdates ? kRows : 1][kRowWords];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, member = lane % 4;
  const int first_column = blockIdx.x * kDxColumns + warp * kWarpColumns, column = first_column + member * 8;
  const bool is_column = column < arguments.K;
  const int first_block = blockIdx.y * blocks_per_chunk;
  const int last_block = min(first_block + blocks_per_chunk, divide_up(arguments.M, kRows));
  const Dropout dropout(arguments.dropout, arguments.K);

  uint32_t lora_A[kUpdates ? kRankTiles : 1][4];
  if constexpr (kUpdates) {
    load_expanding<T>(lora_A, arguments.lora_A, arguments.lora_kind == ScalarKind::kFloat32, 1, arguments.K, first_column,
                      arguments.K, arguments.R, group, member);
  }
  const auto load = [&](int block, bool wanted, const void* matrix, int64_t stride, uint4(&values)[kTiles][2]) {
    load_tiles(values, wanted && block < last_block && is_column, matrix, stride, block * kRows + group, arguments.M, column);
  };

  const LowRankRows low_rank{arguments.dh, arguments.dh_stride, GateTable{}, arguments.M, arguments.R};
  StagedRows<kDxThreads, kRows, kRanks> staged(low_rank, 0);
  float sums[2][kRankTiles][4] = {};
  uint4 x[kTiles][2], following_x[kTiles][2], dx[kTiles][2], following_dx[kTiles][2];
  load(first_block, true, arguments.x, arguments.x_stride, x);
  if constexpr (kUpdates) load(first_block, arguments.adds, arguments.dx, arguments.dx_stride, dx);
  staged.load(low_rank, 0, first_block);
  for (int block = first_block; block < last_block; ++block) {
    load(block + 1, true, arguments.x, arguments.x_stride, following_x);
    if constexpr (kUpdates) load(block + 1, arguments.adds, arguments.dx, arguments.dx_stride, following_dx);
    uint32_t(&columns)[kRanks][kWords] = by_rank[block & 1];
    staged.template store<T>([&](int row, int rank, uint16_t bits) {
      store_half(columns[rank], row, bits);
      if constexpr (kUpdates) store_half(by_row[block & 1][row], rank, bits);
    });
    staged.load(low_rank, 0, block + 1);
    // Two buffers: whoever is here has left the block before, so that the next one may be written.
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint4 words[2] = {};
      if (dropout.active) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          words[half] = dropout.words(block * kRows + tile * 16 + half * 8 + group, column);
          x[tile][half] = dropout.masked(x[tile][half], words[half]);
        }
      }
      multiply_transposed<T, kRankTiles, kWords>(sums, x[tile], columns, tile * 8, group, member);
      if constexpr (kUpdates) {
        float update[4][4] = {};
        expand_rows<T, kRankTiles, kRowWords>(update, by_row[block & 1] + tile * 16, lora_A, group, member);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = block * kRows + tile * 16 + half * 8 + group;
          if (is_column && row < arguments.M) {
            const uint4 result = updated<T>(update, half, dropout, words[half], dx[tile][half]);
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(arguments.dx) + row * arguments.dx_stride + column) = result;
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[tile][half] = following_x[tile][half];
        if constexpr (kUpdates) dx[tile][half] = following_dx[tile][half];
      }
    }
  }
  float* out = arguments.dA_parts + int64_t(blockIdx.y) * arguments.R * arguments.K;
  store_transposed<kRankTiles>(sums, dropout.scale, out, 1, arguments.K, first_column, arguments.K, 0, arguments.R, group,
                               member);
}

template <typename T, int kRankTiles>
void launch_dy(const DyArguments& arguments, cudaStream_t stream) {
  const int slices = divide_up(arguments.R, kRankTiles * 8);
  const dim3 grid(dy_column_blocks(arguments) * slices, arguments.chunks);
  SDA_LAUNCH((dy_kernel<T, kRankTiles>), grid, kDyThreads, stream, arguments,
             divide_up(divide_up(arguments.M, kDyRows), arguments.chunks));
}

template <typename T>
void launch_dy(const DyArguments& arguments, cudaStream_t stream) {
  if (arguments.R <= 8) return launch_dy<T, 1>(arguments, stream);
  if (arguments.R <= 16) return launch_dy<T, 2>(arguments, stream);
  launch_dy<T, kDyRanks / 8>(arguments, stream);
}

template <typename T, int kRankTiles, bool kUpdates>
void launch_dx(const DxArguments& arguments, cudaStream_t stream) {
  const dim3 grid(divide_up(arguments.K, kDxColumns), arguments.chunks);
  SDA_LAUNCH((dx_kernel<T, kRankTiles, kUpdates>), grid, kDxThreads, stream, arguments,
             divide_up(divide_up(arguments.M, dx_rows(kUpdates)), arguments.chunks));
}

template <typename T, bool kUpdates>
void launch_dx(const DxArguments& arguments, cudaStream_t stream) {
  if (arguments.R <= 8) return launch_dx<T, 1, kUpdates>(arguments, stream);
  if (arguments.R <= 16) return launch_dx<T, 2, kUpdates>(arguments, stream);
  if (arguments.R <= 32) return launch_dx<T, 4, kUpdates>(arguments, stream);
  if constexpr (!kUpdates) launch_dx<T, 8, kUpdates>(arguments, stream);
}

// Above 32 ranks the registers do not hold both results: since dx does not read x, two kernels move hardly more.
bool updates_apart(const DxArguments& arguments) { return arguments.dx != nullptr && arguments.R > 32; }

template <typename T>
void launch_dx(const DxArguments& arguments, cudaStream_t stream) {
  if (arguments.dx != nullptr && !updates_apart(arguments)) return launch_dx<T, true>(arguments, stream);
  launch_dx<T, false>(arguments, stream);
}

}  // namespace

int dy_column_blocks(const DyArguments& arguments) { return divide_up(arguments.N, kDyColumns); }

int dy_gate_parts(const DyArguments& arguments) { return std::max(1, divide_up(arguments.M, kFinishRows)); }

int dy_chunks(const DyArguments& arguments, int wanted) {
  const int ctas_a_chunk = dy_column_blocks(arguments) * (arguments.R <= kDyRanks ? 1 : divide_up(arguments.R, kDyRanks));
  return chunks_of_rows(divide_up(arguments.M, kDyRows), ctas_a_chunk, multiprocessor_count(), wanted);
}

cudaError_t dy_pass(const DyArguments& arguments, cudaStream_t stream) {
  if (arguments.dhg_parts != nullptr || arguments.dB_parts != nullptr) {
    if (arguments.kind == ScalarKind::kBFloat16) {
      launch_dy<BFloat16>(arguments, stream);
    } else {
      launch_dy<Float16>(arguments, stream);
    }
  }
  cudaError_t error = cudaGetLastError();
  // Without rows there are no parts of dhg, but gradients of the gates all the same: zeros.
  const int gate_ctas = arguments.dh == nullptr && arguments.dgates == nullptr ? 0 : dy_gate_parts(arguments);
  const int64_t numel = arguments.dB_parts == nullptr ? 0 : int64_t(arguments.N) * arguments.R;
  const unsigned dB_ctas = numel == 0 ? 0 : grid_size((numel + kFinishThreads - 1) / kFinishThreads, int64_t(1) << 20);
  if (error != cudaSuccess || gate_ctas + dB_ctas == 0) return error;
  SDA_LAUNCH(dy_finish_kernel, gate_ctas + dB_ctas, kFinishThreads, stream, arguments, gate_ctas);
  error = cudaGetLastError();
  if (error != cudaSuccess || arguments.dgates_parts == nullptr) return error;
  return add_parts(arguments.dgates_parts, gate_ctas, arguments.gate.lines, arguments.gate.num_experts, arguments.dgates,
                   arguments.gate.num_experts, stream);
}

int dx_chunks(const DxArguments& arguments, int wanted) {
  const int blocks = divide_up(arguments.M, dx_rows(arguments.dx != nullptr && !updates_apart(arguments)));
  return chunks_of_rows(blocks, divide_up(arguments.K, kDxColumns), 2 * multiprocessor_count(), wanted);
}

cudaError_t dx_pass(const DxArguments& arguments, cudaStream_t stream) {
  if (updates_apart(arguments)) {
    const ExpandArguments update{arguments.dx, arguments.dx_stride, nullptr, arguments.dh, arguments.dh_stride,
                                 arguments.lora_A, 1, arguments.K, arguments.kind, arguments.lora_kind, GateTable{},
                                 arguments.dropout, arguments.M, arguments.K, arguments.R, arguments.adds};
    const cudaError_t error = expand(update, stream);
    if (error != cudaSuccess) return error;
  }
  if (arguments.kind == ScalarKind::kBFloat16) {
    launch_dx<BFloat16>(arguments, stream);
  } else {
    launch_dx<Float16>(arguments, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return add_parts(arguments.dA_parts, arguments.chunks, arguments.R, arguments.K, arguments.dA, arguments.K, stream);
}

}  // namespace sda
