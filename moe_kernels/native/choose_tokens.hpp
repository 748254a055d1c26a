// Expert choice: the best tokens of each expert, in one pass over the scores.
//
// A sample of the rows guesses for each expert a score that a few more than the wanted tokens reach; those that do are
// collected, and the score that bounds the wanted ones is found by bisection. What is not a number counts as the lowest
// score; of equal scores the first tokens are taken. Nothing depends on the sample or on the number of threads but time.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "parallel.hpp"

namespace moe {

constexpr float kLowest = -std::numeric_limits<float>::max(), kAll = -std::numeric_limits<float>::infinity();

inline float usable(float score) { return score > kLowest ? score : kLowest; }

// Integers in the order of floats, so that halves of an interval hold equally many floats.
inline int32_t key_of(float score) {
    int32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float of_key(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

inline int32_t middle(int32_t low, int32_t high) { return static_cast<int32_t>((int64_t{low} + high) >> 1); }

inline int64_t count_at_least(const float* score, int64_t count, float bound) {
    int32_t reached = 0;
    for (int64_t i = 0; i < count; ++i) reached += score[i] >= bound;
    return reached;
}

// A bound that exactly `wanted` of the scores reach; where ties forbid that, the wanted-th greatest score. All are usable.
inline float bound_of(const float* score, int64_t count, int64_t wanted) {
    if (wanted >= count) return kAll;
    float least = score[0], most = score[0];
    for (int64_t i = 0; i < count; ++i) least = std::min(least, score[i]), most = std::max(most, score[i]);
    int32_t low = key_of(least), high = key_of(most) + 1;  // all reach low, none reaches high
    while (high - int64_t{low} > 1) {
        const int32_t at = middle(low, high);
        const int64_t reached = count_at_least(score, count, of_key(at));
        if (reached == wanted) return of_key(at);
        (reached > wanted ? low : high) = at;
    }
    return of_key(low);
}

// Tokens that may be among the best of one expert, in ascending order; never more than `room`, whatever comes.
struct Shortlist {
    float* score;
    int32_t* token;
    int64_t count = 0;

    void add(float value, int32_t which) {
        score[count] = value;
        token[count++] = which;
    }

    // Keeps the `wanted` best; returns what a later token must reach to be one of them: more than the last of these.
    float prune(int64_t wanted) {
        const float bound = bound_of(score, count, wanted);
        int64_t ties = wanted, kept = 0;
        for (int64_t i = 0; i < count; ++i) ties -= score[i] > bound;
        float least = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < count; ++i) {
            const bool is_kept = score[i] > bound || (score[i] == bound && ties-- > 0);
            if (!is_kept) continue;
            least = std::min(least, score[i]);
            score[kept] = score[i], token[kept++] = token[i];
        }
        count = kept;
        return std::nextafter(least, std::numeric_limits<float>::infinity());
    }
};

// For each expert a score that a few more than `wanted` tokens reach, by a sample of the rows.
inline std::vector<float> guess_bounds(const float* scores, int64_t tokens, int64_t experts, int64_t wanted) {
    const int64_t stride = std::max<int64_t>(tokens / 1024, std::min<int64_t>(8, tokens / 256)) | 1;
    const int64_t count = (tokens + stride - 1) / stride;
    const double mean = double(wanted) / double(tokens) * double(count), least = mean + 3 * std::sqrt(mean) + 3;
    std::vector<float> bound(experts, kAll);
    if (least + 2 >= double(count)) return bound;
    const int32_t place = static_cast<int32_t>(least), enough = place + 1 + place / 8;
    for (int64_t begin = 0; begin < experts; begin += 16) {
        const int64_t width = std::min<int64_t>(16, experts - begin);
        int32_t low[16], high[16], reached[16];
        float pivot[16];
        for (int k = 0; k < 16; ++k) low[k] = key_of(kLowest), high[k] = key_of(-kLowest);
        for (int round = 0; round < 32; ++round) {
            for (int k = 0; k < 16; ++k) pivot[k] = of_key(middle(low[k], high[k])), reached[k] = 0;
            const float* row = scores + begin;
            if (width == 16)
                for (int64_t i = 0; i < count; ++i, row += stride * experts)
                    for (int k = 0; k < 16; ++k) reached[k] += row[k] >= pivot[k];
            else
                for (int64_t i = 0; i < count; ++i, row += stride * experts)
                    for (int64_t k = 0; k < width; ++k) reached[k] += row[k] >= pivot[k];
            bool is_done = true;
            for (int64_t k = 0; k < width; ++k) {
                if (reached[k] >= place) bound[begin + k] = pivot[k];
                if (reached[k] >= place && reached[k] <= enough) {
                    low[k] = high[k] = key_of(pivot[k]);
                    continue;
                }
                (reached[k] >= place ? low[k] : high[k]) = key_of(pivot[k]);
                is_done = is_done && high[k] - int64_t{low[k]} <= 1;
            }
            if (is_done) break;
        }
    }
    return bound;
}

// The shortlists of one range of tokens.
class Collector {
  public:
    Collector(int64_t experts, int64_t wanted, const std::vector<float>& bound)
        : experts_(experts), wanted_(wanted), room_(2 * wanted + 64), bound_(bound), list_(experts),
          score_(new float[experts * room_]), token_(new int32_t[experts * room_]) {
        for (int64_t e = 0; e < experts; ++e) list_[e] = {score_.get() + e * room_, token_.get() + e * room_};
    }

    void add(int64_t e, float score, int64_t token) {
        const float value = usable(score);
        if (value < bound_[e]) return;
        if (list_[e].count == room_) {
            bound_[e] = list_[e].prune(wanted_);
            is_tighter_ = true;
            if (value < bound_[e]) return;
        }
        list_[e].add(value, static_cast<int32_t>(token));
    }

    void rows(const float* scores, int64_t from, int64_t to) {
        int64_t t = from;
#if defined(__AVX512F__)
        if (experts_ < 64 && 64 % experts_ == 0) {  // several rows at a time
            float tiled[64];
            is_tighter_ = true;
            for (; t + 64 / experts_ <= to; t += 64 / experts_) {
                for (int64_t i = 0; is_tighter_ && i < 64; ++i) tiled[i] = bound_[i % experts_];
                is_tighter_ = false;
                const float* score = scores + t * experts_;
                for (uint64_t hits = reached(score, tiled, 64); hits; hits &= hits - 1) {
                    const int i = __builtin_ctzll(hits);
                    add(i & (experts_ - 1), score[i], t + i / experts_);
                }
            }
        }
#endif
        for (; t < to; ++t) {
            const float* row = scores + t * experts_;
#if defined(__AVX512F__)
            for (int64_t e = 0; e < experts_; e += 64)
                for (uint64_t hits = reached(row + e, &bound_[e], experts_ - e); hits; hits &= hits - 1) {
                    const int i = __builtin_ctzll(hits);
                    add(e + i, row[e + i], t);
                }
#else
            for (int64_t e = 0; e < experts_; ++e)
                if (!(row[e] < bound_[e])) add(e, row[e], t);
#endif
        }
    }

    const Shortlist& operator[](int64_t e) const { return list_[e]; }

  private:
#if defined(__AVX512F__)
    // Which of the first 64 scores are not below their bounds; what is not a number counts, `add` has the last word.
    static uint64_t reached(const float* score, const float* bound, int64_t width) {
        uint64_t hits = 0;
        for (int64_t e = 0; e < std::min<int64_t>(64, width); e += 16) {
            const __mmask16 live = width - e >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (width - e)) - 1u);
            const __m512 value = _mm512_maskz_loadu_ps(live, score + e), least = _mm512_maskz_loadu_ps(live, bound + e);
            hits |= uint64_t(_mm512_mask_cmp_ps_mask(live, value, least, _CMP_NLT_UQ)) << e;
        }
        return hits;
    }
#endif

    int64_t experts_, wanted_, room_;
    bool is_tighter_ = false;
    std::vector<float> bound_;
    std::vector<Shortlist> list_;
    std::unique_ptr<float[]> score_;
    std::unique_ptr<int32_t[]> token_;
};

// The `capacity` best tokens of each expert, in ascending order of the token; capacity from 1 to `tokens`.
inline void best_tokens(const float* scores, int64_t tokens, int64_t experts, int64_t capacity, int threads, int64_t* token_of) {
    const std::vector<float> bound = guess_bounds(scores, tokens, experts, capacity);
    const int parts = tokens * experts < (int64_t{1} << 17) ? 1 : std::max(1, static_cast<int>(std::min<int64_t>(threads, tokens / 1024)));
    std::vector<std::unique_ptr<Collector>> found(parts);
    run_parts(parts, [&](int part) {
        found[part] = std::make_unique<Collector>(experts, capacity, bound);
        found[part]->rows(scores, tokens * part / parts, tokens * (part + 1) / parts);
    });
    parallel(experts, 64 + 16 * capacity, threads, 1, [&](int64_t from, int64_t to) {
        std::vector<float> score;
        std::vector<int32_t> token;
        for (int64_t e = from; e < to; ++e) {
            score.clear(), token.clear();
            for (const auto& lists : found) {
                const Shortlist& list = (*lists)[e];
                score.insert(score.end(), list.score, list.score + list.count);
                token.insert(token.end(), list.token, list.token + list.count);
            }
            if (static_cast<int64_t>(score.size()) < capacity) {  // the sample misled
                score.resize(tokens), token.resize(tokens);
                for (int64_t t = 0; t < tokens; ++t) score[t] = usable(scores[t * experts + e]), token[t] = static_cast<int32_t>(t);
            }
            Shortlist all{score.data(), token.data(), static_cast<int64_t>(score.size())};
            all.prune(capacity);
            std::copy(token.begin(), token.begin() + capacity, token_of + e * capacity);
        }
    });
}

}  // namespace moe
