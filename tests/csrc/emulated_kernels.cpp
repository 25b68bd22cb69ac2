// A C interface for the tests to the launchers of csrc/, all compiled for the host with emulator.h.
#include <vector>

#include "launchers.h"

extern "C" {

void emulated_allow(void* first, int64_t rows, int64_t row_bytes, int64_t stride, int is_written);

struct WeightArguments {
  const void* packed;
  const void* code;
  const void* absmax;
  const void* nested_code;
  const void* nested_absmax;
  const void* nested_offset;
  int64_t numel;
  int32_t log2_block_size;
  int32_t log2_nested_block_size;
};

// Memory for what is summed in parts, full of NaN.
static float* parts_of(std::vector<float>& parts, int64_t numel) {
  parts.assign(numel, std::nanf(""));
  emulated_allow(parts.data(), 1, numel * int64_t(sizeof(float)), numel * int64_t(sizeof(float)), 1);
  return parts.data();
}

static sda::PackedWeight to_weight(const WeightArguments& w) {
  return {static_cast<const uint8_t*>(w.packed),      static_cast<const float*>(w.code),
          w.absmax,                                   static_cast<const float*>(w.nested_code),
          static_cast<const float*>(w.nested_absmax), static_cast<const float*>(w.nested_offset),
          w.numel,                                    w.log2_block_size,
          w.log2_nested_block_size};
}

int emulated_decode(const WeightArguments* weight, void* out, int out_kind) {
  return sda::decode(to_weight(*weight), out, sda::ScalarKind(out_kind), nullptr);
}

int emulated_decode_fold(const WeightArguments* weight, const void* lora_A, const void* lora_B, const void* gates,
                         int lora_kind, float scaling, int rank, int num_experts, int64_t rows, int64_t columns, void* out,
                         int out_kind) {
  const sda::FoldArguments fold{lora_A,  lora_B, static_cast<const float*>(gates), sda::ScalarKind(lora_kind),
                                scaling, rank,   num_experts,                      rows, columns};
  return sda::decode_fold(to_weight(*weight), fold, out, sda::ScalarKind(out_kind), nullptr);
}

// Returns into how many parts K was split, or 0 if the path for any shape was taken.
int emulated_linear(const WeightArguments* weight, const void* x, const void* bias, const void* hidden, const void* lora_B,
                    const void* gates, float scaling, int num_experts, void* out, int kind, int lora_kind, float code_multiplier, int rank, int64_t M, int64_t N, int64_t K,
                    int wanted_splits) {
  sda::LinearArguments arguments{x,
                                       bias,
                                       static_cast<const float*>(hidden),
                                       lora_B,
                                       static_cast<const float*>(gates),
                                       scaling,
                                       num_experts,
                                       out,
                                       sda::ScalarKind(kind),
                                       sda::ScalarKind(lora_kind),
                                       code_multiplier,
                                       rank,
                                       M,
                                       N,
                                       K,
                                       1,
                                       nullptr};
  const sda::PackedWeight packed = to_weight(*weight);
  if (!sda::linear_has_fast_path(packed, arguments)) {
    sda::linear(packed, arguments, nullptr);
    return 0;
  }
  arguments.splits = sda::linear_splits(packed, arguments, wanted_splits);
  std::vector<float> parts;
  arguments.parts = parts_of(parts, arguments.splits * M * N);
  sda::linear(packed, arguments, nullptr);
  return arguments.splits;
}

// The gradients where dgates are given, else the gates.
int emulated_gates(const void* embedding, const void* proj, void* gates, const void* dgates, void* dembedding, void* dproj,
                   int kind, int modalities, int gate_dim, int num_experts, int modality) {
  const sda::GatesArguments arguments{embedding,
                                      proj,
                                      static_cast<float*>(gates),
                                      static_cast<const float*>(dgates),
                                      dembedding,
                                      dproj,
                                      sda::ScalarKind(kind),
                                      modalities,
                                      num_experts,
                                      gate_dim,
                                      modality < 0 ? 0 : modality,
                                      modality < 0 ? modalities : 1};
  return dgates == nullptr ? sda::gates(arguments, nullptr) : sda::gates_backward(arguments, nullptr);
}

// The passes: `wanted` is into how many parts a sum is cut, 0 for the launcher's choice; the number is returned.

int emulated_project(sda::ProjectArguments* arguments, int wanted) {
  std::vector<float> parts;
  arguments->splits = sda::project_splits(*arguments, wanted);
  if (arguments->splits > 1) arguments->parts = parts_of(parts, int64_t(arguments->splits) * arguments->M * arguments->R);
  sda::project(*arguments, nullptr);
  return arguments->splits;
}

void emulated_expand(const sda::ExpandArguments* arguments) { sda::expand(*arguments, nullptr); }

int emulated_dy_pass(sda::DyArguments* arguments, int wanted) {
  std::vector<float> dhg, dB, dgates;
  const auto& gate = arguments->gate;
  arguments->chunks = sda::dy_chunks(*arguments, wanted);
  if (arguments->dh != nullptr || arguments->dgates != nullptr) {
    arguments->dhg_parts = parts_of(dhg, int64_t(sda::dy_column_blocks(*arguments)) * arguments->M * arguments->R);
  }
  if (arguments->dB != nullptr) {
    arguments->dB_parts = parts_of(dB, int64_t(arguments->chunks) * arguments->N * arguments->R);
  }
  if (arguments->dgates != nullptr && !sda::has_line_per_row(gate, arguments->M)) {
    arguments->dgates_parts = parts_of(dgates, int64_t(sda::dy_gate_parts(*arguments)) * gate.lines * gate.num_experts);
  }
  sda::dy_pass(*arguments, nullptr);
  return arguments->chunks;
}

int emulated_dx_pass(sda::DxArguments* arguments, int wanted) {
  std::vector<float> parts;
  arguments->chunks = sda::dx_chunks(*arguments, wanted);
  arguments->dA_parts = parts_of(parts, int64_t(arguments->chunks) * arguments->R * arguments->K);
  sda::dx_pass(*arguments, nullptr);
  return arguments->chunks;
}
}
