// The low-rank products of one adapted layer in bfloat16, for processors with AMX; sda_fast/ops/host_products.py.
//
// They move x, y or dy once and add in float32. Such a processor multiplies by the frozen weight so fast that the layer
// is bound by them. M rows, C columns (K or N), R ranks; a strip is 32 columns, a block 64 rows, a group 16 ranks.

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && !defined(SDA_FAST_PLAIN) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#define SDA_FAST_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "parts.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#endif

#ifdef SDA_FAST_AMX

namespace {

constexpr std::size_t STRIP = 32, BLOCK = 64, GROUP = 16, TILE = 16;
// Strips that are fetched ahead of the one that is updated, and elements of x or y that are worth a thread.
constexpr std::size_t AHEAD = 8, ELEMENTS_PER_THREAD = 1 << 19;

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// `count` values, a multiple of 16, rounded to the nearest, ties to even.
AMX void round_to_bfloat16(const float* values, std::size_t count, std::uint16_t* out) {
    for (std::size_t index = 0; index < count; index += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + index),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + index)));
}

// A or B^T: element (rank, column) of float32 is at rank * rank_stride + column * column_stride.
struct Factor {
    const float* data;
    std::size_t ranks, columns, rank_stride, column_stride;

    std::size_t strips() const { return ceil_div(columns, STRIP); }
    std::size_t groups() const { return ceil_div(ranks, GROUP); }

    // `count` ranks of a strip from `first` on, as pairs of columns; zeros beyond the last rank and column.
    void round_strip(std::size_t strip, std::size_t first, std::size_t count, std::uint32_t (*out)[STRIP / 2]) const {
        const std::size_t there = std::min(count, ranks - std::min(ranks, first));
        const std::size_t width = std::min(STRIP, columns - strip * STRIP);
        const float* place = data + first * rank_stride + strip * STRIP * column_stride;
        float values[STRIP][STRIP];
        if (there < count || width < STRIP) std::memset(values, 0, sizeof values);
        if (rank_stride == 1) {
            for (std::size_t column = 0; column < width; ++column)
                for (std::size_t rank = 0; rank < there; ++rank)
                    values[rank][column] = place[rank + column * column_stride];
        } else {
            for (std::size_t rank = 0; rank < there; ++rank)
                for (std::size_t column = 0; column < width; ++column)
                    values[rank][column] = place[rank * rank_stride + column * column_stride];
        }
        round_to_bfloat16(values[0], count * STRIP, reinterpret_cast<std::uint16_t*>(out));
    }
};

// [M, R] of float32 with the gates of its rows: one line of gates for every `rows_per_line` rows, or none at all.
struct Hidden {
    const float* data;
    std::size_t stride;
    const float* gates;
    std::size_t ranks, rows_per_line;

    const float* gates_of(std::size_t row) const {
        if (gates == nullptr || row < rows_per_line) return gates;
        return gates + row / rows_per_line * ranks;
    }
};

// Rows and bytes per row of the eight tiles.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    void set(int tile, std::size_t tile_rows, std::size_t bytes) {
        rows[tile] = static_cast<std::uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<std::uint16_t>(bytes);
    }
};

AMX void load(const TileShapes& shapes) {
    // Compilers take the intrinsic to read eight bytes only.
    asm volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
}

AMX void release_tiles() { _tile_release(); }

// Shifts of 32-bit words, written so that GCC 12 does not warn of its own header.
typedef std::uint32_t Words __attribute__((vector_size(64)));
AMX inline __m512i up_16(__m512i words) { return (__m512i)((Words)words << 16); }
AMX inline __m512i down_16(__m512i words) { return (__m512i)((Words)words >> 16); }

// Rows of x from `first` on, of which BLOCK rows and whole strips may be read: x itself, or a copy filled up with zeros.
struct Block {
    const std::uint16_t* data;
    std::size_t stride;
};

Block block_of(const std::uint16_t* x, std::size_t stride, std::size_t rows, std::size_t columns,
               std::vector<std::uint16_t>& copy) {
    if (rows == BLOCK && columns % STRIP == 0) return {x, stride};
    const std::size_t width = ceil_div(columns, STRIP) * STRIP;
    copy.assign(BLOCK * width, 0);
    for (std::size_t row = 0; row < rows; ++row)
        std::memcpy(copy.data() + row * width, x + row * stride, columns * sizeof *x);
    return {copy.data(), width};
}

// For `multiply`: by group and strip 16 pairs of columns x 16 ranks.
std::vector<std::uint32_t> packed_for_multiply(const Factor& factor) {
    std::vector<std::uint32_t> packed(factor.groups() * factor.strips() * STRIP / 2 * GROUP);
    std::uint32_t* out = packed.data();
    std::uint32_t pairs[GROUP][STRIP / 2];
    for (std::size_t group = 0; group < factor.groups(); ++group)
        for (std::size_t strip = 0; strip < factor.strips(); ++strip) {
            factor.round_strip(strip, group * GROUP, GROUP, pairs);
            for (std::size_t pair = 0; pair < STRIP / 2; ++pair)
                for (std::size_t rank = 0; rank < GROUP; ++rank) *out++ = pairs[rank][pair];
        }
    return packed;
}

// out [BLOCK, groups * GROUP] = block * factor^T.
AMX void multiply(const Block& block, std::size_t strips, std::size_t groups, const std::uint32_t* packed, float* out) {
    TileShapes shapes;
    for (int tile = 0; tile < 7; ++tile) shapes.set(tile, TILE, 64);
    load(shapes);
    const std::size_t bytes = block.stride * sizeof(std::uint16_t), step = TILE * block.stride;
    for (std::size_t group = 0; group < groups; ++group) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::size_t strip = 0; strip < strips; ++strip) {
            const std::uint16_t* x = block.data + strip * STRIP;
            _tile_loadd(4, packed + (group * strips + strip) * STRIP / 2 * GROUP, 64);
            _tile_loadd(5, x, bytes);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, x + step, bytes);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(5, x + 2 * step, bytes);
            _tile_dpbf16ps(2, 5, 4);
            _tile_loadd(6, x + 3 * step, bytes);
            _tile_dpbf16ps(3, 6, 4);
        }
        const std::size_t width = groups * GROUP;
        _tile_stored(0, out + group * GROUP, width * sizeof *out);
        _tile_stored(1, out + TILE * width + group * GROUP, width * sizeof *out);
        _tile_stored(2, out + 2 * TILE * width + group * GROUP, width * sizeof *out);
        _tile_stored(3, out + 3 * TILE * width + group * GROUP, width * sizeof *out);
    }
}

// The sums of `accumulate`: by group and strip the even and then the odd columns, of so many ranks each.
struct Sums {
    std::size_t ranks, columns, lines;
    std::vector<float> data;

    Sums(std::size_t ranks, std::size_t columns)
        : ranks(ranks),
          columns(columns),
          lines(std::min(ranks, GROUP)),
          data(ceil_div(ranks, GROUP) * ceil_div(columns, STRIP) * lines * STRIP) {}

    void add(const Sums& other) {
        for (std::size_t index = 0; index < data.size(); ++index) data[index] += other.data[index];
    }

    void write(float* out, std::size_t rank_stride, std::size_t column_stride) const {
        const std::size_t strips = ceil_div(columns, STRIP);
        for (std::size_t rank = 0; rank < ranks; ++rank)
            for (std::size_t strip = 0; strip < strips; ++strip) {
                const float* even = data.data() + ((rank / GROUP * strips + strip) * 2 * lines + rank % GROUP) * TILE;
                const float* odd = even + lines * TILE;
                float* place = out + rank * rank_stride + strip * STRIP * column_stride;
                const std::size_t width = std::min(STRIP, columns - strip * STRIP);
                for (std::size_t column = 0; column < width; ++column)
                    place[column * column_stride] = (column % 2 == 0 ? even : odd)[column / 2];
            }
    }
};

// The gated rows of a block by group and half block: so many lines of 32 rows each; zeros where there are no rows.
void pack_rows(const Hidden& hidden, std::size_t first, std::size_t rows, std::size_t lines, std::vector<float>& values,
               std::vector<std::uint16_t>& packed) {
    const std::size_t size_of_group = BLOCK * lines, groups = ceil_div(hidden.ranks, GROUP);
    values.assign(groups * size_of_group, 0);
    for (std::size_t row = 0; row < rows; ++row) {
        const float* h = hidden.data + (first + row) * hidden.stride;
        const float* gates = hidden.gates_of(first + row);
        float* out = values.data() + row / STRIP * lines * STRIP + row % STRIP;
        for (std::size_t rank = 0; rank < hidden.ranks; ++rank)
            out[rank / GROUP * size_of_group + rank % GROUP * STRIP] = gates == nullptr ? h[rank] : h[rank] * gates[rank];
    }
    packed.resize(values.size());
    round_to_bfloat16(values.data(), values.size(), packed.data());
}

// sums += rows^T * block, for rows packed by `pack_rows`.
AMX void accumulate(const Block& block, const std::uint16_t* rows, Sums& sums) {
    TileShapes shapes;
    for (int tile = 0; tile < 3; ++tile) shapes.set(tile, sums.lines, 64);
    for (int tile = 3; tile < 5; ++tile) shapes.set(tile, TILE, 64);
    load(shapes);
    constexpr std::size_t HALVES = BLOCK / STRIP;
    constexpr __mmask32 UPPER = 0xAAAAAAAA;
    alignas(64) std::uint16_t even[HALVES][TILE][STRIP], odd[HALVES][TILE][STRIP];
    const std::size_t strips = ceil_div(sums.columns, STRIP), groups = ceil_div(sums.ranks, GROUP);
    for (std::size_t strip = 0; strip < strips; ++strip) {
        for (std::size_t pair = 0; pair < BLOCK / 2; ++pair) {
            // Two rows of 32 columns become 16 pairs of the even columns and 16 of the odd ones.
            const std::uint16_t* x = block.data + 2 * pair * block.stride + strip * STRIP;
            const __m512i upper = _mm512_loadu_si512(x), lower = _mm512_loadu_si512(x + block.stride);
            _mm512_store_si512(even[pair / TILE][pair % TILE],
                               _mm512_mask_blend_epi16(UPPER, upper, up_16(lower)));
            _mm512_store_si512(odd[pair / TILE][pair % TILE],
                               _mm512_mask_blend_epi16(UPPER, down_16(upper), lower));
        }
        for (std::size_t group = 0; group < groups; ++group) {
            float* sum = sums.data.data() + (group * strips + strip) * 2 * sums.lines * TILE;
            _tile_loadd(0, sum, 64);
            _tile_loadd(1, sum + sums.lines * TILE, 64);
            for (std::size_t half = 0; half < HALVES; ++half) {
                _tile_loadd(2, rows + (group * HALVES + half) * sums.lines * STRIP, 64);
                _tile_loadd(3, even[half], 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(4, odd[half], 64);
                _tile_dpbf16ps(1, 2, 4);
            }
            _tile_stored(0, sum, 64);
            _tile_stored(1, sum + sums.lines * TILE, 64);
        }
    }
}

// Ranks that `add_product` takes at once: an even number, at most 32.
std::size_t depth_of(std::size_t ranks) { return std::min<std::size_t>(32, ranks + ranks % 2); }

// For `add_product`: by strip and step of `depth` ranks the even and then the odd columns, depth / 2 pairs of ranks each.
std::vector<std::uint32_t> packed_for_adding(const Factor& factor) {
    const std::size_t depth = depth_of(factor.ranks), steps = ceil_div(factor.ranks, depth);
    std::vector<std::uint32_t> packed(factor.strips() * steps * depth * TILE);
    std::uint32_t* out = packed.data();
    std::uint32_t pairs[STRIP][STRIP / 2];
    for (std::size_t strip = 0; strip < factor.strips(); ++strip)
        for (std::size_t step = 0; step < steps; ++step, out += depth * TILE) {
            factor.round_strip(strip, step * depth, depth, pairs);
            for (std::size_t rank = 0; rank < depth; rank += 2)
                for (std::size_t column = 0; column < TILE; ++column) {
                    const std::uint32_t first = pairs[rank][column], second = pairs[rank + 1][column];
                    out[rank / 2 * TILE + column] = (first & 0xFFFF) | second << 16;
                    out[(depth + rank) / 2 * TILE + column] = first >> 16 | (second & 0xFFFF0000);
                }
        }
    return packed;
}

AMX void shape_tiles_for_adding(std::size_t depth) {
    TileShapes shapes;
    for (int tile = 0; tile < 2; ++tile) shapes.set(tile, TILE, 64);
    shapes.set(2, TILE, depth * sizeof(std::uint16_t));
    for (int tile = 3; tile < 5; ++tile) shapes.set(tile, depth / 2, 64);
    load(shapes);
}

// y += rows * factor, for at most TILE rows, given as [TILE, steps * depth]; rounded once. Of the `following` rows after
// them the first strips are fetched.
AMX void add_product(std::uint16_t* y, std::size_t stride, std::size_t rows, std::size_t following, std::size_t columns,
                     std::size_t depth, std::size_t steps, const std::uint16_t* hidden, const std::uint32_t* packed) {
    const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    const std::size_t strips = ceil_div(columns, STRIP);
    alignas(64) float even[TILE][TILE], odd[TILE][TILE];
    for (std::size_t strip = 0; strip < strips; ++strip) {
        _tile_zero(0);
        _tile_zero(1);
        for (std::size_t step = 0; step < steps; ++step) {
            const std::uint32_t* factor = packed + (strip * steps + step) * depth * TILE;
            _tile_loadd(2, hidden + step * depth, steps * depth * sizeof *hidden);
            _tile_loadd(3, factor, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_loadd(4, factor + depth / 2 * TILE, 64);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, even, 64);
        _tile_stored(1, odd, 64);
        const std::size_t left = columns - strip * STRIP, in_next = std::min(strips - 1, strip + AHEAD - strips);
        const __mmask32 mask = left < STRIP ? (__mmask32{1} << left) - 1 : ~__mmask32{0};
        for (std::size_t row = 0; row < rows; ++row) {
            std::uint16_t* place = y + row * stride + strip * STRIP;
            const std::uint16_t* later = place + AHEAD * STRIP;
            if (strip + AHEAD >= strips) later = row < following ? y + (TILE + row) * stride + in_next * STRIP : place;
            _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T0);
            const __m512i values = _mm512_maskz_loadu_epi16(mask, place);
            const __m512 of_even = _mm512_castsi512_ps(up_16(values));
            const __m512 of_odd = _mm512_castsi512_ps(_mm512_and_si512(values, upper));
            const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_add_ps(of_odd, _mm512_load_ps(odd[row])),
                                                        _mm512_add_ps(of_even, _mm512_load_ps(even[row])));
            _mm512_mask_storeu_epi16(place, mask, _mm512_permutexvar_epi16(in_turns, (__m512i)halves));
        }
    }
}

std::size_t parts_of(std::size_t rows, std::size_t columns, std::size_t threads) {
    return sda_fast::number_of_parts(rows, ceil_div(ELEMENTS_PER_THREAD, columns), threads);
}

bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0) return false;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    // The kernel gives a process the tiles' registers when it asks for them.
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

#endif

extern "C" {

// Whether the functions below can run here.
int sda_fast_has_low_rank() {
#ifdef SDA_FAST_AMX
    static const bool there = has_amx();
    return there;
#else
    return 0;
#endif
}

// h [M, R] = x [M, C] * A^T.
void sda_fast_project([[maybe_unused]] const std::uint16_t* x, [[maybe_unused]] std::size_t rows,
                      [[maybe_unused]] std::size_t columns, [[maybe_unused]] std::size_t stride,
                      [[maybe_unused]] const float* A, [[maybe_unused]] std::size_t ranks,
                      [[maybe_unused]] std::size_t rank_stride, [[maybe_unused]] std::size_t column_stride,
                      [[maybe_unused]] float* h, [[maybe_unused]] std::size_t threads) {
#ifdef SDA_FAST_AMX
    const Factor factor{A, ranks, columns, rank_stride, column_stride};
    const std::vector<std::uint32_t> packed = packed_for_multiply(factor);
    const auto work = [&](std::size_t, std::size_t first, std::size_t end) {
        const std::size_t width = factor.groups() * GROUP;
        std::vector<std::uint16_t> copy;
        std::vector<float> out(BLOCK * width);
        for (std::size_t row = first; row < end; row += BLOCK) {
            const std::size_t count = std::min(BLOCK, end - row);
            const Block block = block_of(x + row * stride, stride, count, columns, copy);
            multiply(block, factor.strips(), factor.groups(), packed.data(), out.data());
            for (std::size_t one = 0; one < count; ++one)
                std::copy_n(out.data() + one * width, ranks, h + (row + one) * ranks);
        }
        release_tiles();
    };
    sda_fast::in_parts(rows, parts_of(rows, columns, threads), BLOCK, work);
#endif
}

// y [M, C] += (h * G) [M, R] * B^T in place; without gates h alone.
void sda_fast_expand_add([[maybe_unused]] std::uint16_t* y, [[maybe_unused]] std::size_t rows,
                         [[maybe_unused]] std::size_t columns, [[maybe_unused]] std::size_t stride,
                         [[maybe_unused]] const float* B, [[maybe_unused]] std::size_t ranks,
                         [[maybe_unused]] std::size_t rank_stride, [[maybe_unused]] std::size_t column_stride,
                         [[maybe_unused]] const float* h, [[maybe_unused]] std::size_t h_stride,
                         [[maybe_unused]] const float* gates, [[maybe_unused]] std::size_t rows_per_line,
                         [[maybe_unused]] std::size_t threads) {
#ifdef SDA_FAST_AMX
    const std::vector<std::uint32_t> packed =
        packed_for_adding(Factor{B, ranks, columns, rank_stride, column_stride});
    const Hidden hidden{h, h_stride, gates, ranks, rows_per_line};
    const auto work = [&](std::size_t, std::size_t first, std::size_t end) {
        const std::size_t depth = depth_of(ranks), steps = ceil_div(ranks, depth);
        std::vector<float> values(TILE * steps * depth);
        std::vector<std::uint16_t> narrow(values.size());
        shape_tiles_for_adding(depth);
        for (std::size_t row = first; row < end; row += TILE) {
            const std::size_t count = std::min(TILE, end - row);
            for (std::size_t one = 0; one < count; ++one) {
                const float* from = h + (row + one) * h_stride;
                const float* line = hidden.gates_of(row + one);
                float* out = values.data() + one * steps * depth;
                for (std::size_t rank = 0; rank < ranks; ++rank)
                    out[rank] = line == nullptr ? from[rank] : from[rank] * line[rank];
            }
            round_to_bfloat16(values.data(), values.size(), narrow.data());
            add_product(y + row * stride, stride, count, std::min(TILE, end - row - count), columns, depth, steps,
                        narrow.data(), packed.data());
        }
        release_tiles();
    };
    sda_fast::in_parts(rows, parts_of(rows, columns, threads), TILE, work);
#endif
}

// What reads dy [M, C] (or x), of which any pointer may be null: with dhg = dy * B
//     dh [M, R] = dhg * G,   products [M, R] = dhg * h,   sums (like B) = dy^T * (h * G).
void sda_fast_reduce([[maybe_unused]] const std::uint16_t* dy, [[maybe_unused]] std::size_t rows,
                     [[maybe_unused]] std::size_t columns, [[maybe_unused]] std::size_t stride,
                     [[maybe_unused]] const float* B, [[maybe_unused]] std::size_t ranks,
                     [[maybe_unused]] std::size_t rank_stride, [[maybe_unused]] std::size_t column_stride,
                     [[maybe_unused]] const float* h, [[maybe_unused]] std::size_t h_stride,
                     [[maybe_unused]] const float* gates, [[maybe_unused]] std::size_t rows_per_line,
                     [[maybe_unused]] float* dh, [[maybe_unused]] std::size_t dh_stride,
                     [[maybe_unused]] float* products, [[maybe_unused]] float* sums,
                     [[maybe_unused]] std::size_t sums_rank_stride, [[maybe_unused]] std::size_t sums_column_stride,
                     [[maybe_unused]] std::size_t threads) {
#ifdef SDA_FAST_AMX
    const Factor factor{B, ranks, columns, rank_stride, column_stride};
    const Hidden hidden{h, h_stride, gates, ranks, rows_per_line};
    const bool multiplies = dh != nullptr || products != nullptr;
    const std::vector<std::uint32_t> packed = multiplies ? packed_for_multiply(factor) : std::vector<std::uint32_t>{};
    const std::size_t parts = parts_of(rows, columns, threads);
    std::vector<Sums> of_parts(sums == nullptr ? 0 : parts, Sums(ranks, columns));
    const auto work = [&](std::size_t part, std::size_t first, std::size_t end) {
        const std::size_t width = factor.groups() * GROUP;
        std::vector<std::uint16_t> copy, narrow;
        std::vector<float> out(BLOCK * width), values;
        for (std::size_t row = first; row < end; row += BLOCK) {
            const std::size_t count = std::min(BLOCK, end - row);
            const Block block = block_of(dy + row * stride, stride, count, columns, copy);
            if (multiplies) multiply(block, factor.strips(), factor.groups(), packed.data(), out.data());
            for (std::size_t one = row; multiplies && one < row + count; ++one) {
                const float* dhg = out.data() + (one - row) * width;
                const float* line = hidden.gates_of(one);
                for (std::size_t rank = 0; dh != nullptr && rank < ranks; ++rank)
                    dh[one * dh_stride + rank] = line == nullptr ? dhg[rank] : dhg[rank] * line[rank];
                for (std::size_t rank = 0; products != nullptr && rank < ranks; ++rank)
                    products[one * ranks + rank] = dhg[rank] * h[one * h_stride + rank];
            }
            if (sums == nullptr) continue;
            pack_rows(hidden, row, count, of_parts[part].lines, values, narrow);
            accumulate(block, narrow.data(), of_parts[part]);
        }
        release_tiles();
    };
    sda_fast::in_parts(rows, parts, BLOCK, work);
    if (sums == nullptr) return;
    for (std::size_t part = 1; part < parts; ++part) of_parts[0].add(of_parts[part]);
    of_parts[0].write(sums, sums_rank_stride, sums_column_stride);
#endif
}

}  // extern "C"
