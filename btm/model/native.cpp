// Memory-bound steps of a decoder block, each one pass over its data. Plain C interface, called through ctypes.
//
// Every function works on bf16 (is_bf16 = 1) or fp32 (0) tensors, contiguous unless said otherwise, and computes in
// fp32. Sums have a fixed order that does not depend on the number of threads. NaN and infinities pass through.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

using i64 = int64_t;

struct Bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }

inline float load(const Bf16* p) {
    const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline void store(float* p, float value) { *p = value; }

inline void store(Bf16* p, float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) to 2 ulp between -87 and 87, constant outside; NaN stays NaN.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    const float n = std::nearbyint(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

template <typename T>
void rms_forward(const T* x, const T* w, T* y, float* rstd, i64 rows, i64 cols, float eps) {
#pragma omp parallel for schedule(static)
    for (i64 r = 0; r < rows; ++r) {
        const T* xr = x + r * cols;
        float square = 0.0f;
        for (i64 c = 0; c < cols; ++c) square += load(xr + c) * load(xr + c);
        const float scale = 1.0f / std::sqrt(square / static_cast<float>(cols) + eps);
        rstd[r] = scale;
        for (i64 c = 0; c < cols; ++c) store(y + r * cols + c, load(xr + c) * scale * load(w + c));
    }
}

// partial: fp32 [blocks, cols], zeroed; its rows add up to the gradient of w.
template <typename T>
void rms_backward(const T* dy, const T* x, const T* w, const float* rstd, T* dx, float* partial, i64 rows, i64 cols,
                  i64 blocks) {
#pragma omp parallel for schedule(static)
    for (i64 b = 0; b < blocks; ++b) {
        float* dw = partial + b * cols;
        for (i64 r = rows * b / blocks; r < rows * (b + 1) / blocks; ++r) {
            const T *g = dy + r * cols, *xr = x + r * cols;
            const float scale = rstd[r];
            float dot = 0.0f;
            for (i64 c = 0; c < cols; ++c) {
                const float gx = load(g + c) * load(xr + c) * scale;
                dot += gx * load(w + c);
                dw[c] += gx;
            }
            const float mean = dot * scale / static_cast<float>(cols);
            for (i64 c = 0; c < cols; ++c)
                store(dx + r * cols + c, scale * load(g + c) * load(w + c) - scale * mean * load(xr + c));
        }
    }
}

template <typename T>
void swiglu_forward(const T* gate, const T* up, T* out, i64 count) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < count; ++i) {
        const float a = load(gate + i);
        store(out + i, a * sigmoid(a) * load(up + i));
    }
}

template <typename T>
void swiglu_backward(const T* dout, const T* gate, const T* up, T* dgate, T* dup, i64 count) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < count; ++i) {
        const float a = load(gate + i), g = load(dout + i), s = sigmoid(a);
        store(dup + i, g * a * s);
        store(dgate + i, g * load(up + i) * s * (1.0f + a * (1.0f - s)));
    }
}

// Rotary embedding of [B, T, H, D] into [B, H, T, D] (inverse = 0), or its transpose from [B, H, T, D] into
// [B, T, H, D] (inverse = 1). cos, sin: [B or 1, T, D]; table_stride is 0 or T * D.
template <typename T>
void rotate(const T* in, const T* cos, const T* sin, T* out, i64 batch, i64 length, i64 heads, i64 width,
            i64 table_stride, int inverse) {
    const i64 half = width / 2;
#pragma omp parallel for schedule(static)
    for (i64 bt = 0; bt < batch * length; ++bt) {
        const i64 b = bt / length, t = bt % length;
        const T *c = cos + b * table_stride + t * width, *s = sin + b * table_stride + t * width;
        for (i64 h = 0; h < heads; ++h) {
            const i64 token_major = (bt * heads + h) * width, head_major = ((b * heads + h) * length + t) * width;
            const T* x = in + (inverse ? head_major : token_major);
            T* y = out + (inverse ? token_major : head_major);
            const T* s_low = inverse ? s + half : s;
            const T* s_high = inverse ? s : s + half;
            const float sign = inverse ? -1.0f : 1.0f;
#pragma omp simd
            for (i64 d = 0; d < half; ++d) {
                const float low = load(x + d), high = load(x + half + d);
                store(y + d, low * load(c + d) - sign * high * load(s_low + d));
                store(y + half + d, high * load(c + half + d) + sign * low * load(s_high + d));
            }
        }
    }
}

// exp(row - top) of `count` values into `powers`; returns their sum.
template <typename T>
inline float exp_row(const T* row, float* powers, i64 count, float* top_out) {
    float top = load(row);
#pragma omp simd reduction(max : top)
    for (i64 c = 0; c < count; ++c) top = load(row + c) > top ? load(row + c) : top;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < count; ++c) {
        powers[c] = fast_exp(load(row + c) - top);
        sum += powers[c];
    }
    *top_out = top;
    return sum;
}

// scores [N, rows, cols] -> probabilities in place. Row r attends columns c <= first_row + r, of the same segment where
// segments ([N / heads, cols], int32) are given.
template <typename T>
void softmax_forward(T* scores, i64 count, i64 rows, i64 cols, i64 first_row, const int32_t* segments, i64 heads) {
#pragma omp parallel
    {
        const std::unique_ptr<float[]> powers(new float[cols]);
#pragma omp for schedule(static)
        for (i64 nr = 0; nr < count * rows; ++nr) {
            T* row = scores + nr * cols;
            const i64 last = first_row + nr % rows;
            i64 begin = 0;
            if (segments) {
                const int32_t* segment = segments + nr / rows / heads * cols;
                for (begin = last; begin > 0 && segment[begin - 1] == segment[last];) --begin;
            }
            float top;
            const float inverse = 1.0f / exp_row(row + begin, powers.get(), last + 1 - begin, &top);
            for (i64 c = 0; c < begin; ++c) store(row + c, 0.0f);
            for (i64 c = begin; c <= last; ++c) store(row + c, powers[c - begin] * inverse);
            for (i64 c = last + 1; c < cols; ++c) store(row + c, 0.0f);
        }
    }
}

// grad [N, rows, cols] of the probabilities -> grad of the scores, in place.
template <typename T>
void softmax_backward(const T* probabilities, T* grad, i64 count, i64 rows, i64 cols, i64 first_row) {
#pragma omp parallel for schedule(static)
    for (i64 nr = 0; nr < count * rows; ++nr) {
        const T* p = probabilities + nr * cols;
        T* g = grad + nr * cols;
        const i64 end = first_row + nr % rows + 1;
        float dot = 0.0f;
        for (i64 c = 0; c < end; ++c) dot += load(p + c) * load(g + c);
        for (i64 c = 0; c < end; ++c) store(g + c, load(p + c) * (load(g + c) - dot));
        for (i64 c = end; c < cols; ++c) store(g + c, 0.0f);
    }
}

// Cross-entropy of each row; with write_grad the row becomes softmax minus one-hot(target).
template <typename T>
void cross_entropy(T* logits, const i64* targets, float* loss, i64 rows, i64 cols, int write_grad) {
#pragma omp parallel
    {
        const std::unique_ptr<float[]> powers(new float[cols]);
#pragma omp for schedule(static)
        for (i64 r = 0; r < rows; ++r) {
            T* row = logits + r * cols;
            float top;
            const float sum = exp_row(row, powers.get(), cols, &top);
            loss[r] = top + std::log(sum) - load(row + targets[r]);
            if (!write_grad) continue;
            const float inverse = 1.0f / sum;
            for (i64 c = 0; c < cols; ++c) store(row + c, powers[c] * inverse);
            store(row + targets[r], powers[targets[r]] * inverse - 1.0f);
        }
    }
}

}  // namespace

#define DISPATCH(call_bf16, call_fp32) \
    if (is_bf16) {                     \
        call_bf16;                     \
    } else {                           \
        call_fp32;                     \
    }
#define B(p) static_cast<Bf16*>(p)
#define F(p) static_cast<float*>(p)

extern "C" {

void btm_rms_forward(int is_bf16, void* x, void* w, void* y, float* rstd, i64 rows, i64 cols, float eps) {
    DISPATCH(rms_forward(B(x), B(w), B(y), rstd, rows, cols, eps), rms_forward(F(x), F(w), F(y), rstd, rows, cols, eps))
}

void btm_rms_backward(int is_bf16, void* dy, void* x, void* w, float* rstd, void* dx, float* partial, i64 rows,
                      i64 cols, i64 blocks) {
    DISPATCH(rms_backward(B(dy), B(x), B(w), rstd, B(dx), partial, rows, cols, blocks),
             rms_backward(F(dy), F(x), F(w), rstd, F(dx), partial, rows, cols, blocks))
}

void btm_swiglu_forward(int is_bf16, void* gate, void* up, void* out, i64 count) {
    DISPATCH(swiglu_forward(B(gate), B(up), B(out), count), swiglu_forward(F(gate), F(up), F(out), count))
}

void btm_swiglu_backward(int is_bf16, void* dout, void* gate, void* up, void* dgate, void* dup, i64 count) {
    DISPATCH(swiglu_backward(B(dout), B(gate), B(up), B(dgate), B(dup), count),
             swiglu_backward(F(dout), F(gate), F(up), F(dgate), F(dup), count))
}

void btm_rotate(int is_bf16, void* in, void* cos, void* sin, void* out, i64 batch, i64 length, i64 heads, i64 width,
                i64 table_stride, int inverse) {
    DISPATCH(rotate(B(in), B(cos), B(sin), B(out), batch, length, heads, width, table_stride, inverse),
             rotate(F(in), F(cos), F(sin), F(out), batch, length, heads, width, table_stride, inverse))
}

void btm_softmax_forward(int is_bf16, void* scores, i64 count, i64 rows, i64 cols, i64 first_row,
                         const int32_t* segments, i64 heads) {
    DISPATCH(softmax_forward(B(scores), count, rows, cols, first_row, segments, heads),
             softmax_forward(F(scores), count, rows, cols, first_row, segments, heads))
}

void btm_softmax_backward(int is_bf16, void* probabilities, void* grad, i64 count, i64 rows, i64 cols, i64 first_row) {
    DISPATCH(softmax_backward(B(probabilities), B(grad), count, rows, cols, first_row),
             softmax_backward(F(probabilities), F(grad), count, rows, cols, first_row))
}

void btm_cross_entropy(int is_bf16, void* logits, const i64* targets, float* loss, i64 rows, i64 cols, int write_grad) {
    DISPATCH(cross_entropy(B(logits), targets, loss, rows, cols, write_grad),
             cross_entropy(F(logits), targets, loss, rows, cols, write_grad))
}
}
