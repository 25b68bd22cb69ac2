// The dropout mask of sda_fast/ops/dropout.py on the host: drawn by Philox4x32-7, and applied to a matrix.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "parts.h"

#if defined(__x86_64__) && !defined(SDA_FAST_PLAIN)
#define SDA_FAST_AVX2
#include <immintrin.h>
#endif

namespace {

constexpr std::uint32_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57;
constexpr std::uint32_t WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
constexpr int ROUNDS = 7;
// Bytes of the mask that are worth a thread: a good 0.1 ms of work.
constexpr std::size_t BYTES_PER_THREAD = 65536;

// How many of `count` items, each of so many bytes of the mask, are worth a thread.
inline std::size_t items_per_thread(std::size_t bytes) {
    return (BYTES_PER_THREAD + bytes - 1) / std::max<std::size_t>(1, bytes);
}

// Bit 2i and bit 2i + 1: whether the lower and the upper half of word i reach the threshold, at most 65535.
inline std::uint32_t kept_bits(std::uint32_t word, std::uint32_t threshold) {
    const std::uint32_t room = 65536 - threshold;
    return (((word & 0xFFFF) + room) >> 16) | ((((word >> 16) + room) >> 16) << 1);
}

void keep_bits_plain(std::uint64_t first, std::size_t count, std::uint32_t threshold, std::uint64_t seed,
                     std::uint8_t* bits) {
    for (std::size_t index = 0; index < count; ++index) {
        const std::uint64_t counter = first + index;
        std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32);
        std::uint32_t c2 = 0, c3 = 0;
        std::uint32_t key_0 = static_cast<std::uint32_t>(seed), key_1 = static_cast<std::uint32_t>(seed >> 32);
        for (int round = 0; round < ROUNDS; ++round) {
            const std::uint64_t product_0 = std::uint64_t{c0} * MULTIPLIER_0;
            const std::uint64_t product_1 = std::uint64_t{c2} * MULTIPLIER_1;
            c0 = static_cast<std::uint32_t>(product_1 >> 32) ^ c1 ^ key_0;
            c2 = static_cast<std::uint32_t>(product_0 >> 32) ^ c3 ^ key_1;
            c1 = static_cast<std::uint32_t>(product_1);
            c3 = static_cast<std::uint32_t>(product_0);
            key_0 += WEYL_0;
            key_1 += WEYL_1;
        }
        bits[index] = static_cast<std::uint8_t>(kept_bits(c0, threshold) | kept_bits(c1, threshold) << 2 |
                                                kept_bits(c2, threshold) << 4 | kept_bits(c3, threshold) << 6);
    }
}

#ifdef SDA_FAST_AVX2

constexpr int LANES = 4, STEPS = 8, BLOCK = LANES * STEPS;

__attribute__((target("avx2"))) inline __m256i kept_samples(__m256i lower_word, __m256i upper_word, __m256i threshold) {
    const __m256i samples = _mm256_blend_epi32(lower_word, _mm256_slli_epi64(upper_word, 32), 0b10101010);
    return _mm256_cmpeq_epi16(_mm256_max_epu16(samples, threshold), samples);
}

// A 64-bit lane holds a counter's word in its lower half, and rubbish above, which the product does not read.
__attribute__((target("avx2"))) void keep_bits_avx2(std::uint64_t first, std::size_t count, std::uint32_t threshold,
                                                    std::uint64_t seed, std::uint8_t* bits) {
    __m256i key_0[ROUNDS], key_1[ROUNDS];
    for (int round = 0; round < ROUNDS; ++round) {
        key_0[round] = _mm256_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(seed) + round * WEYL_0));
        key_1[round] = _mm256_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(seed >> 32) + round * WEYL_1));
    }
    const __m256i multiplier_0 = _mm256_set1_epi32(static_cast<int>(MULTIPLIER_0));
    const __m256i multiplier_1 = _mm256_set1_epi32(static_cast<int>(MULTIPLIER_1));
    const __m256i least = _mm256_set1_epi16(static_cast<short>(threshold));
    const __m256i lower_bits = _mm256_set1_epi64x(0x0008000400020001), upper_bits = _mm256_slli_epi16(lower_bits, 4);
    const __m256i zero = _mm256_setzero_si256();
    for (std::size_t start = 0; start < count; start += BLOCK) {
        // Lane by lane eight neighbours, so that their eight bytes make up the lane at the end.
        __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first + start)),
                                           _mm256_setr_epi64x(0, STEPS, 2 * STEPS, 3 * STEPS));
        __m256i bytes = zero;
        for (int step = 0; step < STEPS; ++step) {
            __m256i c0 = counter, c1 = _mm256_srli_epi64(counter, 32), c2 = zero, c3 = zero;
            for (int round = 0; round < ROUNDS; ++round) {
                const __m256i product_0 = _mm256_mul_epu32(c0, multiplier_0);
                const __m256i product_1 = _mm256_mul_epu32(c2, multiplier_1);
                c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_1, 32), c1), key_0[round]);
                c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product_0, 32), c3), key_1[round]);
                c1 = product_1;
                c3 = product_0;
            }
            const __m256i kept = _mm256_or_si256(_mm256_and_si256(kept_samples(c0, c1, least), lower_bits),
                                                 _mm256_and_si256(kept_samples(c2, c3, least), upper_bits));
            const __m256i byte = _mm256_sad_epu8(kept, zero);
            bytes = _mm256_or_si256(_mm256_srli_epi64(bytes, 8), _mm256_slli_epi64(byte, 56));
            counter = _mm256_add_epi64(counter, _mm256_set1_epi64x(1));
        }
        alignas(32) std::uint8_t block[BLOCK];
        _mm256_store_si256(reinterpret_cast<__m256i*>(block), bytes);
        std::memcpy(bits + start, block, count - start < BLOCK ? count - start : BLOCK);
    }
}

#endif

void keep_bits(std::uint64_t first, std::size_t count, std::uint32_t threshold, std::uint64_t seed,
               std::uint8_t* bits) {
#ifdef SDA_FAST_AVX2
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) return keep_bits_avx2(first, count, threshold, seed, bits);
#endif
    keep_bits_plain(first, count, threshold, seed, bits);
}

template <typename Word>
void drop_rows(const Word* values, const std::uint8_t* bits, std::size_t rows, std::size_t columns, Word* out) {
    constexpr int WIDTH = 16 / sizeof(Word);
    typedef Word Words __attribute__((vector_size(16)));
    Words places[8 / WIDTH];
    for (int column = 0; column < 8; ++column) places[column / WIDTH][column % WIDTH] = static_cast<Word>(1 << column);
    for (std::size_t row = 0; row < rows; ++row) {
        std::size_t column = 0;
        for (; column + 8 <= columns; column += 8, ++bits) {
            for (int part = 0; part < 8 / WIDTH; ++part) {
                Words words;
                std::memcpy(&words, values + column + part * WIDTH, sizeof words);
                words &= reinterpret_cast<Words>((places[part] & static_cast<Word>(*bits)) == places[part]);
                std::memcpy(out + column + part * WIDTH, &words, sizeof words);
            }
        }
        for (std::size_t left = column; left < columns; ++left)
            out[left] = *bits >> (left - column) & 1 ? values[left] : Word{0};
        bits += column < columns;
        values += columns;
        out += columns;
    }
}

template <typename Word>
void drop(const Word* values, const std::uint8_t* bits, std::size_t rows, std::size_t columns, Word* out,
          std::size_t threads) {
    const std::size_t bytes = (columns + 7) / 8;
    const std::size_t parts = sda_fast::number_of_parts(rows, items_per_thread(bytes), threads);
    sda_fast::in_parts(rows, parts, 1, [=](std::size_t, std::size_t first, std::size_t end) {
        drop_rows(values + first * columns, bits + first * bytes, end - first, columns, out + first * columns);
    });
}

}  // namespace

extern "C" {

void sda_fast_keep_bits(std::uint64_t first, std::size_t count, std::uint32_t threshold, std::uint64_t seed,
                        std::uint8_t* bits, std::size_t threads) {
    const std::size_t parts = sda_fast::number_of_parts(count, items_per_thread(1), threads);
    sda_fast::in_parts(count, parts, 1, [=](std::size_t, std::size_t start, std::size_t end) {
        keep_bits(first + start, end - start, threshold, seed, bits + start);
    });
}

void sda_fast_drop_16(const std::uint16_t* values, const std::uint8_t* bits, std::size_t rows, std::size_t columns,
                      std::uint16_t* out, std::size_t threads) {
    drop(values, bits, rows, columns, out, threads);
}

void sda_fast_drop_32(const std::uint32_t* values, const std::uint8_t* bits, std::size_t rows, std::size_t columns,
                      std::uint32_t* out, std::size_t threads) {
    drop(values, bits, rows, columns, out, threads);
}

void sda_fast_drop_64(const std::uint64_t* values, const std::uint8_t* bits, std::size_t rows, std::size_t columns,
                      std::uint64_t* out, std::size_t threads) {
    drop(values, bits, rows, columns, out, threads);
}

}  // extern "C"
