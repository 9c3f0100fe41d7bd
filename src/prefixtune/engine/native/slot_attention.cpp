// Attention of one step of the engine, in place: the step's keys and values go into the slots of the KV cache, and its
// queries attend to the slots. See `kernel.py`, which fills in a `Call`, and `SlotAttention`, which computes the same.

#include "slot_attention.h"

#include <atomic>
#include <cstdlib>

#include "threads.h"

namespace attention {

constexpr int64_t SERIAL_WORK = 1 << 17;  // Numbers read below which more threads do not pay.

template <typename T>
int run(const Call& call) {
    const Sizes sizes(call);
    const int64_t num_items = count_items(call, sizes);
    int64_t work = 0;
    for (int64_t i = 0; i < call.num_spans; ++i) {
        const Span& span = call.spans[i];
        const int64_t blocks = (span.count + sizes.tokens - 1) / sizes.tokens;
        work += blocks * call.kv_heads * (span.start + span.count) * (call.key_dim + call.value_dim);
    }
    const int64_t threads = work < SERIAL_WORK ? 1 : call.threads;
    Item* items = static_cast<Item*>(std::malloc((num_items + 1) * sizeof(Item)));
    float* scratch = static_cast<float*>(std::aligned_alloc(64, threads * sizes.scratch() * sizeof(float)));
    if (!items || !scratch) {
        std::free(items);
        std::free(scratch);
        return 1;
    }
    make_items(call, sizes, items);
    std::atomic<int64_t> next{0};
    Barrier barrier;
    in_threads(threads, [&](int64_t thread, int64_t of) {
        if (call.key) {
            for (int64_t i = thread; i < call.num_spans * call.kv_heads; i += of)
                write<T>(call, call.spans[i / call.kv_heads], i % call.kv_heads);
            barrier.wait(of);
        }
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_items;)
            attend<T>(call, sizes, items[i], items[i + 1 < num_items ? i + 1 : i], scratch + thread * sizes.scratch());
    });
    std::free(items);
    std::free(scratch);
    return 0;
}

}  // namespace attention

extern "C" int slot_attention_float(const attention::Call* call) { return attention::run<float>(*call); }

extern "C" int slot_attention_bfloat16(const attention::Call* call) { return attention::run<uint16_t>(*call); }

extern "C" int64_t slot_attention_call_size() { return sizeof(attention::Call); }
