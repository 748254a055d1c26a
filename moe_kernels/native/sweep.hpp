// One pass over the scores: for every token its best expert, the runner-up and the margin between them.
//
// A token's value for expert e is score[t][e] - price[e]. AVX-512 handles float scores sixteen at a time;
// every other case takes the plain loop, with the same result.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "parallel.hpp"

namespace moe {

template <class Score>
struct Rows {
    const Score* data;
    int64_t tokens;
    int64_t experts;
    int64_t step;  // every step-th token of the whole matrix
    const Score* row(int64_t token) const { return data + token * step * experts; }
};

template <class Score>
struct Best {
    std::vector<int32_t> first, second;
    std::vector<Score> margin;
    void resize(int64_t tokens) {
        first.resize(tokens);
        second.resize(tokens);
        margin.resize(tokens);
    }
};

template <class Score>
inline void top2_plain(const Score* row, const Score* price, int64_t experts, int32_t* first, int32_t* second, Score* margin) {
    const Score low = -std::numeric_limits<Score>::infinity();
    Score high = low, next = low;
    int32_t a = 0, b = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const Score value = row[e] - price[e];
        if (value > high) {
            next = high, b = a;
            high = value, a = static_cast<int32_t>(e);
        } else if (value > next) {
            next = value, b = static_cast<int32_t>(e);
        }
    }
    *first = a, *second = b, *margin = high - next;
}

template <class Score>
inline void top2(const Rows<Score>& rows, const Score* price, int64_t t, Best<Score>& best) {
    top2_plain(rows.row(t), price, rows.experts, &best.first[t], &best.second[t], &best.margin[t]);
}

template <class Score>
inline void sweep_range(const Rows<Score>& rows, const Score* price, int64_t from, int64_t to, Best<Score>& best) {
    for (int64_t t = from; t < to; ++t) top2(rows, price, t, best);
}

#if defined(__AVX512F__)
// Sixteen tokens at a time, for few experts: lanes are tokens.
inline void top2_lanes(const Rows<float>& rows, const float* price, int64_t t, Best<float>& best) {
    const __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(rows.step * rows.experts)));
    __m512 high = _mm512_set1_ps(-INFINITY), next = high;
    __m512i a = _mm512_setzero_si512(), b = a;
    const float* row = rows.row(t);
    for (int64_t e = 0; e < rows.experts; ++e) {
        const __m512 value = _mm512_sub_ps(_mm512_i32gather_ps(index, row + e, 4), _mm512_set1_ps(price[e]));
        const __mmask16 above = _mm512_cmp_ps_mask(value, high, _CMP_GT_OQ);
        const __mmask16 between = _mm512_cmp_ps_mask(value, next, _CMP_GT_OQ);
        const __m512i here = _mm512_set1_epi32(static_cast<int>(e));
        b = _mm512_mask_mov_epi32(_mm512_mask_mov_epi32(b, between, here), above, a);
        a = _mm512_mask_mov_epi32(a, above, here);
        next = _mm512_max_ps(next, _mm512_min_ps(value, high));
        high = _mm512_max_ps(high, value);
    }
    _mm512_storeu_si512(&best.first[t], a);
    _mm512_storeu_si512(&best.second[t], b);
    _mm512_storeu_ps(&best.margin[t], _mm512_sub_ps(high, next));
}

template <int kPattern>
inline void fold(__m512& high, __m512& next) {
    const __m512 other = _mm512_shuffle_f32x4(high, high, kPattern), other_next = _mm512_shuffle_f32x4(next, next, kPattern);
    next = _mm512_max_ps(_mm512_min_ps(high, other), _mm512_max_ps(next, other_next));
    high = _mm512_max_ps(high, other);
}

template <int kPattern>
inline void fold_inside(__m512& high, __m512& next) {
    const __m512 other = _mm512_permute_ps(high, kPattern), other_next = _mm512_permute_ps(next, kPattern);
    next = _mm512_max_ps(_mm512_min_ps(high, other), _mm512_max_ps(next, other_next));
    high = _mm512_max_ps(high, other);
}

// One token, for many experts: lanes are experts. The two best values first, then where they stand.
inline void top2_row(const float* row, const float* price, int64_t experts, int32_t* first, int32_t* second, float* margin) {
    __m512 high = _mm512_set1_ps(-INFINITY), next = high;
    const __m512 low = high;
    const int64_t whole = experts & ~int64_t{15};
    const __mmask16 rest = static_cast<__mmask16>((1u << (experts - whole)) - 1u);
    for (int64_t e = 0; e < whole; e += 16) {
        const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(row + e), _mm512_loadu_ps(price + e));
        next = _mm512_max_ps(next, _mm512_min_ps(value, high));
        high = _mm512_max_ps(high, value);
    }
    if (rest) {
        const __m512 value = _mm512_mask_sub_ps(low, rest, _mm512_maskz_loadu_ps(rest, row + whole),
                                                _mm512_maskz_loadu_ps(rest, price + whole));
        next = _mm512_max_ps(next, _mm512_min_ps(value, high));
        high = _mm512_max_ps(high, value);
    }
    fold<0x4E>(high, next);
    fold<0xB1>(high, next);
    fold_inside<0x4E>(high, next);
    fold_inside<0xB1>(high, next);
    int32_t a = -1, b = -1;
    for (int64_t group = 0; group < experts; group += 64) {
        uint64_t is_high = 0, is_next = 0;
        for (int64_t e = group; e < std::min(experts, group + 64); e += 16) {
            const __mmask16 live = e < whole ? static_cast<__mmask16>(0xFFFF) : rest;
            const __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(live, row + e), _mm512_maskz_loadu_ps(live, price + e));
            is_high |= uint64_t(_mm512_mask_cmp_ps_mask(live, value, high, _CMP_EQ_OQ)) << (e - group);
            is_next |= uint64_t(_mm512_mask_cmp_ps_mask(live, value, next, _CMP_EQ_OQ)) << (e - group);
        }
        const bool found = a < 0 && is_high;
        a = found ? static_cast<int32_t>(group) + __builtin_ctzll(is_high | (uint64_t{1} << 63)) : a;
        is_next &= found ? ~(is_high & (0 - is_high)) : ~uint64_t{0};
        b = b < 0 && is_next ? static_cast<int32_t>(group) + __builtin_ctzll(is_next | (uint64_t{1} << 63)) : b;
    }
    *first = a, *second = b, *margin = _mm512_cvtss_f32(_mm512_sub_ps(high, next));
}

template <>
inline void top2<float>(const Rows<float>& rows, const float* price, int64_t t, Best<float>& best) {
    const float* ahead = rows.row(std::min(t + 8, rows.tokens - 1));
    for (int64_t e = 0; e < std::min<int64_t>(rows.experts, 256); e += 16) _mm_prefetch(reinterpret_cast<const char*>(ahead + e), _MM_HINT_T0);
    if (rows.experts < 16) return top2_plain(rows.row(t), price, rows.experts, &best.first[t], &best.second[t], &best.margin[t]);
    top2_row(rows.row(t), price, rows.experts, &best.first[t], &best.second[t], &best.margin[t]);
}

template <>
inline void sweep_range<float>(const Rows<float>& rows, const float* price, int64_t from, int64_t to, Best<float>& best) {
    int64_t t = from;
    if (rows.experts < 16 && rows.step * rows.experts * 15 < (int64_t{1} << 31)) {
        for (; t + 16 <= to; t += 16) top2_lanes(rows, price, t, best);
    }
    for (; t < to; ++t) top2(rows, price, t, best);
}
#endif

}  // namespace moe
