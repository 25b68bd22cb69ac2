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

// `beside` is the tensor on whose device the kernel runs.
void check_dense(const Tensor& tensor, const char* name, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, " must be a contiguous CUDA tensor");
  STD_TORCH_CHECK(tensor.get_device_index() == beside.get_device_index(), name, " is on device ", tensor.get_device_index(),
                  ", other tensors on device ", beside.get_device_index());
}

const float* float_pointer(const Tensor& tensor, const char* name, int64_t at_least, const Tensor& beside) {
  check_dense(tensor, name, beside);
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
                                int64_t numel, const Tensor& beside) {
  check_dense(packed, "packed", beside);
  check_dense(absmax, "absmax", beside);
  const int64_t bytes = packed.numel() * int64_t(packed.element_size());
  STD_TORCH_CHECK(bytes >= (numel + 1) / 2, "packed has ", bytes, " bytes, but ", numel, " elements need ", (numel + 1) / 2);
  sda::PackedWeight weight{};
  weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  weight.code = float_pointer(code, "code", 16, beside);
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
    weight.nested_code = float_pointer(*nested_code, "nested_code", 256, beside);
    weight.nested_absmax =
        float_pointer(*nested_absmax, "nested_absmax", (blocks + nested_block_size - 1) / nested_block_size, beside);
    weight.nested_offset = float_pointer(*nested_offset, "nested_offset", 1, beside);
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
  check_dense(out, "out", out);
  STD_TORCH_CHECK(out.dim() == 2, "out must be a matrix, got ", out.dim(), " dimensions");
}

void decode_4bit(Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code, OptionalTensor nested_absmax,
                 OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, Tensor out) {
  check_output(out);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, out.numel(), out);
  check_launch(sda::decode(weight, out.mutable_data_ptr(), scalar_kind(out, "out", false, true), current_stream(out)));
}

void decode_fold_4bit(Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code, OptionalTensor nested_absmax,
                      OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size, Tensor lora_A,
                      Tensor lora_B, Tensor gates, double scaling, Tensor out) {
  check_output(out);
  check_dense(lora_A, "lora_A", out);
  check_dense(lora_B, "lora_B", out);
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
  fold.gates = float_pointer(gates, "gates", 1, out);
  fold.lora_kind = scalar_kind(lora_A, "lora_A", true, false);
  fold.scaling = float(scaling);
  fold.rank = int(rank);
  fold.num_experts = int(num_experts);
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, out.numel(), out);
  check_launch(
      sda::decode_fold(weight, fold, out.mutable_data_ptr(), scalar_kind(out, "out", false, true), current_stream(out)));
}

void linear_4bit(Tensor x, Tensor packed, Tensor code, Tensor absmax, OptionalTensor nested_code,
                 OptionalTensor nested_absmax, OptionalTensor nested_offset, int64_t block_size, int64_t nested_block_size,
                 OptionalTensor bias, OptionalTensor hidden, OptionalTensor lora_B, OptionalTensor gates, double scaling,
                 double code_multiplier, Tensor out, int64_t splits) {
  check_output(out);
  check_dense(x, "x", out);
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
    check_dense(*bias, "bias", out);
    STD_TORCH_CHECK(bias->numel() == linear.N && bias->scalar_type() == x.scalar_type(), "bias must be [N] of x's dtype");
    linear.bias = bias->const_data_ptr();
  }
  if (hidden.has_value()) {
    STD_TORCH_CHECK(lora_B.has_value(), "hidden needs lora_B");
    check_dense(*lora_B, "lora_B", out);
    STD_TORCH_CHECK(hidden->dim() == 2 && lora_B->dim() == 2 && hidden->size(0) == linear.M &&
                        lora_B->size(0) == linear.N && hidden->size(1) == lora_B->size(1),
                    "hidden [M, R] and lora_B [N, R] must match x, out and each other");
    linear.hidden = float_pointer(*hidden, "hidden", 0, out);
    linear.lora_B = lora_B->const_data_ptr();
    linear.lora_kind = scalar_kind(*lora_B, "lora_B", true, false);
    linear.rank = int(hidden->size(1));
    if (gates.has_value()) {
      linear.gates = float_pointer(*gates, "gates", 1, out);
      linear.scaling = float(scaling);
      linear.num_experts = int(gates->numel());
      STD_TORCH_CHECK(linear.rank % linear.num_experts == 0, "rank ", linear.rank, " is not a multiple of ",
                      linear.num_experts, " experts");
    }
  }
  const sda::PackedWeight weight = packed_weight(packed, code, absmax, nested_code, nested_absmax, nested_offset, block_size,
                                                 nested_block_size, linear.N * linear.K, out);
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
  check_dense(gate_embedding, "gate_embedding", gates);
  check_dense(gate_proj, "gate_proj", gates);
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
  float_pointer(gates, "gates", int64_t(arguments.wanted) * arguments.num_experts, gates);
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
  check_dense(*gradient, name, parameter);
  STD_TORCH_CHECK(gradient->numel() == parameter.numel() && gradient->scalar_type() == parameter.scalar_type(), name,
                  " must be like its parameter");
  return gradient->mutable_data_ptr();
}

void moda_gates_backward(Tensor dgates, Tensor gates, Tensor gate_embedding, Tensor gate_proj, int64_t modality,
                         OptionalTensor dembedding, OptionalTensor dproj) {
  sda::GatesArguments arguments = gates_arguments(gate_embedding, gate_proj, modality, gates);
  arguments.dgates = float_pointer(dgates, "dgates", int64_t(arguments.wanted) * arguments.num_experts, gates);
  arguments.dembedding = gradient_pointer(dembedding, gate_embedding, "dembedding");
  arguments.dproj = gradient_pointer(dproj, gate_proj, "dproj");
  const torch::stable::accelerator::DeviceGuard guard(gates.get_device_index());
  check_launch(sda::gates_backward(arguments, current_stream(gates)));
}

// The passes count rows and columns in 32 bits, with room for a last block.
int pass_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size < (int64_t(1) << 31) - (int64_t(1) << 16), name, " has ", size, " rows or columns, too many");
  return int(size);
}

void check_matrix(const Tensor& tensor, const char* name, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == beside.get_device_index(), name,
                  " must be a CUDA tensor on the device of the activations");
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1), name,
                  " must be a matrix whose columns are neighbours in memory");
}

// x, y or their gradients: rows that can be read in 16-byte pieces.
void check_activations(const Tensor& tensor, const char* name, const Tensor& beside) {
  check_matrix(tensor, name, beside);
  STD_TORCH_CHECK(tensor.scalar_type() == beside.scalar_type(), name, " must be of the dtype of the other activations");
  STD_TORCH_CHECK(tensor.size(1) > 0 && tensor.size(1) % 8 == 0, name, " must have a multiple of 8 columns, got ",
                  tensor.size(1));
  STD_TORCH_CHECK((tensor.size(0) <= 1 || tensor.stride(0) % 8 == 0) && sda::is_aligned(tensor.const_data_ptr(), 16), name,
                  " must have 16-byte aligned rows");
}

// h or dh [M, R].
void check_low_rank(const Tensor& tensor, const char* name, const Tensor& beside, int64_t M, int64_t R) {
  check_matrix(tensor, name, beside);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.size(0) == M && tensor.size(1) == R, name,
                  " must be a float32 [", M, ", ", R, "], got [", tensor.size(0), ", ", tensor.size(1), "]");
  STD_TORCH_CHECK(R >= 1 && R <= sda::kMaxPassRank, "the rank must be 1 to ", sda::kMaxPassRank, ", got ", R);
}

sda::ScalarKind lora_kind(const Tensor& lora, const char* name, const Tensor& activations, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(lora.is_cuda() && lora.get_device_index() == activations.get_device_index(), name,
                  " must be a CUDA tensor on the device of the activations");
  STD_TORCH_CHECK(lora.dim() == 2 && lora.size(0) == rows && lora.size(1) == columns, name, " must be [", rows, ", ",
                  columns, "]");
  STD_TORCH_CHECK(lora.scalar_type() == ScalarType::Float || lora.scalar_type() == activations.scalar_type(), name,
                  " must be float32 or of the dtype of the activations");
  return lora.scalar_type() == ScalarType::Float ? sda::ScalarKind::kFloat32
                                                 : scalar_kind(activations, "activations", false, true);
}

sda::DropoutArguments dropout_arguments(const OptionalTensor& seed, int64_t threshold, double keep_scale,
                                        const Tensor& beside) {
  if (threshold == 0) return {nullptr, 0, 1.f};
  STD_TORCH_CHECK(threshold > 0 && threshold <= 65536, "threshold must be 0 to 65536, got ", threshold);
  STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
  check_dense(*seed, "seed", beside);
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one int64");
  return {static_cast<const int64_t*>(seed->const_data_ptr()), int(threshold), float(keep_scale)};
}

sda::GateTable gate_table(const Tensor& gates, const OptionalTensor& modality_ids, int64_t rows_per_id, double scaling,
                          int64_t M, int64_t R, const Tensor& beside) {
  sda::GateTable table{};
  table.gates = float_pointer(gates, "gates", 0, beside);
  STD_TORCH_CHECK(gates.dim() == 2 && gates.size(1) > 0 && R % gates.size(1) == 0, "gates must be [lines, E] with E dividing ",
                  R);
  table.lines = pass_size(gates.size(0), "gates");
  table.num_experts = int(gates.size(1));
  table.scaling = float(scaling);
  table.rows_per_id = pass_size(rows_per_id, "rows_per_id");
  if (!modality_ids.has_value()) {
    STD_TORCH_CHECK(table.lines == 1 || table.lines == M, "without modality_ids gates must have 1 or ", M, " lines, got ",
                    table.lines);
    return table;
  }
  check_dense(*modality_ids, "modality_ids", beside);
  table.ids_are_64bit = modality_ids->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(table.ids_are_64bit || modality_ids->scalar_type() == ScalarType::Int, "modality_ids must be int32 or int64");
  STD_TORCH_CHECK(rows_per_id >= 1 && modality_ids->numel() >= (M + rows_per_id - 1) / rows_per_id, "modality_ids has ",
                  modality_ids->numel(), " entries for ", M, " rows, ", rows_per_id, " to an entry");
  table.ids = modality_ids->const_data_ptr();
  return table;
}

// Memory for parts, held by `owner` until the launches are queued.
float* parts_of(OptionalTensor& owner, const Tensor& beside, int64_t numel) {
  owner = torch::stable::new_empty(beside, {numel}, ScalarType::Float);
  return static_cast<float*>(owner->mutable_data_ptr());
}

void moda_project(Tensor x, Tensor lora_A, OptionalTensor seed, int64_t threshold, double keep_scale, Tensor h,
                  int64_t parts) {
  check_activations(x, "x", x);
  sda::ProjectArguments arguments{};
  arguments.kind = scalar_kind(x, "x", false, true);
  arguments.M = pass_size(x.size(0), "x");
  arguments.K = pass_size(x.size(1), "x");
  arguments.R = int(h.size(1));
  check_low_rank(h, "h", x, arguments.M, arguments.R);
  check_dense(lora_A, "lora_A", x);
  arguments.lora_kind = lora_kind(lora_A, "lora_A", x, arguments.R, arguments.K);
  STD_TORCH_CHECK(sda::is_aligned(lora_A.const_data_ptr(), 16), "lora_A must be 16-byte aligned");
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.lora_A = lora_A.const_data_ptr();
  arguments.h = static_cast<float*>(h.mutable_data_ptr());
  arguments.h_stride = h.stride(0);
  arguments.dropout = dropout_arguments(seed, threshold, keep_scale, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  arguments.splits = sda::project_splits(arguments, int(parts));
  OptionalTensor of_splits;
  if (arguments.splits > 1) {
    arguments.parts = parts_of(of_splits, x, int64_t(arguments.splits) * arguments.M * arguments.R);
  }
  check_launch(sda::project(arguments, current_stream(x)));
}

void moda_expand(Tensor y, Tensor h, Tensor lora_B, OptionalTensor bias, OptionalTensor gates, OptionalTensor modality_ids,
                 int64_t rows_per_id, double scaling, OptionalTensor seed, int64_t threshold, double keep_scale, bool adds) {
  check_activations(y, "y", y);
  sda::ExpandArguments arguments{};
  arguments.kind = scalar_kind(y, "y", false, true);
  arguments.M = pass_size(y.size(0), "y");
  arguments.N = pass_size(y.size(1), "y");
  arguments.R = int(h.size(1));
  check_low_rank(h, "h", y, arguments.M, arguments.R);
  arguments.lora_kind = lora_kind(lora_B, "lora_B", y, arguments.N, arguments.R);
  arguments.y = y.mutable_data_ptr();
  arguments.y_stride = y.stride(0);
  arguments.h = static_cast<const float*>(h.const_data_ptr());
  arguments.h_stride = h.stride(0);
  arguments.lora_B = lora_B.const_data_ptr();
  arguments.lora_stride_column = lora_B.stride(0);
  arguments.lora_stride_rank = lora_B.stride(1);
  arguments.adds = adds;
  arguments.dropout = dropout_arguments(seed, threshold, keep_scale, y);
  if (gates.has_value()) {
    arguments.gate = gate_table(*gates, modality_ids, rows_per_id, scaling, arguments.M, arguments.R, y);
  }
  if (bias.has_value()) {
    check_dense(*bias, "bias", y);
    STD_TORCH_CHECK(threshold == 0, "there is no bias beside dropout");
    STD_TORCH_CHECK(bias->numel() == arguments.N && bias->scalar_type() == y.scalar_type(), "bias must be [N] of y's dtype");
    arguments.bias = bias->const_data_ptr();
  }
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  check_launch(sda::expand(arguments, current_stream(y)));
}

float* gradient_of(const OptionalTensor& gradient, const char* name, int64_t rows, int64_t columns, const Tensor& beside) {
  if (!gradient.has_value()) return nullptr;
  check_dense(*gradient, name, beside);
  STD_TORCH_CHECK(gradient->scalar_type() == ScalarType::Float && gradient->dim() == 2 && gradient->size(0) == rows &&
                      gradient->size(1) == columns,
                  name, " must be a float32 [", rows, ", ", columns, "]");
  return static_cast<float*>(gradient->mutable_data_ptr());
}

void moda_dy_pass(Tensor dy, Tensor h, Tensor lora_B, Tensor gates, OptionalTensor modality_ids, int64_t rows_per_id,
                  double scaling, OptionalTensor dh, OptionalTensor dB, OptionalTensor dgates, int64_t parts) {
  check_activations(dy, "dy", dy);
  sda::DyArguments arguments{};
  arguments.kind = scalar_kind(dy, "dy", false, true);
  arguments.M = pass_size(dy.size(0), "dy");
  arguments.N = pass_size(dy.size(1), "dy");
  arguments.R = int(h.size(1));
  check_low_rank(h, "h", dy, arguments.M, arguments.R);
  check_dense(lora_B, "lora_B", dy);
  arguments.lora_kind = lora_kind(lora_B, "lora_B", dy, arguments.N, arguments.R);
  arguments.dy = dy.const_data_ptr();
  arguments.dy_stride = dy.stride(0);
  arguments.h = static_cast<const float*>(h.const_data_ptr());
  arguments.h_stride = h.stride(0);
  arguments.lora_B = lora_B.const_data_ptr();
  arguments.gate = gate_table(gates, modality_ids, rows_per_id, scaling, arguments.M, arguments.R, dy);
  if (dh.has_value()) {
    check_low_rank(*dh, "dh", dy, arguments.M, arguments.R);
    arguments.dh = static_cast<float*>(dh->mutable_data_ptr());
    arguments.dh_stride = dh->stride(0);
  }
  const int64_t lines = arguments.gate.lines, num_experts = arguments.gate.num_experts;
  arguments.dB = gradient_of(dB, "dB", arguments.N, arguments.R, dy);
  arguments.dgates = gradient_of(dgates, "dgates", lines, num_experts, dy);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  arguments.chunks = sda::dy_chunks(arguments, int(parts));
  OptionalTensor of_dhg, of_dB, of_dgates;
  if (arguments.dh != nullptr || arguments.dgates != nullptr) {
    arguments.dhg_parts = parts_of(of_dhg, dy, int64_t(sda::dy_column_blocks(arguments)) * arguments.M * arguments.R);
  }
  if (arguments.dB != nullptr) {
    arguments.dB_parts = parts_of(of_dB, dy, int64_t(arguments.chunks) * arguments.N * arguments.R);
  }
  if (arguments.dgates != nullptr && !sda::has_line_per_row(arguments.gate, arguments.M)) {
    arguments.dgates_parts = parts_of(of_dgates, dy, int64_t(sda::dy_gate_parts(arguments)) * lines * num_experts);
  }
  check_launch(sda::dy_pass(arguments, current_stream(dy)));
}

void moda_dx_pass(Tensor x, Tensor dh, Tensor lora_A, OptionalTensor dx, Tensor dA, OptionalTensor seed, int64_t threshold,
                  double keep_scale, bool adds, int64_t parts) {
  check_activations(x, "x", x);
  sda::DxArguments arguments{};
  arguments.kind = scalar_kind(x, "x", false, true);
  arguments.M = pass_size(x.size(0), "x");
  arguments.K = pass_size(x.size(1), "x");
  arguments.R = int(dh.size(1));
  check_low_rank(dh, "dh", x, arguments.M, arguments.R);
  check_dense(lora_A, "lora_A", x);
  arguments.lora_kind = lora_kind(lora_A, "lora_A", x, arguments.R, arguments.K);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.dh = static_cast<const float*>(dh.const_data_ptr());
  arguments.dh_stride = dh.stride(0);
  arguments.lora_A = lora_A.const_data_ptr();
  if (dx.has_value()) {
    check_activations(*dx, "dx", x);
    STD_TORCH_CHECK(dx->size(0) == arguments.M && dx->size(1) == arguments.K, "dx must be of x's shape");
    arguments.dx = dx->mutable_data_ptr();
    arguments.dx_stride = dx->stride(0);
  }
  arguments.dA = gradient_of(dA, "dA", arguments.R, arguments.K, x);
  arguments.dropout = dropout_arguments(seed, threshold, keep_scale, x);
  arguments.adds = adds;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  arguments.chunks = sda::dx_chunks(arguments, int(parts));
  OptionalTensor of_dA;
  arguments.dA_parts = parts_of(of_dA, x, int64_t(arguments.chunks) * arguments.R * arguments.K);
  check_launch(sda::dx_pass(arguments, current_stream(x)));
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
  library.def("moda_project(Tensor x, Tensor lora_A, Tensor? seed, int threshold, float keep_scale, Tensor(a!) h, "
              "int parts=0) -> ()");
  library.def("moda_expand(Tensor(a!) y, Tensor h, Tensor lora_B, Tensor? bias, Tensor? gates, Tensor? modality_ids, "
              "int rows_per_id, float scaling, Tensor? seed, int threshold, float keep_scale, bool adds) -> ()");
  library.def("moda_dy_pass(Tensor dy, Tensor h, Tensor lora_B, Tensor gates, Tensor? modality_ids, int rows_per_id, "
              "float scaling, Tensor(a!)? dh, Tensor(b!)? dB, Tensor(c!)? dgates, int parts=0) -> ()");
  library.def("moda_dx_pass(Tensor x, Tensor dh, Tensor lora_A, Tensor(a!)? dx, Tensor(b!) dA, Tensor? seed, "
              "int threshold, float keep_scale, bool adds, int parts=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sda_fast_cuda, CUDA, library) {
  library.impl("decode_4bit", TORCH_BOX(&decode_4bit));
  library.impl("decode_fold_4bit", TORCH_BOX(&decode_fold_4bit));
  library.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  library.impl("moda_gates", TORCH_BOX(&moda_gates));
  library.impl("moda_gates_backward", TORCH_BOX(&moda_gates_backward));
  library.impl("moda_project", TORCH_BOX(&moda_project));
  library.impl("moda_expand", TORCH_BOX(&moda_expand));
  library.impl("moda_dy_pass", TORCH_BOX(&moda_dy_pass));
  library.impl("moda_dx_pass", TORCH_BOX(&moda_dx_pass));
}
