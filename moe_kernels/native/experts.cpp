// SwiGLU experts on processors with AVX512-BF16 but without AMX, which torch's own products use better. See swiglu.hpp.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define MOE_HAS_EXPERTS 1
#include "swiglu.hpp"
#endif
#include <cstdint>

extern "C" {

int moe_has_experts() {
#if defined(MOE_HAS_EXPERTS)
    return 1;
#else
    return 0;
#endif
}

#if defined(MOE_HAS_EXPERTS)
using moe::Bf16;

// Both return 0, or 1 when memory ran out. Matrices are bfloat16; D and F are even. `start` (E + 1) holds the first row of
// each expert; `token` (N) names the row of x, or is null for the rows themselves. `gate` and `up` (N, F) may be null.
int moe_swiglu_forward(const Bf16* x, const int64_t* token, const int64_t* start, int64_t experts, int64_t width, int64_t hidden_width,
                       const Bf16* w1, const Bf16* w3, const Bf16* w2, Bf16* gate, Bf16* up, Bf16* hidden, Bf16* out, int threads) {
    try {
        const moe::Shape shape{experts, width, hidden_width, start};
        moe::forward_hidden(shape, {x, token, width}, w1, w3, gate, up, hidden, threads);
        moe::forward_out(shape, hidden, w2, out, threads);
    } catch (...) {
        return 1;
    }
    return 0;
}

// `grad` is the gradient of the results, by token like x; `weight` (N) the weight of each row, or null. Nulls among the
// results say what is not wanted: d_weight (panels of F, N), d_rows (N, D), the gradients of the three stacks.
int moe_swiglu_backward(const Bf16* x, const Bf16* grad, const int64_t* token, const float* weight, const int64_t* start, int64_t experts,
                        int64_t width, int64_t hidden_width, const Bf16* w1, const Bf16* w3, const Bf16* w2, const Bf16* gate, const Bf16* up,
                        Bf16* d_gate, Bf16* d_up, Bf16* weighted, float* d_weight, Bf16* d_rows, Bf16* d_w1, Bf16* d_w3, Bf16* d_w2, int threads) {
    try {
        const moe::Shape shape{experts, width, hidden_width, start};
        const moe::Source states{x, token, width}, grads{grad, token, width};
        moe::backward_hidden(shape, grads, w2, {gate, up, weight, d_gate, d_up, weighted, d_weight}, threads);
        if (d_rows) moe::backward_rows(shape, d_gate, d_up, w1, w3, d_rows, threads);
        const moe::Source of_gate{d_gate, nullptr, hidden_width}, of_up{d_up, nullptr, hidden_width}, hidden{weighted, nullptr, hidden_width};
        moe::backward_weights(shape, {{states, of_gate, d_w1}, {states, of_up, d_w3}, {hidden, grads, d_w2}}, threads);
    } catch (...) {
        return 1;
    }
    return 0;
}

// out (T, D) = for each token the sum over copy[start[t]] ... of rows[row_of[c]] * weight[c]; `weight` may be null.
int moe_sum_copies(const Bf16* rows, const int64_t* row_of, const float* weight, const int64_t* copy, const int64_t* start, int64_t tokens,
                   int64_t width, Bf16* out, int threads) {
    try {
        moe::sum_copies(rows, row_of, weight, copy, start, tokens, width, out, threads);
    } catch (...) {
        return 1;
    }
    return 0;
}
#endif
}
