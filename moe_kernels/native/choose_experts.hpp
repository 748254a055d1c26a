// Token choice: the k best experts of each token, best first. What is not a number counts as the lowest score; of equal
// scores the lower index comes first.
#pragma once
#include <utility>

#include "choose_tokens.hpp"

namespace moe {

// `left` is scratch of `experts` scores.
inline void best_plain(const float* row, int64_t experts, int64_t k, float* left, int64_t* best) {
    for (int64_t e = 0; e < experts; ++e) left[e] = usable(row[e]);
    for (int64_t place = 0; place < k; ++place) {
        int64_t at = 0;
        for (int64_t e = 1; e < experts; ++e)
            if (left[e] > left[at]) at = e;
        best[place] = at;
        left[at] = kAll;
    }
}

#if defined(__AVX512F__)
inline __m512i lanes() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// Adds how many of the values `turn` lanes on, in a circle, beat each one: greater ones and, where asked for, equal ones
// in lower lanes.
template <bool kHasTies, int turn>
inline __m512i beaten(__m512i rank, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512 other = _mm512_castsi512_ps(_mm512_alignr_epi32(bits, bits, turn));
    __mmask16 above = _mm512_cmp_ps_mask(other, value, _CMP_GT_OQ);
    if (kHasTies) above |= _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(0xFFFF << (16 - turn)), other, value, _CMP_EQ_OQ);
    return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1));
}

template <bool kHasTies, int... turns>
inline __m512i ranks_of(__m512 value, std::integer_sequence<int, turns...>) {
    __m512i one = _mm512_setzero_si512(), two = one;  // two sums, for two chains
    ((turns & 1 ? one = beaten<kHasTies, turns + 1>(one, value) : two = beaten<kHasTies, turns + 1>(two, value)), ...);
    return _mm512_add_epi32(one, two);
}

template <bool kHasTies>
inline __m512i ranks(__m512 value) {
    return ranks_of<kHasTies>(value, std::make_integer_sequence<int, 15>());
}

// For k <= 16. The k-th greatest of sixteen lane maxima bounds the k-th score from below; when at most sixteen scores
// reach it, ranking these answers. Returns false when more do.
inline bool best_few(const float* row, int64_t experts, int64_t k, int64_t* best) {
    const __m512 lowest = _mm512_set1_ps(kLowest), none = _mm512_set1_ps(kAll);
    const auto live = [&](int64_t e) { return experts - e >= 16 ? __mmask16(0xFFFF) : static_cast<__mmask16>((1u << (experts - e)) - 1u); };
    alignas(64) float value[32];
    alignas(64) int32_t index[32], rank[16], sorted[16];
    if (experts <= 16) {
        _mm512_store_ps(value, _mm512_mask_max_ps(none, live(0), _mm512_maskz_loadu_ps(live(0), row), lowest));
        _mm512_store_si512(index, lanes());
    } else {
        __m512 high = lowest;
        for (int64_t e = 0; e < experts; e += 16) high = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, live(e), row + e), high);
        const __mmask16 leading = _mm512_cmplt_epi32_mask(ranks<false>(high), _mm512_set1_epi32(static_cast<int>(k)));
        const __m512 bound = _mm512_set1_ps(_mm512_mask_reduce_min_ps(leading, high));
        if (!(_mm512_cvtss_f32(bound) > kLowest)) return false;
        _mm512_store_ps(value, none);
        _mm512_store_si512(index, lanes());
        int64_t count = 0;
        for (int64_t e = 0; e < experts && count <= 16; e += 16) {
            const __m512 part = _mm512_mask_loadu_ps(none, live(e), row + e);
            const __mmask16 reach = _mm512_cmp_ps_mask(part, bound, _CMP_GE_OQ);
            _mm512_storeu_ps(value + count, _mm512_mask_compress_ps(none, reach, part));
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(reach, _mm512_add_epi32(lanes(), _mm512_set1_epi32(static_cast<int>(e)))));
            count += __builtin_popcount(reach);
        }
        if (count > 16) return false;
    }
    _mm512_store_si512(rank, ranks<true>(_mm512_load_ps(value)));
    for (int i = 0; i < 16; ++i) sorted[rank[i]] = index[i];
    for (int64_t i = 0; i < k; ++i) best[i] = sorted[i];
    return true;
}
#endif

inline void best_experts(const float* row, int64_t experts, int64_t k, float* left, int64_t* best) {
#if defined(__AVX512F__)
    if (k <= 16 && best_few(row, experts, k, best)) return;
#endif
    best_plain(row, experts, k, left, best);
}

// exp(x) for x <= 0 to 2 ulp, 0 below -87; what is not a number stays so.
inline float exp_of(float x) {
    const float near = x < -87.0f ? -87.0f : x, shift = 12582912.0f;
    const float n = (near * 1.44269504088896341f + shift) - shift, r = (near - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}

constexpr int64_t kBlock = 64;

// The softmax over the chosen scores of up to kBlock tokens; `part` is scratch of k * kBlock, one token beside the other.
inline void softmax_of(const float* scores, int64_t tokens, int64_t experts, const int64_t* best, int64_t k, float* part, float* weight) {
    float most[kBlock], sum[kBlock] = {0};
    for (int64_t t = 0; t < kBlock; ++t) most[t] = kAll;
    for (int64_t i = 0; i < k * kBlock; ++i) part[i] = 0;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < k; ++i) part[i * kBlock + t] = scores[t * experts + best[t * k + i]];
    for (int64_t i = 0; i < k; ++i)
        for (int64_t t = 0; t < kBlock; ++t) most[t] = part[i * kBlock + t] > most[t] ? part[i * kBlock + t] : most[t];
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t t = 0; t < kBlock; ++t) part[i * kBlock + t] = exp_of(part[i * kBlock + t] - most[t]);
        for (int64_t t = 0; t < kBlock; ++t) sum[t] += part[i * kBlock + t];
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < k; ++i) weight[t * k + i] = part[i * kBlock + t] / sum[t];
}

// Best experts of all tokens; the softmax over the chosen scores too, unless `weight` is null.
inline void choose_experts(const float* scores, int64_t tokens, int64_t experts, int64_t k, int threads, int64_t* expert_of, float* weight) {
    parallel(tokens, 2 * experts + 32 * k, threads, kBlock, [&](int64_t from, int64_t to) {
        std::vector<float> left(experts), part(weight ? k * kBlock : 0);
        for (int64_t begin = from; begin < to; begin += kBlock) {
            const int64_t end = std::min(to, begin + kBlock);
            int64_t* best = expert_of + begin * k;
            for (int64_t t = begin; t < end; ++t) best_experts(scores + t * experts, experts, k, left.data(), expert_of + t * k);
            if (weight) softmax_of(scores + begin * experts, end - begin, experts, best, k, part.data(), weight + begin * k);
        }
    });
}

// order[i] is the copy in row i of the stable sort by expert, row[c] the row of copy c. False when an id is out of range.
inline bool sort_copies(const int64_t* expert_of, int64_t copies, int64_t experts, int threads, int64_t* order, int64_t* row, int64_t* counts) {
    const int parts = copies < (int64_t{1} << 14) ? 1 : std::max(1, threads);
    std::vector<std::vector<int64_t>> next(parts, std::vector<int64_t>(experts, 0));
    std::vector<char> is_bad(parts, 0);
    run_parts(parts, [&](int part) {
        int64_t* mine = next[part].data();
        for (int64_t c = copies * part / parts; c < copies * (part + 1) / parts && !is_bad[part]; ++c) {
            if (expert_of[c] < 0 || expert_of[c] >= experts)
                is_bad[part] = 1;
            else
                ++mine[expert_of[c]];
        }
    });
    if (std::count(is_bad.begin(), is_bad.end(), 1)) return false;
    for (int64_t e = 0, begin = 0; e < experts; ++e) {  // counts become the first rows
        const int64_t first = begin;
        for (auto& mine : next) begin += std::exchange(mine[e], begin);
        counts[e] = begin - first;
    }
    run_parts(parts, [&](int part) {
        int64_t* mine = next[part].data();
        for (int64_t c = copies * part / parts; c < copies * (part + 1) / parts; ++c) {
            const int64_t at = mine[expert_of[c]]++;
            order[at] = c;
            row[c] = at;
        }
    });
    return true;
}

}  // namespace moe
