// Host entry points of the kernels. Pointers are device pointers; tensors are dense and row-major.
#pragma once

#include "packed_weight.cuh"

namespace sda {

enum class ScalarKind : int { kBFloat16, kFloat16, kFloat32 };

// out [numel] bfloat16 or float16 = round(code[nibble] * scale), elementwise.
cudaError_t decode(const PackedWeight& weight, void* out, ScalarKind out_kind, cudaStream_t stream);

// out [N, K] = round(code[nibble] * scale + sum_r (scaling * gates[r / (R / E)] * B[n, r]) * A[r, k]), summed in float32.
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

}  // namespace sda
