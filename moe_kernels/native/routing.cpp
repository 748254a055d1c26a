// Routing on the CPU: see choose_experts.hpp and choose_tokens.hpp. All return 0, or 1 when memory ran out or an id is out
// of range.
#include "choose_experts.hpp"

extern "C" {

// `weight` (T, K) receives the softmax over the chosen scores, unless it is null.
int moe_top_k(const float* scores, int64_t tokens, int64_t experts, int64_t k, int threads, int64_t* expert_of, float* weight) {
    try {
        moe::choose_experts(scores, tokens, experts, k, threads, expert_of, weight);
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

int moe_sort_copies(const int64_t* expert_of, int64_t copies, int64_t experts, int threads, int64_t* order, int64_t* row, int64_t* counts) {
    try {
        return moe::sort_copies(expert_of, copies, experts, threads, order, row, counts) ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
}
