// Attention of a packed row, and its gradients: a KV head of a group at a time, on several threads. See `packed.py`, which
// fills in a `Call`.

#include <cstdint>
#include <cstdlib>

#include "packed_worker.h"
#include "threads.h"

namespace {

constexpr int64_t PART = 256;  // Positions of a group that one item of the forward pass takes, at least.
constexpr int64_t PARTIAL = 1 << 22;  // Numbers of gradients of prefixes that are kept before they are added up.
constexpr int64_t SERIAL_WORK = 1 << 20;  // Products of numbers below which more threads do not pay.

struct Free {
    float* data;
    ~Free() { std::free(data); }
};

int64_t group_positions(const Call& call, int64_t group) {
    int64_t count = 0;
    for (int64_t s = 0; s < call.groups[group].num_segments; ++s)
        count += call.segments[call.groups[group].first_segment + s].count;
    return count;
}

int64_t useful_threads(const Call& call) {
    int64_t work = 0;
    for (int64_t g = 0; g < call.num_groups; ++g)
        work += group_positions(call, g) * (Sizes::length(call, g) + call.groups[g].shared + 1);
    return work * call.heads * (call.key_dim + call.value_dim) < SERIAL_WORK ? 1 : call.threads;
}

// Call `work(worker, item)` for each item, on threads that have workers of their own.
template <typename T, class M, class Work>
int in_workers(const Call& call, bool backward, int64_t items, int64_t threads, const Work& work) {
    const Sizes sizes(call);
    const int64_t own = up(sizes.floats(backward), 16), used = std::max<int64_t>(1, std::min(threads, items));
    const Free scratch{static_cast<float*>(std::aligned_alloc(64, used * own * sizeof(float)))};
    if (!scratch.data) return 1;
    std::atomic<int64_t> next{0};
    in_threads(used, [&](int64_t thread, int64_t) {
        Worker<T, M> worker(call, sizes, scratch.data + thread * own, backward);
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(worker, item);
    });
    return 0;
}

template <typename T, class M>
int forward(const Call& call) {
    int64_t parts = 1;
    for (int64_t g = 0; g < call.num_groups; ++g) parts = std::max(parts, group_positions(call, g) / PART);
    return in_workers<T, M>(call, false, call.num_groups * call.kv_heads * parts, useful_threads(call),
                            [&](Worker<T, M>& worker, int64_t item) {
                                const int64_t rest = item / parts, group = rest / call.kv_heads;
                                const int64_t own = std::min(parts, std::max<int64_t>(1, group_positions(call, group) / PART));
                                if (item % parts < own) worker.attend(group, rest % call.kv_heads, item % parts, own);
                            });
}

// Prefixes' gradients are added up in the order of the groups, whatever thread computed them.
template <typename T, class M>
int backward(const Call& call) {
    const int64_t dims = call.key_dim + call.value_dim, threads = useful_threads(call);
    const auto size = [&](int64_t group) { return Sizes::length(call, group) * dims * call.kv_heads; };
    for (int64_t first = 0, last; first < call.num_groups; first = last) {
        int64_t kept = size(first);
        for (last = first + 1; last < call.num_groups && kept + size(last) <= PARTIAL; ++last) kept += size(last);
        const Free partial{static_cast<float*>(std::malloc((kept + 1) * sizeof(float)))};
        if (!partial.data) return 1;
        const auto partial_of = [&](int64_t group, int64_t head) {
            float* result = partial.data + head * (size(group) / call.kv_heads);
            for (int64_t g = first; g < group; ++g) result += size(g);
            return result;
        };
        const int failed = in_workers<T, M>(
            call, true, (last - first) * call.kv_heads, threads, [&](Worker<T, M>& worker, int64_t item) {
                const int64_t group = first + item / call.kv_heads, head = item % call.kv_heads;
                float* keys = partial_of(group, head);
                worker.differentiate(group, head, keys, keys + Sizes::length(call, group) * call.key_dim);
            });
        if (failed) return failed;
        parallel_for(threads, call.kv_heads, [&](int64_t head) {
            for (int64_t group = first; group < last; ++group) {
                if (call.prefix_of_group[group] < 0) continue;
                const Prefix& prefix = call.prefixes[call.prefix_of_group[group]];
                const float* from = partial_of(group, head);
                const int64_t keys = prefix.length * call.key_dim, values = prefix.length * call.value_dim;
                for (int64_t i = 0; i < keys; ++i) prefix.key_gradient[head * keys + i] += from[i];
                for (int64_t i = 0; i < values; ++i) prefix.value_gradient[head * values + i] += from[keys + i];
            }
        });
    }
    return 0;
}

#if defined(__AVX512F__) && defined(__AVX512BF16__)
typedef PairWords HalfWords;
#else
typedef FloatWords HalfWords;
#endif

}  // namespace

extern "C" int packed_attention_float(const Call* call) { return forward<float, FloatWords>(*call); }
extern "C" int packed_attention_bfloat16(const Call* call) { return forward<uint16_t, HalfWords>(*call); }
extern "C" int packed_attention_gradients_float(const Call* call) { return backward<float, FloatWords>(*call); }
extern "C" int packed_attention_gradients_bfloat16(const Call* call) { return backward<uint16_t, HalfWords>(*call); }

extern "C" int64_t packed_attention_call_size() { return sizeof(Call); }
extern "C" int64_t packed_attention_group_size() { return sizeof(Group); }
extern "C" int64_t packed_attention_segment_size() { return sizeof(Segment); }
extern "C" int64_t packed_attention_prefix_size() { return sizeof(Prefix); }
