// Exact repair: moves tokens along shortest augmenting paths until every expert has its share.
//
// Nodes are experts; the arc a -> b costs what the cheapest token of a loses by moving to b, and prices keep every
// reduced cost non-negative, so each augmentation leaves an assignment that is optimal for its own loads.
// When tokens do not divide by experts, one more node, the hub, holds the units above the floor.
#pragma once
#include "prices.hpp"

namespace moe {

template <class Score>
class Repair {
  public:
    Repair(const Rows<Score>& rows, std::vector<double>& price, Best<Score>& best, const std::vector<int64_t>& load)
        : rows_(rows), experts_(rows.experts), nodes_(rows.experts + 1), price_(price), owner_(best.first), load_(load),
          cost_(nodes_ * nodes_, kFar), cut_(nodes_ * nodes_, kFar), head_(nodes_ * nodes_, -1), heap_(experts_ * experts_),
          members_(experts_), place_(rows.tokens), distance_(nodes_), key_(nodes_), trial_(nodes_), from_(nodes_), num_refills_(experts_, 0) {
        floor_ = rows.tokens / experts_;
        hub_room_ = rows.tokens % experts_;
        open_hub();
        collect_members();
        collect_arcs(best);
    }

    // Returns the number of augmentations.
    int64_t run() {
        int64_t paths = 0;
        for (;;) {
            const int64_t sink = search();
            if (sink < 0) break;
            augment(sink);
            ++paths;
        }
        price_.resize(experts_);
        return paths;
    }

  private:
    struct Entry {
        double cost;
        int32_t token;
        bool operator<(const Entry& other) const { return cost != other.cost ? cost > other.cost : token > other.token; }
    };
    static constexpr int32_t kManyRefills = 8;
    static constexpr double kFar = std::numeric_limits<double>::infinity();

    int64_t arc(int64_t a, int64_t b) const { return a * nodes_ + b; }
    double value(int64_t token, int64_t e) const { return double(rows_.row(token)[e]); }
    int64_t excess(int64_t e) const { return load_[e] - floor_ - (on_hub_[e] ? 1 : 0); }

    // The experts with the highest prices may take one token above the floor; the hub's price lies between.
    void open_hub() {
        std::vector<int64_t> order(experts_);
        for (int64_t e = 0; e < experts_; ++e) order[e] = e;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return price_[a] != price_[b] ? price_[a] > price_[b] : load_[a] > load_[b];
        });
        on_hub_.assign(experts_, 0);
        for (int64_t i = 0; i < hub_room_; ++i) on_hub_[order[i]] = 1;
        price_.push_back(hub_room_ ? price_[order[hub_room_ - 1]] : 0.0);
        if (!hub_room_) return;
        for (int64_t e = 0; e < experts_; ++e) set_hub(e, on_hub_[e]);
    }

    void set_hub(int64_t e, bool on) {
        on_hub_[e] = on;
        cost_[arc(e, experts_)] = on ? kFar : 0.0;
        cost_[arc(experts_, e)] = on ? 0.0 : kFar;
    }

    void collect_members() {
        for (int64_t e = 0; e < experts_; ++e) members_[e].reserve(load_[e] + 8);
        for (int64_t t = 0; t < rows_.tokens; ++t) {
            place_[t] = static_cast<int32_t>(members_[owner_[t]].size());
            members_[owner_[t]].push_back(static_cast<int32_t>(t));
        }
    }

    // Arcs start with the tokens near a border only; farther ones are fetched when a path could need them.
    void collect_arcs(const Best<Score>& best) {
        int64_t over = 0;
        for (int64_t e = 0; e < experts_; ++e) over += std::max<int64_t>(0, excess(e));
        if (!over) return;
        const double wanted = double(6 * over + 16 * experts_) / double(rows_.tokens);
        const double band = double(margin_quantile(best, std::min(0.25, wanted)));
        for (int64_t a = 0; a < experts_; ++a)
            for (int64_t b = 0; b < experts_; ++b)
                if (a != b) cut_[arc(a, b)] = band + price_[a] - price_[b];
        for (int64_t t = 0; t < rows_.tokens; ++t)
            if (best.margin[t] <= band) offer(static_cast<int32_t>(t), owner_[t]);
        for (int64_t a = 0; a < experts_; ++a)
            for (int64_t b = 0; b < experts_; ++b)
                if (a != b) refresh(a, b);
    }

    // Puts the token on every arc out of `a` whose list reaches as far as the token's cost.
    void offer(int32_t token, int64_t a) {
        const Score* row = rows_.row(token);
        const double here = double(row[a]);
        const double* cut = &cut_[arc(a, 0)];
        for (int64_t b = 0; b < experts_; ++b) {
            const double cost = here - double(row[b]);
            if (cost > cut[b] || b == a) continue;
            auto& heap = heap_[a * experts_ + b];
            heap.push_back({cost, token});
            std::push_heap(heap.begin(), heap.end());
        }
    }

    // Drops tokens that have left and notes the cheapest one; without any, the arc costs at least `cut`.
    void refresh(int64_t a, int64_t b) {
        auto& heap = heap_[a * experts_ + b];
        while (!heap.empty() && owner_[heap.front().token] != a) {
            std::pop_heap(heap.begin(), heap.end());
            heap.pop_back();
        }
        cost_[arc(a, b)] = heap.empty() ? cut_[arc(a, b)] : heap.front().cost;
        head_[arc(a, b)] = heap.empty() ? -1 : heap.front().token;
    }

    bool is_open(int64_t a, int64_t b) const {
        return a < experts_ && b < experts_ && head_[arc(a, b)] < 0 && cut_[arc(a, b)] < kFar;
    }

    // Fetches the next cheapest tokens of an arc whose list ran out.
    void refill(int64_t a, int64_t b) {
        auto& heap = heap_[a * experts_ + b];
        heap.clear();
        for (int32_t token : members_[a]) heap.push_back({value(token, a) - value(token, b), token});
        const size_t keep = std::max<size_t>(32, heap.size() / 4);
        double& cut = cut_[arc(a, b)];
        cut = kFar;
        if (heap.size() > keep) {
            auto later = [](const Entry& x, const Entry& y) { return y < x; };
            std::nth_element(heap.begin(), heap.begin() + static_cast<int64_t>(keep) - 1, heap.end(), later);
            cut = heap[keep - 1].cost;
            heap.resize(keep);
        }
        std::make_heap(heap.begin(), heap.end());
        refresh(a, b);
    }

    // Finds the cheapest token of every arc out of `a` whose list ran out, in one pass over its members.
    void survey(int64_t a) {
        std::vector<double> least(experts_, kFar), next(experts_, kFar);
        std::vector<int32_t> cheapest(experts_, -1);
        for (int32_t token : members_[a]) {
            const Score* row = rows_.row(token);
            const double here = double(row[a]);
            for (int64_t b = 0; b < experts_; ++b) {
                const double cost = here - double(row[b]);
                const bool is_less = cost < least[b] || (cost == least[b] && token < cheapest[b]);
                next[b] = is_less ? least[b] : std::min(next[b], cost);
                cheapest[b] = is_less ? token : cheapest[b];
                least[b] = is_less ? cost : least[b];
            }
        }
        for (int64_t b = 0; b < experts_; ++b) {
            if (b == a || !is_open(a, b)) continue;
            auto& heap = heap_[a * experts_ + b];
            heap.clear();
            if (cheapest[b] >= 0) heap.push_back({least[b], cheapest[b]});
            cut_[arc(a, b)] = next[b];
            refresh(a, b);
        }
    }

    // Dijkstra from all experts with too many tokens to the nearest with too few; prices follow. Returns that expert or -1.
    // An open arc counts with its lower bound; only when it would be used are its tokens fetched.
    int64_t search() {
        bool any = false;
        for (int64_t v = 0; v < nodes_; ++v) {
            distance_[v] = key_[v] = kFar;
            from_[v] = -1;
            if (v < experts_ && excess(v) > 0) distance_[v] = key_[v] = 0.0, any = true;
        }
        if (!any) return -1;
        limit_ = kFar;
        settled_.clear();
        for (;;) {
            int64_t v = 0;
            for (int64_t u = 1; u < nodes_; ++u)
                if (key_[u] < key_[v]) v = u;
            if (const int64_t a = from_[v]; a >= 0 && is_open(a, v)) {
                if (++num_refills_[a] == kManyRefills) {
                    survey(a);
                    for (int64_t u = 0; u < nodes_; ++u)
                        if (from_[u] == a && key_[u] < kFar) reach(u);
                } else {
                    refill(a, v);
                    reach(v);
                }
                continue;
            }
            if (v < experts_ && excess(v) < 0) {
                for (int64_t u : settled_) price_[u] += distance_[v] - distance_[u];
                return v;
            }
            key_[v] = kFar;
            settled_.push_back(v);
            relax(v);
        }
    }

    // The distance of u over all settled nodes, after one of its arcs turned out dearer than its bound.
    void reach(int64_t u) {
        distance_[u] = kFar;
        for (int64_t v : settled_) {
            const double trial = std::max(distance_[v], distance_[v] - price_[v] + cost_[arc(v, u)] + price_[u]);
            if (trial < distance_[u]) distance_[u] = trial, from_[u] = static_cast<int32_t>(v);
        }
        key_[u] = distance_[u];
    }

    void relax(int64_t v) {
        const double base = distance_[v] - price_[v], at_least = distance_[v];
        const double* cost = &cost_[arc(v, 0)];
        for (int64_t u = 0; u < nodes_; ++u) trial_[u] = std::max(at_least, base + cost[u] + price_[u]);
        for (int64_t u = 0; u < nodes_; ++u) {
            if (!(trial_[u] < distance_[u]) || !(trial_[u] <= limit_)) continue;
            distance_[u] = key_[u] = trial_[u];
            from_[u] = static_cast<int32_t>(v);
            if (u < experts_ && excess(u) < 0 && !is_open(v, u)) limit_ = trial_[u];
        }
    }

    // How many tokens of equal cost the arc can move at once.
    int64_t width(int64_t a, int64_t b, int64_t most) {
        if (a == experts_ || b == experts_ || most <= 1) return 1;
        auto& heap = heap_[a * experts_ + b];
        const double cost = cost_[arc(a, b)];
        taken_.clear();
        while (!heap.empty() && static_cast<int64_t>(taken_.size()) < most) {
            if (owner_[heap.front().token] != a) {
                std::pop_heap(heap.begin(), heap.end());
                heap.pop_back();
                continue;
            }
            if (heap.front().cost != cost) break;
            taken_.push_back(heap.front());
            std::pop_heap(heap.begin(), heap.end());
            heap.pop_back();
        }
        for (const Entry& entry : taken_) {
            heap.push_back(entry);
            std::push_heap(heap.begin(), heap.end());
        }
        return static_cast<int64_t>(taken_.size());
    }

    void augment(int64_t sink) {
        path_.assign(1, sink);
        while (from_[path_.back()] >= 0) path_.push_back(from_[path_.back()]);
        const int64_t source = path_.back();
        int64_t amount = std::min(excess(source), -excess(sink));
        for (size_t i = path_.size() - 1; i > 0 && amount > 1; --i) amount = std::min(amount, width(path_[i], path_[i - 1], amount));
        for (int64_t unit = 0; unit < amount; ++unit)
            for (size_t i = 1; i < path_.size(); ++i) advance(path_[i], path_[i - 1]);
    }

    void advance(int64_t a, int64_t b) {
        if (b == experts_) return set_hub(a, true);
        if (a == experts_) return set_hub(b, false);
        move(head_[arc(a, b)], a, b);
    }

    void move(int32_t token, int64_t a, int64_t b) {
        owner_[token] = static_cast<int32_t>(b);
        --load_[a];
        ++load_[b];
        const int32_t last = members_[a].back();
        members_[a][place_[token]] = last;
        place_[last] = place_[token];
        members_[a].pop_back();
        place_[token] = static_cast<int32_t>(members_[b].size());
        members_[b].push_back(token);
        const int32_t* head = &head_[arc(a, 0)];
        for (int64_t e = 0; e < experts_; ++e)
            if (head[e] == token) refresh(a, e);
        arrive(token, b);
    }

    void arrive(int32_t token, int64_t a) {
        const Score* row = rows_.row(token);
        const double here = double(row[a]);
        for (int64_t b = 0; b < experts_; ++b) {
            const double cost = here - double(row[b]);
            const int64_t at = arc(a, b);
            if (cost > cut_[at] || b == a) continue;
            auto& heap = heap_[a * experts_ + b];
            heap.push_back({cost, token});
            std::push_heap(heap.begin(), heap.end());
            if (head_[at] < 0 || cost < cost_[at]) refresh(a, b);
        }
    }

    const Rows<Score>& rows_;
    int64_t experts_, nodes_, floor_ = 0, hub_room_ = 0;
    std::vector<double>& price_;
    std::vector<int32_t>& owner_;
    std::vector<int64_t> load_;
    std::vector<double> cost_, cut_;
    std::vector<int32_t> head_;
    std::vector<std::vector<Entry>> heap_;
    std::vector<std::vector<int32_t>> members_;
    std::vector<int32_t> place_;
    std::vector<double> distance_, key_, trial_;
    double limit_ = kFar;
    std::vector<int32_t> from_, num_refills_;
    std::vector<char> on_hub_;
    std::vector<int64_t> settled_, path_;
    std::vector<Entry> taken_;
};

}  // namespace moe
