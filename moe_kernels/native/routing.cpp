// Routing in single passes: the K best experts of each token, the C best tokens of each expert, and a stable counting
// sort of routed copies by expert. What is not a number counts as the lowest score; ties go to the lower index.
#include <cstring>

#include "sweep.hpp"

namespace moe {

constexpr float kLowest = -std::numeric_limits<float>::max();

inline float usable(float score) { return score > kLowest ? score : kLowest; }

// The k best of a row, best first. `left` is scratch of at least `experts` rounded up to 16.
inline void top_k_row(const float* row, int64_t experts, int64_t k, float* left, int64_t* best) {
    const int64_t padded = (experts + 15) & ~int64_t{15};
    for (int64_t e = 0; e < experts; ++e) left[e] = usable(row[e]);
    for (int64_t e = experts; e < padded; ++e) left[e] = -INFINITY;
    for (int64_t place = 0; place < k; ++place) {
        int64_t at = 0;
#if defined(__AVX512F__)
        __m512 high = _mm512_loadu_ps(left);
        for (int64_t e = 16; e < padded; e += 16) high = _mm512_max_ps(high, _mm512_loadu_ps(left + e));
        const __m512 all = _mm512_set1_ps(_mm512_reduce_max_ps(high));
        for (int64_t e = 0; e < padded; e += 16) {
            const unsigned same = _mm512_cmp_ps_mask(_mm512_loadu_ps(left + e), all, _CMP_EQ_OQ);
            if (same) {
                at = e + __builtin_ctz(same);
                break;
            }
        }
#else
        for (int64_t e = 1; e < experts; ++e)
            if (left[e] > left[at]) at = e;
#endif
        best[place] = at;
        left[at] = -INFINITY;
    }
}

#if defined(__AVX512F__)
// How many of the sixteen values beat each one: greater ones, and equal ones of a lower index.
inline __m512i ranks(__m512 value, __m512i index) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), one = _mm512_set1_epi32(1);
    __m512i rank = _mm512_setzero_si512();
    for (int turn = 1; turn < 16; ++turn) {
        const __m512i from = _mm512_and_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(turn)), _mm512_set1_epi32(15));
        const __m512 other = _mm512_permutexvar_ps(from, value);
        const __mmask16 above = _mm512_cmp_ps_mask(other, value, _CMP_GT_OQ), same = _mm512_cmp_ps_mask(other, value, _CMP_EQ_OQ);
        const __mmask16 earlier = _mm512_mask_cmplt_epi32_mask(same, _mm512_permutexvar_epi32(from, index), index);
        rank = _mm512_mask_add_epi32(rank, above | earlier, rank, one);
    }
    return rank;
}

// For k <= 16 of at least 32 experts. The k-th greatest of sixteen lane maxima bounds the k-th score from below; when at
// most sixteen scores reach it, ranking these answers. Returns false when more do.
inline bool top_k_few(const float* row, int64_t experts, int64_t k, int64_t* best) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 high = _mm512_set1_ps(kLowest);
    for (int64_t e = 0; e < experts; e += 16) high = _mm512_max_ps(_mm512_loadu_ps(row + e), high);
    const __mmask16 leading = _mm512_cmplt_epi32_mask(ranks(high, lanes), _mm512_set1_epi32(static_cast<int>(k)));
    const float bound = _mm512_mask_reduce_min_ps(leading, high);
    if (!(bound > kLowest)) return false;
    float value[32];
    int32_t index[32];
    _mm512_storeu_ps(value, _mm512_set1_ps(-INFINITY));
    _mm512_storeu_si512(index, lanes);
    int64_t count = 0;
    for (int64_t e = 0; e < experts && count <= 16; e += 16) {
        const __m512 part = _mm512_loadu_ps(row + e);
        const __mmask16 reach = _mm512_cmp_ps_mask(part, _mm512_set1_ps(bound), _CMP_GE_OQ);
        const __m512i here = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(e)));
        _mm512_storeu_ps(value + count, _mm512_mask_compress_ps(_mm512_set1_ps(-INFINITY), reach, part));
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(reach, here));
        count += __builtin_popcount(reach);
    }
    if (count > 16) return false;
    int32_t rank[16];
    _mm512_storeu_si512(rank, ranks(_mm512_loadu_ps(value), _mm512_loadu_si512(index)));
    for (int64_t i = 0; i < count; ++i)
        if (rank[i] < k) best[rank[i]] = index[i];
    return true;
}
#endif

inline void top_k(const float* scores, int64_t tokens, int64_t experts, int64_t k, int threads, int64_t* expert_of) {
    parallel(tokens, experts * 2, threads, [&](int64_t from, int64_t to) {
        std::vector<float> left((experts + 15) & ~int64_t{15});
        for (int64_t t = from; t < to; ++t) {
#if defined(__AVX512F__)
            const bool is_fit = experts >= 32 && experts % 16 == 0 && k <= 16;
            if (is_fit && top_k_few(scores + t * experts, experts, k, expert_of + t * k)) continue;
#endif
            top_k_row(scores + t * experts, experts, k, left.data(), expert_of + t * k);
        }
    });
}

struct Candidate {
    float score;
    int32_t token;
    bool operator<(const Candidate& other) const { return score != other.score ? score > other.score : token < other.token; }
};

// For each expert a score that a few more than `wanted` tokens reach, from a sample of the rows.
inline std::vector<float> guess_thresholds(const float* scores, int64_t tokens, int64_t experts, int64_t wanted) {
    const int64_t stride = std::max<int64_t>(tokens / 1024, std::min<int64_t>(8, tokens / 256)) | 1, count = (tokens + stride - 1) / stride;
    std::vector<float> sample(count * experts), threshold(experts, kLowest);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t e = 0; e < experts; ++e) sample[e * count + i] = usable(scores[i * stride * experts + e]);
    const double share = double(wanted) / double(tokens);
    const int64_t place = static_cast<int64_t>(share * double(count) + 3 * std::sqrt(share * double(count)) + 3);
    if (place >= count) return threshold;
    for (int64_t e = 0; e < experts; ++e) {
        float* column = &sample[e * count];
        std::nth_element(column, column + place, column + count, std::greater<float>());
        threshold[e] = column[place];
    }
    return threshold;
}

inline void gather(const float* scores, int64_t from, int64_t to, int64_t experts, const std::vector<float>& threshold,
                   std::vector<std::vector<Candidate>>& found) {
    for (int64_t t = from; t < to; ++t) {
        const float* row = scores + t * experts;
        int64_t e = 0;
#if defined(__AVX512F__)
        for (; e + 16 <= experts; e += 16) {
            unsigned hits = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + e), _mm512_loadu_ps(&threshold[e]), _CMP_NLT_UQ);
            for (; hits; hits &= hits - 1) {
                const int64_t at = e + __builtin_ctz(hits);
                if (usable(row[at]) >= threshold[at]) found[at].push_back({usable(row[at]), static_cast<int32_t>(t)});
            }
        }
#endif
        for (; e < experts; ++e)
            if (usable(row[e]) >= threshold[e]) found[e].push_back({usable(row[e]), static_cast<int32_t>(t)});
    }
}

// The `capacity` best tokens of each expert, in ascending order of the token.
inline void best_tokens(const float* scores, int64_t tokens, int64_t experts, int64_t capacity, int threads, int64_t* token_of) {
    using Lists = std::vector<std::vector<Candidate>>;
    const std::vector<float> threshold = guess_thresholds(scores, tokens, experts, capacity);
    const int64_t share = std::max<int64_t>(4096, (tokens + threads - 1) / std::max(1, threads));
    const int64_t parts = (tokens + share - 1) / share;
    std::vector<Lists> found(parts, Lists(experts));
    parallel(parts, share * experts, static_cast<int>(parts), 1, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part)
            gather(scores, part * share, std::min(tokens, (part + 1) * share), experts, threshold, found[part]);
    });
    parallel(experts, 8 * capacity, threads, 1, [&](int64_t from, int64_t to) {
        std::vector<Candidate> list;
        for (int64_t e = from; e < to; ++e) {
            list.clear();
            for (const Lists& lists : found) list.insert(list.end(), lists[e].begin(), lists[e].end());
            if (static_cast<int64_t>(list.size()) < capacity) {
                list.clear();
                for (int64_t t = 0; t < tokens; ++t) list.push_back({usable(scores[t * experts + e]), static_cast<int32_t>(t)});
            }
            std::nth_element(list.begin(), list.begin() + capacity - 1, list.end());
            int64_t* out = token_of + e * capacity;
            for (int64_t c = 0; c < capacity; ++c) out[c] = list[c].token;
            std::sort(out, out + capacity);
        }
    });
}

// order[i] is the copy in row i of the sort by expert, row[c] the row of copy c.
inline bool sort_copies(const int64_t* expert_of, int64_t copies, int64_t experts, int64_t* order, int64_t* row, int64_t* counts) {
    std::fill(counts, counts + experts, 0);
    for (int64_t c = 0; c < copies; ++c) {
        if (expert_of[c] < 0 || expert_of[c] >= experts) return false;
        ++counts[expert_of[c]];
    }
    std::vector<int64_t> next(experts, 0);
    for (int64_t e = 1; e < experts; ++e) next[e] = next[e - 1] + counts[e - 1];
    for (int64_t c = 0; c < copies; ++c) {
        const int64_t at = next[expert_of[c]]++;
        order[at] = c;
        row[c] = at;
    }
    return true;
}

}  // namespace moe

extern "C" {

// All return 0, or 1 when memory ran out or an id is out of range.
int moe_top_k(const float* scores, int64_t tokens, int64_t experts, int64_t k, int threads, int64_t* expert_of) {
    try {
        moe::top_k(scores, tokens, experts, k, threads, expert_of);
    } catch (...) {
        return 1;
    }
    return 0;
}

int moe_best_tokens(const float* scores, int64_t tokens, int64_t experts, int64_t capacity, int threads, int64_t* token_of) {
    try {
        moe::best_tokens(scores, tokens, experts, capacity, threads, token_of);
    } catch (...) {
        return 1;
    }
    return 0;
}

int moe_sort_copies(const int64_t* expert_of, int64_t copies, int64_t experts, int64_t* order, int64_t* row, int64_t* counts) {
    try {
        return moe::sort_copies(expert_of, copies, experts, order, row, counts) ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
}
