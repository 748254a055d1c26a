// Ranges over threads: torch's own OpenMP threads where the library is built with OpenMP, else threads of its own.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moe {

// Runs body(part) for every part, on as many threads; the first exception is thrown again here.
inline void run_parts(int parts, const std::function<void(int)>& body) {
    std::exception_ptr problem;
    std::mutex lock;
    const auto guarded = [&](int part) {
        try {
            body(part);
        } catch (...) {
            const std::lock_guard<std::mutex> held(lock);
            if (!problem) problem = std::current_exception();
        }
    };
    if (parts <= 1) {
        for (int part = 0; part < parts; ++part) body(part);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int part = 0; part < parts; ++part) guarded(part);
#else
    std::vector<std::thread> workers;
    for (int part = 1; part < parts; ++part) workers.emplace_back(guarded, part);
    guarded(0);
    for (auto& worker : workers) worker.join();
#endif
    if (problem) std::rethrow_exception(problem);
}

// Runs body(from, to) over equal ranges, multiples of `grain` long; results must not depend on how the range is cut.
inline void parallel(int64_t count, int64_t work_per_item, int threads, int64_t grain,
                     const std::function<void(int64_t, int64_t)>& body) {
    if (threads <= 1 || count * work_per_item < (int64_t{1} << 18)) return body(0, count);
    const int64_t share = ((count + threads - 1) / threads + grain - 1) / grain * grain;
    run_parts(static_cast<int>((count + share - 1) / share), [&](int part) { body(part * share, std::min(count, (part + 1) * share)); });
}

inline void parallel(int64_t count, int64_t work_per_item, int threads, const std::function<void(int64_t, int64_t)>& body) {
    parallel(count, work_per_item, threads, 16, body);
}

}  // namespace moe
