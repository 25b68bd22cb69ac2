// torch.ops.sda_fast_cuda: the launchers behind torch's stable ABI (torch/csrc/stable), so that one build serves every torch
// from 2.11 on. No libtorch C++ ABI. Shapes that a Python caller chooses are checked here; meanings are in launchers.h.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "launchers.h"

// The one symbol that a torch without CUDA lacks: the library loads there too, and its operations have no tensors to take.
#pragma weak aoti_torch_get_current_cuda_stream

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_dense(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, " must be a contiguous CUDA tensor");
}

const float* float_pointer(const Tensor& tensor, const char* name, int64_t at_least) {
  check_dense(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(tensor.numel() >= at_least, name, " must have at least ", at_least, " elements, got ", tensor.numel());
  return static_cast<const float*>(tensor.const_data_ptr());
}

sda::ScalarKind scalar_kind(const Tensor& tensor, const char* name, bool wide, bool half) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return sda::ScalarKind::kBFloat16;
  if (half && type == ScalarType::Half) return sda::ScalarKind::kFloat16;
  STD_TORCH_CHECK(wide && type == ScalarType::Float, name, " has an unsupported dtype");
  return sda::ScalarKind::kFloat32;
}

int log2_of(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 32 && size <= (int64_t(1) << 30) && (size & (size - 1)) == 0, name,
                  " must be a power of two of at least 32, got ", size);
  int result = 0;
  while ((int64_t(1) << result) < size) ++result;
  return result;
}

sda::PackedWeight packed_weight(const Tensor& packed, const Tensor& code, const Tensor& absmax,
                                const OptionalTensor& nested_code, const OptionalTensor& nested_absmax,
                                const OptionalTensor& nested_offset, int64_t block_size, int64_t nested_block_size,
                                int64_t numel) {
  check_dense(packed, "packed");
  check_dense(absmax, "absmax");
  const int64_t bytes = packed.numel() * int64_t(packed.element_size());
  STD_TORCH_CHECK(bytes >= (numel + 1) / 2, "packed has ", bytes, " bytes, but ", numel, " elements need ", (numel + 1) / 2);
  sda::PackedWeight weight{};
  weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  weight.code = float_pointer(code, "code", 16);
  weight.absmax = absmax.const_data_ptr();
  weight.numel = numel;
  weight.log2_block_size = log2_of(block_size, "block_size");
  const int64_t blocks = (numel + block_size - 1) / block_size;
  STD_TORCH_CHECK(absmax.numel() >= blocks, "absmax has ", absmax.numel(), " entries, but there are ", blocks, " blocks");
  if (nested_code.has_value()) {
    STD_TORCH_CHECK(nested_absmax.has_value() && nested_offset.has_value(),
                    "nested statistics need nested_code, nested_absmax and nested_offset");
    STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Byte, "nested absmax must be uint8");
    weight.log2_nested_block_size = log2_of(nested_block_size, "nested_block_size");
    weight.nested_code = float_pointer(*nested_code, "nested_code", 256);
    weight.nested_absmax =
        float_pointer(*nested_absmax, "nested_absmax", (blocks + nested_block_size - 1) / nested_block_size);
    weight.nested_offset = float_pointer(*nested_offset, "nested_offset", 1);
  } else {
    STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float, "absmax must be float32");
  }
  return weight;
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "the library was linked against a torch without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
}

void check_output(const Tensor& out) {
  check_dense(out, "out");
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix, got ", out.dim(), " dimensions");
}

void decode_4bit(Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code, OptionalTensor nested_absmax,
                 OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, Tensor out) {
  check_output(out);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, out.numel());
  check_launch(sda::decode(weight, out.mutable_data_ptr(), scalar_kind(out, "out", false, true), current_stream(out)));
}

void decode_fold_4bit(Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code, OptionalTensor nested_absmax,
                      OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, Tensor lora_A,
                      Tensor lora_B, Tensor gates, double scaling, Tensor out) {
  check_output(out);
  check_dense(lora_A, "lora_A");
  check_dense(lora_B, "lora_B");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  sda::FoldArguments fold{};
  fold.rows = out.size(0);
  fold.columns = out.size(1);
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(1) == fold.columns && lora_B.size(0) == fold.rows &&
                      lora_A.size(0) == lora_B.size(1) && lora_A.scalar_type() == lora_B.scalar_type(),
                  "lora_A [R, K] and lora_B [N, R] must match out [N, K] and each other's dtype");
  const int64_t rank = lora_A.size(0), num_experts = gates.numel();
  STD_TORCH_CHECK(num_experts > 0 && rank % num_experts == 0, "rank ", rank, " is not a multiple of ", num_experts, " experts");
  STD_TORCH_CHECK(rank * (fold.rows > fold.columns ? fold.rows : fold.columns) < (int64_t(1) << 31), "matrix too large");
  fold.lora_A = lora_A.const_data_ptr();
  fold.lora_B = lora_B.const_data_ptr();
  fold.gates = float_pointer(gates, "gates", 1);
  fold.lora_kind = scalar_kind(lora_A, "lora_A", true, false);
  fold.scaling = float(scaling);
  fold.rank = int(rank);
  fold.num_experts = int(num_experts);
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, out.numel());
  check_launch(
      sda::decode_fold(weight, fold, out.mutable_data_ptr(), scalar_kind(out, "out", false, true), current_stream(out)));
}

void linear_4bit(Tensor x, Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code,
                 OptionalTensor nested_absmax, OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size,
                 OptionalTensor bias, OptionalTensor hidden, OptionalTensor lora_B, OptionalTensor gates, double scaling,
                 double code_multiplier, Tensor out, int64_t splits) {
  check_output(out);
  check_dense(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == out.size(0) && x.scalar_type() == out.scalar_type(),
                  "x [M, K] and out [M, N] must agree in rows and dtype");
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  sda::LinearArguments linear{};
  linear.M = x.size(0);
  linear.K = x.size(1);
  linear.N = out.size(1);
  linear.x = x.const_data_ptr();
  linear.out = out.mutable_data_ptr();
  linear.kind = scalar_kind(x, "x", false, true);
  linear.lora_kind = sda::ScalarKind::kFloat32;
  linear.code_multiplier = float(code_multiplier);
  if (bias.has_value()) {
    check_dense(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == linear.N && bias->scalar_type() == x.scalar_type(), "bias must be [N] of x's dtype");
    linear.bias = bias->const_data_ptr();
  }
  if (hidden.has_value()) {
    STD_TORCH_CHECK(lora_B.has_value(), "hidden needs lora_B");
    check_dense(*lora_B, "lora_B");
    STD_TORCH_CHECK(hidden->dim() == 2 && lora_B->dim() == 2 && hidden->size(0) == linear.M &&
                        lora_B->size(0) == linear.N && hidden->size(1) == lora_B->size(1),
                    "hidden [M, R] and lora_B [N, R] must match x, out and each other");
    linear.hidden = float_pointer(*hidden, "hidden", 0);
    linear.lora_B = lora_B->const_data_ptr();
    linear.lora_kind = scalar_kind(*lora_B, "lora_B", true, false);
    linear.rank = int(hidden->size(1));
    if (gates.has_value()) {
      linear.gates = float_pointer(*gates, "gates", 1);
      linear.scaling = float(scaling);
      linear.num_experts = int(gates->numel());
      STD_TORCH_CHECK(linear.rank % linear.num_experts == 0, "rank ", linear.rank, " is not a multiple of ",
                      linear.num_experts, " experts");
    }
  }
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, linear.N * linear.K);
  STD_TORCH_CHECK(splits >= 0 && splits <= 1024, "splits must be 0 (chosen here) to 1024, got ", splits);
  linear.splits = sda::linear_splits(weight, linear, int(splits));
  OptionalTensor parts;  // held until the launch is queued
  if (linear.splits > 1) {
    parts = torch::stable::new_empty(out, {linear.splits, linear.M, linear.N}, ScalarType::Float);
    linear.parts = static_cast<float*>(parts->mutable_data_ptr());
  }
  check_launch(sda::linear(weight, linear, current_stream(out)));
}

sda::GatesArguments gates_arguments(const Tensor& gate_embedding, const Tensor& gate_proj, int64_t modality,
                                    const Tensor& gates) {
  check_dense(gate_embedding, "gate_embedding");
  check_dense(gate_proj, "gate_proj");
  sda::GatesArguments arguments{};
  STD_TORCH_CHECK(gate_embedding.dim() == 2 && gate_proj.dim() == 2 && gate_embedding.size(1) == gate_proj.size(1) &&
                      gate_embedding.scalar_type() == gate_proj.scalar_type(),
                  "gate_embedding [modalities, gate_dim] and gate_proj [E, gate_dim] must agree in width and dtype");
  STD_TORCH_CHECK(gate_proj.size(0) <= sda::kMaxExperts && gate_proj.numel() < (int64_t(1) << 31), gate_proj.size(0),
                  " experts are more than ", sda::kMaxExperts);
  STD_TORCH_CHECK(modality >= -1 && modality < gate_embedding.size(0), "there is no modality ", modality);
  arguments.embedding = gate_embedding.const_data_ptr();
  arguments.proj = gate_proj.const_data_ptr();
  arguments.kind = scalar_kind(gate_proj, "gate_proj", true, false);
  arguments.modalities = int(gate_embedding.size(0));
  arguments.num_experts = int(gate_proj.size(0));
  arguments.gate_dim = int(gate_proj.size(1));
  arguments.first_modality = modality < 0 ? 0 : int(modality);
  arguments.wanted = modality < 0 ? arguments.modalities : 1;
  float_pointer(gates, "gates", int64_t(arguments.wanted) * arguments.num_experts);
  arguments.gates = static_cast<float*>(gates.mutable_data_ptr());
  return arguments;
}

void moda_gates(Tensor gate_embedding, Tensor gate_proj, int64_t modality, Tensor out) {
  const sda::GatesArguments arguments = gates_arguments(gate_embedding, gate_proj, modality, out);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  check_launch(sda::gates(arguments, current_stream(out)));
}

void* gradient_pointer(const OptionalTensor& gradient, const Tensor& parameter, const char* name) {
  if (!gradient.has_value()) return nullptr;
  check_dense(*gradient, name);
  STD_TORCH_CHECK(gradient->numel() == parameter.numel() && gradient->scalar_type() == parameter.scalar_type(), name,
                  " must be like its parameter");
  return gradient->mutable_data_ptr();
}

void moda_gates_backward(Tensor dgates, Tensor gates, Tensor gate_embedding, Tensor gate_proj, int64_t modality,
                         OptionalTensor dembedding, OptionalTensor dproj) {
  sda::GatesArguments arguments = gates_arguments(gate_embedding, gate_proj, modality, gates);
  arguments.dgates = float_pointer(dgates, "dgates", int64_t(arguments.wanted) * arguments.num_experts);
  arguments.dembedding = gradient_pointer(dembedding, gate_embedding, "dembedding");
  arguments.dproj = gradient_pointer(dproj, gate_proj, "dproj");
  const torch::stable::accelerator::DeviceGuard guard(gates.get_device_index());
  check_launch(sda::gates_backward(arguments, current_stream(gates)));
}

}  // namespace

#define SDA_WEIGHT_SCHEMA                                                                           \
  "Tensor packed, Tensor code, Tensor absmax, Tensor? nested_code, Tensor? nested_absmax, "        \
  "Tensor? nested_offset, int block_size, int nested_block_size, "

STABLE_TORCH_LIBRARY(sda_fast_cuda, library) {
  library.def("decode_4bit(" SDA_WEIGHT_SCHEMA "Tensor(a!) out) -> ()");
  library.def("decode_fold_4bit(" SDA_WEIGHT_SCHEMA
              "Tensor lora_A, Tensor lora_B, Tensor gates, float scaling, Tensor(a!) out) -> ()");
  library.def("linear_4bit(Tensor x, " SDA_WEIGHT_SCHEMA
              "Tensor? bias, Tensor? hidden, Tensor? lora_B, Tensor? gates, float scaling, float code_multiplier, Tensor(a!) out, int splits=0) -> ()");
  library.def("moda_gates(Tensor gate_embedding, Tensor gate_proj, int modality, Tensor(a!) out) -> ()");
  library.def("moda_gates_backward(Tensor dgates, Tensor gates, Tensor gate_embedding, Tensor gate_proj, int modality, "
              "Tensor(a!)? dembedding, Tensor(b!)? dproj) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sda_fast_cuda, CUDA, library) {
  library.impl("decode_4bit", TORCH_BOX(&decode_4bit));
  library.impl("decode_fold_4bit", TORCH_BOX(&decode_fold_4bit));
  library.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  library.impl("moda_gates", TORCH_BOX(&moda_gates));
  library.impl("moda_gates_backward", TORCH_BOX(&moda_gates_backward));
}
