// Prices that nearly balance the loads.
//
// The dual of the assignment has one price per expert: minimise sum_t max_e(score[t][e] - price[e]) + capacity * sum(price).
// Its gradient is capacity - load, its curvature the number of tokens that stand near the border between two experts.
#pragma once
#include "sweep.hpp"

namespace moe {

// Tokens whose two best experts tie to rounding are free: each goes to the tied expert that is furthest below its share.
template <class Score>
void settle_ties(const Rows<Score>& rows, const std::vector<double>& price, Best<Score>& best, std::vector<int64_t>& load) {
    const int64_t experts = rows.experts;
    const Score epsilon = sizeof(Score) == 4 ? std::numeric_limits<Score>::epsilon() : Score(0);
    double largest = 0;
    for (double p : price) largest = std::max(largest, std::abs(p));
    std::vector<double> value(experts);
    for (int64_t t = 0; t < rows.tokens; ++t) {
        const Score* row = rows.row(t);
        const Score doubt = 4 * epsilon * (std::abs(row[best.first[t]]) + Score(largest));
        if (best.margin[t] > doubt) continue;
        double high = -std::numeric_limits<double>::infinity();
        for (int64_t e = 0; e < experts; ++e) value[e] = double(row[e]) - price[e];
        for (int64_t e = 0; e < experts; ++e) high = std::max(high, value[e]);
        const double tied = high - 4e-16 * (std::abs(high) + largest);
        int32_t choice = -1, other = -1;
        for (int64_t e = 0; e < experts; ++e) {
            if (value[e] < tied) continue;
            if (choice < 0 || load[e] - (e == best.first[t]) < load[choice] - (choice == best.first[t])) choice = static_cast<int32_t>(e);
        }
        double next = -std::numeric_limits<double>::infinity();
        for (int64_t e = 0; e < experts; ++e)
            if (e != choice && value[e] > next) next = value[e], other = static_cast<int32_t>(e);
        --load[best.first[t]];
        ++load[choice];
        best.first[t] = choice;
        best.second[t] = std::max(other, 0);
        best.margin[t] = static_cast<Score>(std::max(0.0, value[choice] - next));
    }
}

// The share-quantile of up to 1024 margins.
template <class Score>
Score margin_quantile(const Best<Score>& best, double share) {
    const int64_t tokens = static_cast<int64_t>(best.margin.size()), stride = std::max<int64_t>(1, tokens / 1024);
    std::vector<Score> some;
    for (int64_t t = 0; t < tokens; t += stride) some.push_back(best.margin[t]);
    const size_t at = std::min(some.size() - 1, static_cast<size_t>(share * static_cast<double>(some.size())));
    std::nth_element(some.begin(), some.begin() + static_cast<int64_t>(at), some.end());
    return some[at];
}

// As `sweep`, from the state `last` of prices that differ by at most `spread` between two experts. A token whose margin
// exceeds that keeps its expert, with a lower bound as its margin; margins up to `exact` are always exact.
template <class Score>
void sweep_near(const Rows<Score>& rows, const std::vector<double>& price, int threads, const Best<Score>& last, double spread,
                double exact, Best<Score>& best, std::vector<int64_t>& load) {
    std::vector<Score> rounded(price.begin(), price.end());
    const Score lower = static_cast<Score>(spread * 1.0001), keep = static_cast<Score>(exact) + lower;
    parallel(rows.tokens, rows.experts / 2, threads, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; ++t) {
            if (last.margin[t] <= keep) {
                top2(rows, rounded.data(), t, best);
            } else {
                best.first[t] = last.first[t], best.second[t] = last.second[t], best.margin[t] = last.margin[t] - lower;
            }
        }
    });
    std::fill(load.begin(), load.end(), 0);
    for (int64_t t = 0; t < rows.tokens; ++t) ++load[best.first[t]];
    settle_ties(rows, price, best, load);
}

template <class Score>
void sweep(const Rows<Score>& rows, const std::vector<double>& price, int threads, Best<Score>& best, std::vector<int64_t>& load) {
    std::vector<Score> rounded(price.begin(), price.end());
    parallel(rows.tokens, rows.experts, threads,
             [&](int64_t from, int64_t to) { sweep_range(rows, rounded.data(), from, to, best); });
    std::fill(load.begin(), load.end(), 0);
    for (int64_t t = 0; t < rows.tokens; ++t) ++load[best.first[t]];
    settle_ties(rows, price, best, load);
}

// Solves (laplacian + ridge) x = excess by conjugate gradients; laplacian from the pair counts.
inline std::vector<double> solve_laplacian(const std::vector<float>& pairs, const std::vector<double>& excess, int64_t experts) {
    std::vector<float> diagonal(experts, 0.5f), residual(excess.begin(), excess.end()), z(experts), q(experts), direction(experts);
    std::vector<float> x(experts, 0.0f);
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t f = 0; f < experts; ++f) diagonal[e] += pairs[e * experts + f];
    double old = 0, start = 0;
    for (int round = 0; round < 24; ++round) {
        double now = 0, size = 0;
        for (int64_t e = 0; e < experts; ++e) {
            z[e] = residual[e] / diagonal[e];
            now += double(residual[e]) * z[e];
            size += double(residual[e]) * residual[e];
        }
        if (round == 0) start = size;
        if (size <= 1e-4 * start) break;
        const float beta = round ? static_cast<float>(now / old) : 0.0f;
        double curvature = 0;
        for (int64_t e = 0; e < experts; ++e) direction[e] = z[e] + beta * direction[e];
        for (int64_t e = 0; e < experts; ++e) {
            const float* line = &pairs[e * experts];
            float sum[16] = {0};
            int64_t f = 0;
            for (; f + 16 <= experts; f += 16)
                for (int k = 0; k < 16; ++k) sum[k] += line[f + k] * direction[f + k];
            float total = 0;
            for (float part : sum) total += part;
            for (; f < experts; ++f) total += line[f] * direction[f];
            q[e] = diagonal[e] * direction[e] - total;
            curvature += double(direction[e]) * q[e];
        }
        if (!(curvature > 0)) break;
        const float alpha = static_cast<float>(now / curvature);
        for (int64_t e = 0; e < experts; ++e) {
            x[e] += alpha * direction[e];
            residual[e] -= alpha * q[e];
        }
        old = now;
    }
    return {x.begin(), x.end()};
}

inline int64_t overflow(const std::vector<int64_t>& load, int64_t tokens) {
    const int64_t experts = static_cast<int64_t>(load.size()), ceiling = (tokens + experts - 1) / experts;
    int64_t total = 0;
    for (int64_t n : load) total += std::max<int64_t>(0, n - ceiling);
    return total;
}

// One damped Newton step from the state that `best` and `load` describe; no price moves by more than `reach` bands.
template <class Score>
std::vector<double> newton_step(const Best<Score>& best, const std::vector<int64_t>& load, double band_share, double damping, double reach) {
    const int64_t experts = static_cast<int64_t>(load.size()), tokens = static_cast<int64_t>(best.margin.size());
    const Score band = margin_quantile(best, band_share);
    std::vector<float> pairs(experts * experts, 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
        if (best.margin[t] > band) continue;
        pairs[best.first[t] * experts + best.second[t]] += 1.0f;
        pairs[best.second[t] * experts + best.first[t]] += 1.0f;
    }
    std::vector<double> excess(experts);
    const double share = double(tokens) / double(experts);
    for (int64_t e = 0; e < experts; ++e) pairs[e * experts + e] = 0.0f, excess[e] = double(load[e]) - share;
    std::vector<double> step = solve_laplacian(pairs, excess, experts);
    // `pairs` counts the tokens within +-band of each border, so a price step of 2 * band * x moves about x of them.
    const double limit = reach * double(band);
    for (double& move : step) move = damping * std::clamp(2.0 * double(band) * move, -limit, limit);
    return step;
}

// Newton steps until at most `allowed` tokens overflow or `rounds` sweeps are spent; keeps the best prices seen.
template <class Score>
int64_t balance_prices(const Rows<Score>& rows, int threads, int rounds, int64_t allowed, std::vector<double>& price,
                       Best<Score>& best, std::vector<int64_t>& load) {
    sweep(rows, price, threads, best, load);
    int64_t current = overflow(load, rows.tokens), sweeps = 1;
    double damping = 1.0, reach = 4.0;
    Best<Score> trial;
    trial.resize(rows.tokens);
    std::vector<int64_t> trial_load(load.size());
    for (int round = 0; round < rounds && current > allowed; ++round) {
        const double share = std::clamp(2.0 * double(current) / double(rows.tokens), 0.02, 0.5);
        const std::vector<double> step = newton_step(best, load, share, damping, reach);
        std::vector<double> moved(price);
        for (size_t e = 0; e < moved.size(); ++e) moved[e] += step[e];
        const auto [least, most] = std::minmax_element(step.begin(), step.end());
        const double wanted = std::clamp(16.0 * double(load.size()) / double(rows.tokens), 0.5 * share, 0.25);
        if (rows.experts < 16)
            sweep(rows, moved, threads, trial, trial_load);
        else
            sweep_near(rows, moved, threads, best, *most - *least, double(margin_quantile(best, wanted)), trial, trial_load);
        ++sweeps;
        const int64_t now = overflow(trial_load, rows.tokens);
        // Groups of experts that few tokens stand between move far as a whole; a short reach would hold all their prices.
        if (now <= current && double(now) > 0.85 * double(current)) reach = 64.0;
        if (now < current) {
            current = now;
            damping = std::min(1.0, 2.0 * damping);
            price.swap(moved);
            std::swap(best, trial);
            load.swap(trial_load);
        } else {
            damping *= 0.35;
            if (damping < 0.04) break;
        }
    }
    return sweeps;
}

}  // namespace moe
