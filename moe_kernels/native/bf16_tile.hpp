// Products of bfloat16 matrices in tiles of 6 x 64 with AVX512-BF16, and the packing that they need.
//
// An instruction multiplies pairs along the summed dimension, so operands come as 32-bit pairs: the left one as a pointer
// per row of the tile and a step from pair to pair, the right one packed as panels of 64 columns, pair after pair. Every
// element is one chain of sums in float32 over the pairs in order, whatever tile it falls into.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>

namespace moe {

using Bf16 = uint16_t;

constexpr int kTileRows = 6, kPanel = 64;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> make_buffer(int64_t count) {
    void* memory = std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(memory));
}

inline __mmask32 first_words(int64_t count) { return count >= 32 ? ~__mmask32(0) : (__mmask32(1) << (count < 0 ? 0 : count)) - 1; }
inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? __mmask16(0xFFFF) : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1u); }

inline uint32_t pair_at(const Bf16* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}

// tile[rows][64] (= or +=) left[rows][2 * pairs] * panel.
template <int kRows>
inline void multiply_rows(const Bf16* const* left, int64_t step, const uint32_t* panel, int64_t pairs, bool is_sum, float* tile) {
    __m512 sum[kRows][4];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][j] = is_sum ? _mm512_load_ps(tile + i * kPanel + 16 * j) : _mm512_setzero_ps();
    for (int64_t p = 0, at = 0; p < pairs; ++p, at += step, panel += kPanel) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) right[j] = (__m512bh)_mm512_load_si512(panel + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_at(left[i] + at)));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], pair, right[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) _mm512_store_ps(tile + i * kPanel + 16 * j, sum[i][j]);
}

// `step` counts elements: 2 where a row's pairs lie one after the other.
inline void multiply(const Bf16* const* left, int64_t rows, int64_t step, const uint32_t* panel, int64_t pairs, bool is_sum, float* tile) {
    switch (rows) {
        case 1: return multiply_rows<1>(left, step, panel, pairs, is_sum, tile);
        case 2: return multiply_rows<2>(left, step, panel, pairs, is_sum, tile);
        case 3: return multiply_rows<3>(left, step, panel, pairs, is_sum, tile);
        case 4: return multiply_rows<4>(left, step, panel, pairs, is_sum, tile);
        case 5: return multiply_rows<5>(left, step, panel, pairs, is_sum, tile);
        default: return multiply_rows<6>(left, step, panel, pairs, is_sum, tile);
    }
}

// 16 pairs, each of the same column of two rows.
inline void interleave(const Bf16* even, const Bf16* odd, int64_t width, __m512i& low, __m512i& high) {
    alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i from = _mm512_load_si512(kLow), a = _mm512_maskz_loadu_epi16(first_words(width), even);
    const __m512i b = odd ? _mm512_maskz_loadu_epi16(first_words(width), odd) : _mm512_setzero_si512();
    low = _mm512_permutex2var_epi16(a, from, b);
    high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(from, _mm512_set1_epi16(16)), b);
}

// Panel of columns begin .. begin + 64 of a matrix whose row k is `row(k)`; columns from `width` on are zero.
template <class Row>
inline void pack_panel(const Row& row, int64_t rows, int64_t begin, int64_t width, uint32_t* panel) {
    for (int64_t k = 0; k < rows; k += 2, panel += kPanel) {
        const Bf16 *even = row(k) + begin, *odd = k + 1 < rows ? row(k + 1) + begin : nullptr;
        for (int half = 0; half < 2; ++half) {
            __m512i low, high;
            interleave(even + 32 * half, odd ? odd + 32 * half : nullptr, width - begin - 32 * half, low, high);
            _mm512_store_si512(panel + 32 * half, low);
            _mm512_store_si512(panel + 32 * half + 16, high);
        }
    }
}

template <int... k>
inline void store_blocks(const __m512i (&part)[7], uint32_t* block, int64_t stride, int64_t blocks, std::integer_sequence<int, k...>) {
    ((k < blocks ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + k * stride),
                                       _mm512_castsi512_si256(_mm512_alignr_epi32(part[k * kTileRows / 16 + 1], part[k * kTileRows / 16], k * kTileRows % 16)))
                 : void()), ...);
}

// Words from one block of six rows of a packed left operand to the next.
inline int64_t block_words(int64_t rows) { return (rows + 1) / 2 * kTileRows + 2; }

// The transpose of a matrix of `width` columns as left operand: pair p of row 6 * b + r lies at b * block_words + 6 * p + r.
// Stores are two words longer than a block; the next pair writes over them.
template <class Row>
inline void pack_left(const Row& row, int64_t rows, int64_t width, uint32_t* packed) {
    constexpr int64_t kBlocks = 16, kColumns = kBlocks * kTileRows;
    const int64_t stride = block_words(rows);
    for (int64_t p = 0; 2 * p < rows; ++p) {
        const Bf16 *even = row(2 * p), *odd = 2 * p + 1 < rows ? row(2 * p + 1) : nullptr;
        for (int64_t column = 0; column < width; column += kColumns) {
            __m512i part[7];
            for (int k = 0; k < 3; ++k) {
                const int64_t at = column + 32 * k;
                interleave(even + at, odd ? odd + at : nullptr, width - at, part[2 * k], part[2 * k + 1]);
            }
            part[6] = part[5];
            store_blocks(part, packed + column / kTileRows * stride + p * kTileRows, stride, (width - column + kTileRows - 1) / kTileRows,
                         std::make_integer_sequence<int, kBlocks>());
        }
    }
}

// Sixteen rows of sixteen pairs, turned over.
inline void transpose(__m512i (&row)[16]) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            row[i + 2 * k] = _mm512_unpacklo_epi64(other[i + k], other[i + k + 2]);
            row[i + 2 * k + 1] = _mm512_unpackhi_epi64(other[i + k], other[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; ++k) {
            other[i + k] = _mm512_shuffle_i32x4(row[i + k], row[i + k + 4], 0x88);
            other[i + k + 4] = _mm512_shuffle_i32x4(row[i + k], row[i + k + 4], 0xDD);
        }
    for (int k = 0; k < 8; ++k) {
        row[k] = _mm512_shuffle_i32x4(other[k], other[k + 8], 0x88);
        row[k + 8] = _mm512_shuffle_i32x4(other[k], other[k + 8], 0xDD);
    }
}

// Panel of columns begin .. begin + 64 of the transpose of a matrix with `width` rows of `depth` elements, depth even.
inline void pack_transposed(const Bf16* matrix, int64_t depth, int64_t begin, int64_t width, uint32_t* panel) {
    const int64_t pairs = depth / 2;
    for (int64_t p = 0; p < pairs; p += 16)
        for (int quarter = 0; quarter < 4; ++quarter) {
            __m512i row[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t n = begin + 16 * quarter + i;
                row[i] = n < width ? _mm512_maskz_loadu_epi32(first_lanes(pairs - p), matrix + n * depth + 2 * p) : _mm512_setzero_si512();
            }
            transpose(row);
            for (int64_t k = 0; k < std::min<int64_t>(16, pairs - p); ++k) _mm512_store_si512(panel + (p + k) * kPanel + 16 * quarter, row[k]);
        }
}

inline void store_bf16(Bf16* to, __mmask16 live, __m512 value) { _mm256_mask_storeu_epi16(to, live, (__m256i)_mm512_cvtneps_pbh(value)); }

inline __m512 load_bf16(const Bf16* from, __mmask16 live) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from)), 16));
}

// 1 / (1 + exp(-x)) to about 1e-6; what is not a number stays so.
inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 y = _mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_max_ps(_mm512_set1_ps(-80.0f), _mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504088896341f)), 8);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y));
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    for (const float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, one));
    const __m512 d = _mm512_add_ps(one, _mm512_scalef_ps(p, n)), guess = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(d, guess, _mm512_set1_ps(2.0f)));
}

}  // namespace moe
