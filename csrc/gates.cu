// MoDA's gates, softmax(proj embedding[m]) for each wanted modality, and their gradients: one launch each way, because
// as separate operations these few numbers cost more launches than the rest of an adapter.
//
// Sums run in a fixed order, so that results do not depend on the launch.
#include "launchers.h"

namespace sda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

// One CTA for each wanted modality; a warp for each expert's logit.
template <typename Parameter>
__global__ void __launch_bounds__(kThreads) gates_kernel(GatesArguments arguments) {
  using Storage = typename Parameter::Storage;
  SDA_SHARED float logits[kMaxExperts];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t modality = arguments.first_modality + blockIdx.x;
  const Storage* embedding = static_cast<const Storage*>(arguments.embedding) + modality * arguments.gate_dim;
  for (int expert = warp; expert < arguments.num_experts; expert += kWarps) {
    const Storage* proj = static_cast<const Storage*>(arguments.proj) + int64_t(expert) * arguments.gate_dim;
    float sum = 0.f;
    for (int i = lane; i < arguments.gate_dim; i += 32) sum += Parameter::widen(embedding[i]) * Parameter::widen(proj[i]);
    sum = warp_sum(sum);
    if (lane == 0) logits[expert] = sum;
  }
  __syncthreads();
  float largest = logits[0];
  for (int expert = 1; expert < arguments.num_experts; ++expert) largest = fmaxf(largest, logits[expert]);
  float total = 0.f;
  for (int expert = 0; expert < arguments.num_experts; ++expert) total += expf(logits[expert] - largest);
  for (int expert = threadIdx.x; expert < arguments.num_experts; expert += kThreads) {
    arguments.gates[int64_t(blockIdx.x) * arguments.num_experts + expert] = expf(logits[expert] - largest) / total;
  }
}

// dlogits = gates * (dgates - sum dgates gates) of one wanted modality and expert.
__device__ __forceinline__ float logit_gradient(const GatesArguments& arguments, int row, int expert) {
  const float* gates = arguments.gates + int64_t(row) * arguments.num_experts;
  const float* dgates = arguments.dgates + int64_t(row) * arguments.num_experts;
  float sum = 0.f;
  for (int other = 0; other < arguments.num_experts; ++other) sum += dgates[other] * gates[other];
  return gates[expert] * (dgates[expert] - sum);
}

// One CTA; each wanted modality in turn brings its logits' gradients into shared memory.
template <typename Parameter>
__global__ void __launch_bounds__(kThreads) gates_backward_kernel(GatesArguments arguments) {
  using Storage = typename Parameter::Storage;
  SDA_SHARED float dlogits[kMaxExperts];
  const Storage* proj = static_cast<const Storage*>(arguments.proj);
  const Storage* embedding = static_cast<const Storage*>(arguments.embedding);
  const int gate_dim = arguments.gate_dim, num_experts = arguments.num_experts;
  if (arguments.dembedding != nullptr) {
    Storage* dembedding = static_cast<Storage*>(arguments.dembedding);
    for (int modality = 0; modality < arguments.modalities; ++modality) {
      const int row = modality - arguments.first_modality;
      const bool wanted = row >= 0 && row < arguments.wanted;
      __syncthreads();
      if (wanted && int(threadIdx.x) < num_experts) dlogits[threadIdx.x] = logit_gradient(arguments, row, threadIdx.x);
      __syncthreads();
      for (int i = threadIdx.x; i < gate_dim; i += kThreads) {
        float sum = 0.f;
        for (int expert = 0; wanted && expert < num_experts; ++expert) {
          sum += dlogits[expert] * Parameter::widen(proj[int64_t(expert) * gate_dim + i]);
        }
        dembedding[int64_t(modality) * gate_dim + i] = Parameter::round(sum);
      }
    }
  }
  if (arguments.dproj != nullptr) {
    Storage* dproj = static_cast<Storage*>(arguments.dproj);
    for (int element = threadIdx.x; element < num_experts * gate_dim; element += kThreads) {
      const int expert = element / gate_dim, i = element % gate_dim;
      float sum = 0.f;
      for (int row = 0; row < arguments.wanted; ++row) {
        const int64_t modality = arguments.first_modality + row;
        sum += logit_gradient(arguments, row, expert) * Parameter::widen(embedding[modality * gate_dim + i]);
      }
      dproj[element] = Parameter::round(sum);
    }
  }
}

}  // namespace

cudaError_t gates(const GatesArguments& arguments, cudaStream_t stream) {
  if (arguments.wanted == 0) return cudaSuccess;
  if (arguments.kind == ScalarKind::kBFloat16) {
    SDA_LAUNCH(gates_kernel<BFloat16>, arguments.wanted, kThreads, stream, arguments);
  } else {
    SDA_LAUNCH(gates_kernel<Float32>, arguments.wanted, kThreads, stream, arguments);
  }
  return cudaGetLastError();
}

cudaError_t gates_backward(const GatesArguments& arguments, cudaStream_t stream) {
  if (arguments.kind == ScalarKind::kBFloat16) {
    SDA_LAUNCH(gates_backward_kernel<BFloat16>, 1, kThreads, stream, arguments);
  } else {
    SDA_LAUNCH(gates_backward_kernel<Float32>, 1, kThreads, stream, arguments);
  }
  return cudaGetLastError();
}

}  // namespace sda
