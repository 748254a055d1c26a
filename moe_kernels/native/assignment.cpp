// Balanced assignment of tokens to experts with the largest total score, exactly.
//
// Prices are found on ever larger samples of the tokens, each starting from the last one's, and the few tokens that
// still overflow are moved along shortest augmenting paths.
#include <cstring>

#include "repair.hpp"

namespace moe {

// Odd strides, so that a sample meets every phase of data laid out in powers of two.
constexpr int64_t kSteps[] = {61, 7};

// The price at which a few hundred tokens would fill each expert if it stood alone.
template <class Score>
void first_prices(const Rows<Score>& rows, std::vector<double>& price) {
    const int64_t stride = std::max<int64_t>(1, rows.tokens / std::max<int64_t>(2 * rows.experts, 128));
    std::vector<Score> column;
    for (int64_t e = 0; e < rows.experts; ++e) {
        column.clear();
        for (int64_t t = 0; t < rows.tokens; t += stride) column.push_back(rows.row(t)[e]);
        const int64_t count = static_cast<int64_t>(column.size()), at = count - std::max<int64_t>(1, count / rows.experts);
        std::nth_element(column.begin(), column.begin() + at, column.end());
        price[e] = double(column[at]);
    }
}

// The largest magnitude; infinite when any score is infinite or not a number. Compares bit patterns, which order alike.
template <class Score, class Bits>
Score largest_magnitude(const Score* scores, int64_t count, int threads) {
    constexpr Bits kNoSign = std::numeric_limits<Bits>::max();
    constexpr int64_t kBlock = 1 << 14;
    std::vector<Bits> largest((count + kBlock - 1) / kBlock, 0);
    parallel(static_cast<int64_t>(largest.size()), kBlock / 4, threads, [&](int64_t from, int64_t to) {
        for (int64_t block = from; block < to; ++block) {
            Bits high = 0;
            for (int64_t i = block * kBlock; i < std::min(count, (block + 1) * kBlock); ++i) {
                Bits bits;
                std::memcpy(&bits, scores + i, sizeof bits);
                high = std::max(high, static_cast<Bits>(bits & kNoSign));
            }
            largest[block] = high;
        }
    });
    const Bits bits = *std::max_element(largest.begin(), largest.end());
    Score result;
    std::memcpy(&result, &bits, sizeof result);
    return result <= std::numeric_limits<Score>::max() ? result : std::numeric_limits<Score>::infinity();
}

template <class Score>
void assign(const Score* scores, int64_t tokens, int64_t experts, int threads, bool is_warm, double* prices, int64_t* expert_of,
            int64_t* report) {
    std::vector<double> price(prices, prices + experts);
    std::vector<int64_t> load(experts);
    Best<Score> best;
    int64_t sweeps = 0, paths = 0;
    bool has_prices = is_warm;
    for (int64_t step : kSteps) {
        const Rows<Score> sample{scores, (tokens + step - 1) / step, experts, step};
        if (is_warm || sample.tokens < std::max<int64_t>(8 * experts, 128)) continue;
        if (!has_prices) first_prices(sample, price);
        has_prices = true;
        best.resize(sample.tokens);
        balance_prices(sample, threads, 6, sample.tokens / 64, price, best, load);
        if (overflow(load, sample.tokens) > std::max<int64_t>(64, sample.tokens / 32)) Repair<Score>(sample, price, best, load).run();
    }
    const Rows<Score> all{scores, tokens, experts, 1};
    if (!has_prices) first_prices(all, price);
    best.resize(tokens);
    sweeps = balance_prices(all, threads, 6, std::max(tokens / 256, experts), price, best, load);
    const int64_t over = overflow(load, tokens);
    paths = Repair<Score>(all, price, best, load).run();
    std::copy(best.first.begin(), best.first.end(), expert_of);
    std::copy(price.begin(), price.end(), prices);
    report[0] = sweeps, report[1] = over, report[2] = paths;
}

// Writes the scores to `clean` with +inf as the largest finite score, NaN and -inf as the smallest, all as 0 where no score
// is finite; returns how many were replaced.
template <class Score>
int64_t replace_nonfinite(const Score* scores, int64_t count, int threads, Score* clean) {
    constexpr Score kMost = std::numeric_limits<Score>::max(), kInfinity = std::numeric_limits<Score>::infinity();
    constexpr int64_t kBlock = 1 << 14;
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    std::vector<Score> low(blocks, kInfinity), high(blocks, -kInfinity);
    std::vector<int64_t> bad(blocks, 0);
    parallel(blocks, kBlock / 4, threads, [&](int64_t from, int64_t to) {
        for (int64_t block = from; block < to; ++block) {
            Score least = kInfinity, most = -kInfinity;
            int32_t finite = 0;
            const int64_t end = std::min(count, (block + 1) * kBlock);
            for (int64_t i = block * kBlock; i < end; ++i) {
                const bool is_finite = std::abs(scores[i]) <= kMost;
                finite += is_finite;
                const Score small = is_finite ? scores[i] : kInfinity, large = is_finite ? scores[i] : -kInfinity;
                least = small < least ? small : least;
                most = large > most ? large : most;
            }
            low[block] = least, high[block] = most, bad[block] = end - block * kBlock - finite;
        }
    });
    Score least = *std::min_element(low.begin(), low.end()), most = *std::max_element(high.begin(), high.end());
    if (least > most) least = most = 0;
    parallel(blocks, kBlock / 4, threads, [&](int64_t from, int64_t to) {
        for (int64_t i = from * kBlock; i < std::min(count, to * kBlock); ++i) {
            const Score score = scores[i], low_or_score = score >= -kMost ? score : least;  // not a number counts as low
            clean[i] = score > kMost ? most : low_or_score;
        }
    });
    int64_t replaced = 0;
    for (const int64_t some : bad) replaced += some;
    return replaced;
}

enum Outcome { kDone = 0, kOutOfMemory = 1, kNotFinite = 2, kTooLarge = 3 };

template <class Score, class Bits>
int checked_assign(const Score* scores, int64_t tokens, int64_t experts, int threads, bool is_warm, double* prices,
                   int64_t* expert_of, int64_t* report) {
    try {
        const Score largest = largest_magnitude<Score, Bits>(scores, tokens * experts, threads);
        if (largest > std::numeric_limits<Score>::max()) return kNotFinite;
        if (largest > (sizeof(Score) == 4 ? Score(1e30) : Score(1e150))) return kTooLarge;
        assign(scores, tokens, experts, threads, is_warm, prices, expert_of, report);
        return kDone;
    } catch (...) {
        return kOutOfMemory;
    }
}

}  // namespace moe

extern "C" {

// Both return an Outcome. `prices` holds the starting prices when `is_warm`, and the final ones on return; `report`
// receives the full sweeps, the tokens that overflowed after them and the augmenting paths.
int moe_assign_float(const float* scores, int64_t tokens, int64_t experts, int threads, int is_warm, double* prices,
                     int64_t* expert_of, int64_t* report) {
    return moe::checked_assign<float, int32_t>(scores, tokens, experts, threads, is_warm != 0, prices, expert_of, report);
}

// Returns how many were replaced, or -1 when memory ran out.
int64_t moe_replace_float(const float* scores, int64_t count, int threads, float* clean) {
    try {
        return moe::replace_nonfinite(scores, count, threads, clean);
    } catch (...) {
        return -1;
    }
}

int64_t moe_replace_double(const double* scores, int64_t count, int threads, double* clean) {
    try {
        return moe::replace_nonfinite(scores, count, threads, clean);
    } catch (...) {
        return -1;
    }
}

int moe_assign_double(const double* scores, int64_t tokens, int64_t experts, int threads, int is_warm, double* prices,
                      int64_t* expert_of, int64_t* report) {
    return moe::checked_assign<double, int64_t>(scores, tokens, experts, threads, is_warm != 0, prices, expert_of, report);
}
}
