// Host entry points of the kernels. Pointers are device pointers; tensors are dense and row-major.
#pragma once

#include "packed_weight.cuh"

namespace sda {

enum class ScalarKind : int { kBFloat16, kFloat16, kFloat32 };

// out [numel] bfloat16 or float16 = round(code[nibble] * scale), elementwise.
cudaError_t decode(const PackedWeight& weight, void* out, ScalarKind out_kind, cudaStream_t stream);

// out [N, K] = round(code[nibble] * scale + sum_r B[n, r] * (scaling * gates[r / (R / E)] * A[r, k])), summed in float32.
struct FoldArguments {
  const void* lora_A;   // [R, K]
  const void* lora_B;   // [N, R]
  const float* gates;   // [E]
  ScalarKind lora_kind; // bfloat16 or float32
  float scaling;
  int rank;
  int num_experts;
  int64_t rows;         // N; R * max(N, K) below 2^31
  int64_t columns;      // K
};
cudaError_t decode_fold(const PackedWeight& weight, const FoldArguments& fold, void* out, ScalarKind out_kind,
                        cudaStream_t stream);

// out [M, N] = x W^T + bias + (h * G) B^T with G[r] = scaling * gates[r / (R / E)], accumulated in float32, rounded once.
struct LinearArguments {
  const void* x;          // [M, K]
  const void* bias;       // [N] of x's kind, or null
  const float* hidden;    // h [M, R], or null
  const void* lora_B;     // [N, R], or null
  const float* gates;     // [E], or null if hidden is h * G already
  float scaling;
  int num_experts;
  void* out;              // [M, N]
  ScalarKind kind;        // of x, bias and out
  ScalarKind lora_kind;   // bfloat16 or float32
  float code_multiplier;  // the code is rounded to x's kind as code * code_multiplier
  int rank;
  int64_t M, N, K;
  int splits;             // from linear_splits
  float* parts;           // [splits, M, N], or null with one split
};
bool linear_has_fast_path(const PackedWeight& weight, const LinearArguments& arguments);
// Into how many parts K is split among CTAs: `wanted`, or with 0 what fills the device; at most as many as K has steps.
int linear_splits(const PackedWeight& weight, const LinearArguments& arguments, int wanted);
cudaError_t linear(const PackedWeight& weight, const LinearArguments& arguments, cudaStream_t stream);

// gates [wanted, E] = softmax(proj embedding[m]) of the modalities m from first_modality on, and their gradients.
constexpr int kMaxExperts = 256;
struct GatesArguments {
  const void* embedding;  // [modalities, gate_dim]
  const void* proj;       // [E, gate_dim]
  float* gates;           // [wanted, E], which gates_backward reads
  const float* dgates;    // [wanted, E], for gates_backward
  void* dembedding;       // [modalities, gate_dim], zero for what is not wanted, or null
  void* dproj;            // [E, gate_dim], or null
  ScalarKind kind;        // of the parameters and their gradients, bfloat16 or float32
  int modalities;
  int num_experts;        // at most kMaxExperts
  int gate_dim;
  int first_modality;
  int wanted;
};
cudaError_t gates(const GatesArguments& arguments, cudaStream_t stream);
cudaError_t gates_backward(const GatesArguments& arguments, cudaStream_t stream);

// The low-rank passes. Activations are bfloat16 or float16, their rows strided and 16-byte aligned, K and N multiples of 8;
// h and dh are float32 with strided rows, an adapter's matrix is dense and float32 or of the activations' kind. M is below
// 2^31 - 2^16. Sums over rows or over blocks of columns are written in parts, which are added in their order.
constexpr int kMaxPassRank = 64;

struct DropoutArguments {
  const int64_t* seed;  // null without dropout
  int threshold;        // an element is dropped if its 16-bit sample is below it; 1 to 65536
  float scale;          // of a kept element; 1 without dropout
};

// G[row, j] = scaling * gates[line(row), j / (R / E)]; line(row) is ids[row / rows_per_id], or without ids the row, or 0 if
// there is one line.
struct GateTable {
  const float* gates;  // [lines, E], or null for no gate at all
  const void* ids;     // int32 or int64, or null
  int ids_are_64bit;
  int rows_per_id;
  int lines;
  int num_experts;
  float scaling;
};
inline bool has_line_per_row(const GateTable& gate, int M) { return gate.ids == nullptr && gate.lines == M && M != 1; }

// h = dropout(x) A^T.
struct ProjectArguments {
  const void* x;  // [M, K]
  int64_t x_stride;
  const void* lora_A;  // [R, K], 16-byte aligned
  ScalarKind kind, lora_kind;
  float* h;  // [M, R]
  int64_t h_stride;
  DropoutArguments dropout;
  int M, K, R;
  int splits;    // from project_splits
  float* parts;  // [splits, M, R], or null with one split
};
// Into how many parts K is split among CTAs: `wanted`, or with 0 what fills the device.
int project_splits(const ProjectArguments& arguments, int wanted);
cudaError_t project(const ProjectArguments& arguments, cudaStream_t stream);

// y = [y +] mask / (1 - p) * (h * G) B^T [+ bias], rounded once.
struct ExpandArguments {
  void* y;  // [M, N]
  int64_t y_stride;
  const void* bias;  // [N] of y's kind, or null; not with dropout
  const float* h;    // [M, R]
  int64_t h_stride;
  const void* lora_B;  // [N, R] with any strides
  int64_t lora_stride_column, lora_stride_rank;
  ScalarKind kind, lora_kind;
  GateTable gate;
  DropoutArguments dropout;
  int M, N, R;
  int adds;  // 0: what y holds is not read
};
cudaError_t expand(const ExpandArguments& arguments, cudaStream_t stream);

// dh = (dy B) * G, dB = dy^T (h * G) and the gates' gradients; each only where it is wanted.
struct DyArguments {
  const void* dy;  // [M, N]
  int64_t dy_stride;
  const float* h;  // [M, R]
  int64_t h_stride;
  const void* lora_B;  // [N, R]
  ScalarKind kind, lora_kind;
  GateTable gate;
  float* dh;  // [M, R], or null
  int64_t dh_stride;
  float* dB;      // [N, R], or null
  float* dgates;  // [lines, E], or null
  int M, N, R;
  int chunks;           // of rows, from dy_chunks
  float* dhg_parts;     // [dy_column_blocks, M, R], or null if neither dh nor dgates is wanted
  float* dB_parts;      // [chunks, N, R], or null without dB
  float* dgates_parts;  // [dy_gate_parts, lines, E], or null without dgates or with a line for each row
};
int dy_chunks(const DyArguments& arguments, int wanted);
int dy_column_blocks(const DyArguments& arguments);
int dy_gate_parts(const DyArguments& arguments);
cudaError_t dy_pass(const DyArguments& arguments, cudaStream_t stream);

// dA = dh^T dropout(x) and, where dx is given, dx = [dx +] mask / (1 - p) * (dh A), rounded once.
struct DxArguments {
  const void* x;  // [M, K]
  int64_t x_stride;
  const float* dh;  // [M, R]
  int64_t dh_stride;
  const void* lora_A;  // [R, K]
  ScalarKind kind, lora_kind;
  void* dx;  // [M, K], or null
  int64_t dx_stride;
  float* dA;  // [R, K]
  DropoutArguments dropout;
  int M, K, R;
  int adds;         // 0: what dx holds is not read
  int chunks;       // of rows, from dx_chunks
  float* dA_parts;  // [chunks, R, K]
};
int dx_chunks(const DxArguments& arguments, int wanted);
cudaError_t dx_pass(const DxArguments& arguments, cudaStream_t stream);

// out [rows, columns] = the sum of parts [count, rows, columns] in their order.
cudaError_t add_parts(const float* parts, int count, int64_t rows, int columns, float* out, int64_t out_stride,
                      cudaStream_t stream);

}  // namespace sda
