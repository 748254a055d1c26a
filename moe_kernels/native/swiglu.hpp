// SwiGLU experts in bfloat16: rows sorted by expert, each multiplied by its expert's matrices, forward and backward.
//
// Work is cut into panels of 64 columns of one expert's product; threads take the next one. Nothing depends on who does.
// Rows may be read from token states in place; what experts return is summed per token in the order of the routing.
#pragma once
#include <atomic>

#include "bf16_tile.hpp"
#include "parallel.hpp"

namespace moe {

struct Shape {
    int64_t experts, width, hidden;  // E, D, F
    const int64_t* start;            // first row of each expert, and the end of all
    int64_t rows(int64_t e) const { return start[e + 1] - start[e]; }
};

// Rows of a matrix, or of token states by index.
struct Source {
    const Bf16* data;
    const int64_t* index;  // null for the rows themselves
    int64_t width;
    const Bf16* row(int64_t i) const { return data + (index ? index[i] : i) * width; }
};

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Runs body(expert, item, scratch of the thread) for `items` pieces of every expert.
template <class Scratch, class Body>
void each_piece(const Shape& shape, int64_t items, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    run_parts(std::max(1, threads), [&](int) {
        Scratch scratch(shape);
        for (int64_t at; (at = next.fetch_add(1)) < shape.experts * items;) body(at / items, at % items, scratch);
    });
}

inline int64_t most_rows(const Shape& shape) {
    int64_t most = 0;
    for (int64_t e = 0; e < shape.experts; ++e) most = std::max(most, shape.rows(e));
    return most;
}

struct TwoPanels {
    explicit TwoPanels(const Shape& shape)
        : first(make_buffer<uint32_t>(std::max(shape.width, shape.hidden) / 2 * kPanel)), second(make_buffer<uint32_t>(std::max(shape.width, shape.hidden) / 2 * kPanel)) {}
    Buffer<uint32_t> first, second;
    alignas(64) float one[kTileRows * kPanel], two[kTileRows * kPanel];
};

// Calls body(first row, rows, their pointers in `left`) for every tile of an expert's rows.
template <class Body>
void each_tile(const Shape& shape, int64_t e, const Source& left, const Body& body) {
    for (int64_t i = shape.start[e]; i < shape.start[e + 1]; i += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, shape.start[e + 1] - i);
        const Bf16* from[kTileRows];
        for (int64_t k = 0; k < rows; ++k) from[k] = left.row(i + k);
        body(i, rows, from);
    }
}

// gate = x w1, up = x w3 and hidden = silu(gate) * up, all (N, F).
inline void forward_hidden(const Shape& shape, const Source& x, const Bf16* w1, const Bf16* w3, Bf16* gate, Bf16* up, Bf16* hidden, int threads) {
    const int64_t depth = shape.width, columns = shape.hidden;
    each_piece<TwoPanels>(shape, panels_of(columns), threads, [&](int64_t e, int64_t panel, TwoPanels& scratch) {
        const int64_t begin = panel * kPanel;
        const auto row_of = [&](const Bf16* weight) { return [=](int64_t k) { return weight + (e * depth + k) * columns; }; };
        pack_panel(row_of(w1), depth, begin, columns, scratch.first.get());
        pack_panel(row_of(w3), depth, begin, columns, scratch.second.get());
        each_tile(shape, e, x, [&](int64_t at, int64_t rows, const Bf16* const* left) {
            multiply(left, rows, 2, scratch.first.get(), depth / 2, false, scratch.one);
            multiply(left, rows, 2, scratch.second.get(), depth / 2, false, scratch.two);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < kPanel && begin + c < columns; c += 16) {
                    const __mmask16 live = first_lanes(columns - begin - c);
                    const int64_t to = (at + i) * columns + begin + c;
                    const __m512 g = _mm512_load_ps(scratch.one + i * kPanel + c), u = _mm512_load_ps(scratch.two + i * kPanel + c);
                    if (gate) store_bf16(gate + to, live, g), store_bf16(up + to, live, u);
                    store_bf16(hidden + to, live, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
                }
        });
    });
}

// out = hidden w2, (N, D).
inline void forward_out(const Shape& shape, const Bf16* hidden, const Bf16* w2, Bf16* out, int threads) {
    const int64_t depth = shape.hidden, columns = shape.width;
    each_piece<TwoPanels>(shape, panels_of(columns), threads, [&](int64_t e, int64_t panel, TwoPanels& scratch) {
        const int64_t begin = panel * kPanel;
        pack_panel([&](int64_t k) { return w2 + (e * depth + k) * columns; }, depth, begin, columns, scratch.first.get());
        each_tile(shape, e, Source{hidden, nullptr, depth}, [&](int64_t at, int64_t rows, const Bf16* const* left) {
            multiply(left, rows, 2, scratch.first.get(), depth / 2, false, scratch.one);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < kPanel && begin + c < columns; c += 16)
                    store_bf16(out + (at + i) * columns + begin + c, first_lanes(columns - begin - c), _mm512_load_ps(scratch.one + i * kPanel + c));
        });
    });
}

struct HiddenGradients {
    const Bf16 *gate, *up;
    const float* weight;            // combine weight per row, or null for 1
    Bf16 *d_gate, *d_up, *weighted; // gradients of gate and up, and weight * hidden, which the gradient of w2 needs
    float* d_weight;                // (panels, N), their sums are the gradient of `weight`; or null
};

// From the gradient of the rows' results, `grad`, before their weights.
inline void backward_hidden(const Shape& shape, const Source& grad, const Bf16* w2, const HiddenGradients& h, int threads) {
    const int64_t depth = shape.width, columns = shape.hidden, total = shape.start[shape.experts];
    each_piece<TwoPanels>(shape, panels_of(columns), threads, [&](int64_t e, int64_t panel, TwoPanels& scratch) {
        const int64_t begin = panel * kPanel;
        pack_transposed(w2 + e * columns * depth, depth, begin, columns, scratch.first.get());
        each_tile(shape, e, grad, [&](int64_t at, int64_t rows, const Bf16* const* left) {
            for (int64_t i = 0; i < rows; ++i)  // what comes after the product is on its way meanwhile
                for (const Bf16* from : {h.gate, h.up})
                    for (int64_t c = 0; c < kPanel; c += 32) _mm_prefetch(reinterpret_cast<const char*>(from + (at + i) * columns + begin + c), _MM_HINT_T0);
            multiply(left, rows, 2, scratch.first.get(), depth / 2, false, scratch.one);
            for (int64_t i = 0; i < rows; ++i) {
                const __m512 weight = _mm512_set1_ps(h.weight ? h.weight[at + i] : 1.0f), one = _mm512_set1_ps(1.0f);
                __m512 product = _mm512_setzero_ps();
                for (int64_t c = 0; c < kPanel && begin + c < columns; c += 16) {
                    const __mmask16 live = first_lanes(columns - begin - c);
                    const int64_t to = (at + i) * columns + begin + c;
                    const __m512 plain = _mm512_load_ps(scratch.one + i * kPanel + c), d = _mm512_mul_ps(plain, weight);
                    const __m512 g = load_bf16(h.gate + to, live), u = load_bf16(h.up + to, live), s = sigmoid(g);
                    const __m512 silu = _mm512_mul_ps(g, s), hidden = _mm512_mul_ps(silu, u);
                    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
                    store_bf16(h.d_gate + to, live, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
                    store_bf16(h.d_up + to, live, _mm512_mul_ps(d, silu));
                    store_bf16(h.weighted + to, live, _mm512_mul_ps(weight, hidden));
                    product = _mm512_fmadd_ps(plain, hidden, product);
                }
                if (h.d_weight) h.d_weight[panel * total + at + i] = _mm512_reduce_add_ps(product);
            }
        });
    });
}

// d_rows = d_gate w1' + d_up w3', (N, D).
inline void backward_rows(const Shape& shape, const Bf16* d_gate, const Bf16* d_up, const Bf16* w1, const Bf16* w3, Bf16* d_rows, int threads) {
    const int64_t depth = shape.hidden, columns = shape.width;
    each_piece<TwoPanels>(shape, panels_of(columns), threads, [&](int64_t e, int64_t panel, TwoPanels& scratch) {
        const int64_t begin = panel * kPanel;
        pack_transposed(w1 + e * columns * depth, depth, begin, columns, scratch.first.get());
        pack_transposed(w3 + e * columns * depth, depth, begin, columns, scratch.second.get());
        each_tile(shape, e, Source{d_gate, nullptr, depth}, [&](int64_t at, int64_t rows, const Bf16* const* left) {
            const Bf16* other[kTileRows];
            for (int64_t i = 0; i < rows; ++i) other[i] = d_up + (at + i) * depth;
            multiply(left, rows, 2, scratch.first.get(), depth / 2, false, scratch.one);
            multiply(other, rows, 2, scratch.second.get(), depth / 2, true, scratch.one);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t c = 0; c < kPanel && begin + c < columns; c += 16)
                    store_bf16(d_rows + (at + i) * columns + begin + c, first_lanes(columns - begin - c), _mm512_load_ps(scratch.one + i * kPanel + c));
        });
    });
}

constexpr int64_t kDepth = 512;  // rows summed at a time in gradients of weights, so that their panel stays in the cache

struct WeightScratch {
    explicit WeightScratch(const Shape& shape)
        : panel(make_buffer<uint32_t>(kDepth / 2 * kPanel)), sums(make_buffer<float>((widest(shape) + kTileRows) * kPanel)),
          left(make_buffer<uint32_t>((widest(shape) / kTileRows + 1) * block_words(most_rows(shape)) + 8)) {}
    static int64_t widest(const Shape& shape) { return std::max(shape.width, shape.hidden); }
    Buffer<uint32_t> panel;
    Buffer<float> sums;
    Buffer<uint32_t> left;
};

// d_weight (E, A, B) = left' right over the rows of each expert; left has A columns, right has B.
struct WeightGradient {
    Source left, right;
    Bf16* d_weight;
    static constexpr int64_t kColumns = 8 * kPanel;  // of a piece of work
    int64_t pieces() const { return d_weight ? (right.width + kColumns - 1) / kColumns : 0; }

    void compute(const Shape& shape, int64_t e, int64_t piece, WeightScratch& scratch) const {
        const int64_t height = left.width, columns = right.width, first = shape.start[e], rows = shape.rows(e), stride = block_words(rows);
        pack_left([&](int64_t k) { return left.row(first + k); }, rows, height, scratch.left.get());
        for (int64_t begin = piece * kColumns; begin < std::min(columns, (piece + 1) * kColumns); begin += kPanel) {
            for (int64_t from = 0; from < rows || from == 0; from += kDepth) {
                const int64_t depth = std::min(kDepth, rows - from);
                pack_panel([&](int64_t k) { return right.row(first + from + k); }, depth, begin, columns, scratch.panel.get());
                for (int64_t m = 0; m < height; m += kTileRows) {
                    const Bf16* rows_of[kTileRows];
                    const uint32_t* block = scratch.left.get() + m / kTileRows * stride + from / 2 * kTileRows;
                    for (int64_t i = 0; i < kTileRows; ++i) rows_of[i] = reinterpret_cast<const Bf16*>(block + i);
                    multiply(rows_of, kTileRows, 2 * kTileRows, scratch.panel.get(), (depth + 1) / 2, from > 0, scratch.sums.get() + m * kPanel);
                }
            }
            for (int64_t m = 0; m < height; ++m)
                for (int64_t c = 0; c < kPanel && begin + c < columns; c += 16)
                    store_bf16(d_weight + (e * height + m) * columns + begin + c, first_lanes(columns - begin - c), _mm512_load_ps(scratch.sums.get() + m * kPanel + c));
        }
    }
};

inline void backward_weights(const Shape& shape, const WeightGradient (&wanted)[3], int threads) {
    const int64_t first = wanted[0].pieces(), second = first + wanted[1].pieces(), all = second + wanted[2].pieces();
    each_piece<WeightScratch>(shape, all, threads, [&](int64_t e, int64_t piece, WeightScratch& scratch) {
        if (piece < first)
            wanted[0].compute(shape, e, piece, scratch);
        else if (piece < second)
            wanted[1].compute(shape, e, piece - first, scratch);
        else
            wanted[2].compute(shape, e, piece - second, scratch);
    });
}

// out (T, D): for each token the sum of its copies' rows times their weights (1 where null), in the order of the copies.
inline void sum_copies(const Bf16* rows, const int64_t* row_of, const float* weight, const int64_t* copy, const int64_t* start, int64_t tokens, int64_t width, Bf16* out, int threads) {
    parallel(tokens, 4 * width, threads, [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; ++t)
            for (int64_t c = 0; c < width; c += 16) {
                const __mmask16 live = first_lanes(width - c);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t i = start[t]; i < start[t + 1]; ++i) {
                    const __m512 value = load_bf16(rows + row_of[copy[i]] * width + c, live);
                    sum = weight ? _mm512_fmadd_ps(value, _mm512_set1_ps(weight[copy[i]]), sum) : _mm512_add_ps(sum, value);
                }
                store_bf16(out + t * width + c, live, sum);
            }
    });
}

}  // namespace moe
