// A step of the engine through all layers of a LLaMA-like decoder, in bfloat16. See `decoder_step.py`.
//
// One team of threads enters once, and meets at a barrier after each part of a layer. Results are rounded where the
// model's own operations round them.

#include <atomic>
#include <cstdlib>
#include <new>

#include "norm_row.h"
#include "panels.h"
#include "slot_attention.h"
#include "threads.h"

namespace {

struct Layer {
    Matrix query, key, value, out, gate, up, down;
    const uint16_t *attention_norm, *mlp_norm, *query_norm, *key_norm;  // query_norm, key_norm: of a head, or null
    uint16_t *keys, *values;                                            // (slots, H, C, D)
    int64_t keys_strides[2], values_strides[2];                         // slot, head
    int64_t window;                                                     // 0: none
};

struct Step {
    const Layer* layers;
    const uint16_t* norm;  // behind the last layer
    Matrix head;
    uint16_t* hidden;            // (T, E); overwritten
    const uint16_t *cos, *sin;   // (T, D)
    const int64_t* kept;         // (N), the tokens whose logits are wanted
    uint16_t* logits;            // (N, V)
    const attention::Span* spans;
    int64_t num_layers, heads, kv_heads, head_dim, tokens, num_kept, num_spans, threads;
    float epsilon, scale;
};

// Where a token's keys and values go.
struct Place {
    int64_t slot, column;
};

constexpr int64_t PHASES = 5;  // Of a layer, whose work is counted.

// Memory of one step, freed at its end.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        for (int i = 0; i < count_; ++i) std::free(blocks_[i]);
    }
    template <typename T>
    T* take(int64_t numbers) {
        const size_t bytes = (static_cast<size_t>(numbers) * sizeof(T) + 63) / 64 * 64 + 64;
        void* block = std::aligned_alloc(64, bytes);
        if (!block) {
            failed_ = true;
            return nullptr;
        }
        return static_cast<T*>(blocks_[count_++] = block);
    }
    bool failed() const { return failed_; }

  private:
    void* blocks_[16] = {};
    int count_ = 0;
    bool failed_ = false;
};

// The share of `count` of one of `threads`.
inline int64_t share(int64_t count, int64_t thread, int64_t threads) { return count * thread / threads; }

inline float round_once(float number) { return to_float(to_bfloat16(number)); }

// A head turned to its position: first half and second half are pairs.
inline void rotate(const uint16_t* from, const uint16_t* cos, const uint16_t* sin, int64_t dim, uint16_t* to) {
    const int64_t half = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(from[i]), b = to_float(from[i + half]);
        const uint16_t first = to_bfloat16(round_once(a * to_float(cos[i])) - round_once(b * to_float(sin[i])));
        to[i + half] = to_bfloat16(round_once(b * to_float(cos[i + half])) + round_once(a * to_float(sin[i + half])));
        to[i] = first;
    }
}

class Run {
  public:
    explicit Run(const Step& step)
        : step_(step),
          width_(step.layers[0].query.inner),
          row_((step.heads + 2 * step.kv_heads) * step.head_dim),
          inner_(step.layers[0].down.inner),
          call_(make_call()),
          sizes_(call_),
          num_items_(attention::count_items(call_, sizes_)) {
        const int64_t rows = step.tokens > step.num_kept ? step.tokens : step.num_kept;
        items_ = scratch_.take<attention::Item>(num_items_);
        places_ = scratch_.take<Place>(step.tokens);
        normed_ = scratch_.take<uint16_t>(rows * width_);
        projected_ = scratch_.take<uint16_t>(step.tokens * row_);
        attended_ = scratch_.take<uint16_t>(step.tokens * step.heads * step.head_dim);
        gated_ = scratch_.take<uint16_t>(rows * inner_);
        kept_hidden_ = scratch_.take<uint16_t>(step.num_kept * width_);
        kept_attended_ = scratch_.take<uint16_t>(step.num_kept * step.heads * step.head_dim);
        wide_ = scratch_.take<uint16_t>(step.threads * widest());
        softmax_ = scratch_.take<float>(step.threads * sizes_.scratch());
        done_ = scratch_.take<std::atomic<int64_t>>(step.num_layers * PHASES + 1);
        if (scratch_.failed()) return;
        attention::make_items(call_, sizes_, items_);
        for (int64_t i = 0; i < step.num_spans; ++i) {
            const attention::Span& span = step.spans[i];
            for (int64_t t = 0; t < span.count; ++t)
                places_[span.first_token + t] = {span.slot, span.start + t - span.first_column()};
        }
        for (int64_t i = 0; i < step.num_layers * PHASES + 1; ++i) new (done_ + i) std::atomic<int64_t>(0);
    }

    // Whether there was enough memory.
    bool ready() const { return !scratch_.failed(); }

    // What each thread does.
    void work(int64_t thread, int64_t threads) {
        uint16_t *hidden = step_.hidden, *wide = wide_ + thread * widest();
        int64_t rows = step_.tokens;
        for (int64_t i = 0; i < step_.num_layers; ++i) {
            const Layer& layer = step_.layers[i];
            const bool last = i + 1 == step_.num_layers;
            std::atomic<int64_t>* done = done_ + i * PHASES;
            norm(hidden, rows, layer.attention_norm, thread, threads);
            barrier_.wait(threads);
            uint16_t* key = projected_ + step_.heads * step_.head_dim;
            uint16_t* value = key + step_.kv_heads * step_.head_dim;
            const Part projections[] = {
                {layer.query, projected_, row_}, {layer.key, key, row_}, {layer.value, value, row_}};
            multiply_panels<Finish::STORE>(normed_, rows, projections, done[0], threads, pair_of(layer.out), wide);
            barrier_.wait(threads);
            for (int64_t t = share(rows, thread, threads); t < share(rows, thread + 1, threads); ++t) place(layer, t);
            barrier_.wait(threads);
            attend(i, done[1], thread);
            barrier_.wait(threads);
            const uint16_t* attended = attended_;
            if (last) {
                keep(thread, threads);
                barrier_.wait(threads);
                hidden = kept_hidden_, attended = kept_attended_, rows = step_.num_kept;
            }
            const PanelPair gate_and_up{{layer.gate.panel(0), layer.up.panel(0)}};
            const Part out[] = {{layer.out, hidden, width_}};
            multiply_panels<Finish::ADD>(attended, rows, out, done[2], threads, gate_and_up, wide);
            barrier_.wait(threads);
            norm(hidden, rows, layer.mlp_norm, thread, threads);
            barrier_.wait(threads);
            const Part gates[] = {{layer.gate, gated_, inner_}, {layer.up, gated_, inner_}};
            multiply_panels<Finish::GATE>(normed_, rows, gates, done[3], threads, pair_of(layer.down), wide);
            barrier_.wait(threads);
            const Part down[] = {{layer.down, hidden, width_}};
            const PanelPair after = pair_of(last ? step_.head : step_.layers[i + 1].query);
            multiply_panels<Finish::ADD>(gated_, rows, down, done[4], threads, after, wide);
            barrier_.wait(threads);
        }
        norm(hidden, rows, step_.norm, thread, threads);
        barrier_.wait(threads);
        const Part head[] = {{step_.head, step_.logits, step_.head.outer}};
        multiply_panels<Finish::STORE>(normed_, rows, head, done_[step_.num_layers * PHASES], threads,
                                       pair_of(step_.layers[0].query), wide);
    }

  private:
    attention::Call make_call() const {
        attention::Call call{};
        call.spans = step_.spans, call.num_spans = step_.num_spans;
        call.heads = step_.heads, call.kv_heads = step_.kv_heads;
        call.key_dim = call.value_dim = step_.head_dim;
        call.scale = step_.scale, call.threads = step_.threads;
        return call;
    }

    // Room for two panels of int8, widened; also if there are none.
    int64_t widest() const {
        const int64_t attended = step_.heads * step_.head_dim, longer = attended > width_ ? attended : width_;
        return 2 * PANEL * (inner_ > longer ? inner_ : longer);
    }

    void norm(const uint16_t* hidden, int64_t rows, const uint16_t* weight, int64_t thread, int64_t threads) const {
        for (int64_t row = share(rows, thread, threads); row < share(rows, thread + 1, threads); ++row)
            norm_row(hidden + row * width_, weight, normed_ + row * width_, width_, step_.epsilon);
    }

    // Turn a token's queries, and write its keys and values into its slot.
    void place(const Layer& layer, int64_t token) const {
        const int64_t dim = step_.head_dim, heads = step_.heads, kv_heads = step_.kv_heads;
        const uint16_t *cos = step_.cos + token * dim, *sin = step_.sin + token * dim;
        uint16_t* head = projected_ + token * row_;
        for (int64_t i = 0; i < heads; ++i, head += dim) {
            if (layer.query_norm) norm_row(head, layer.query_norm, head, dim, step_.epsilon);
            rotate(head, cos, sin, dim, head);
        }
        const Place& at = places_[token];
        for (int64_t i = 0; i < kv_heads; ++i, head += dim) {
            uint16_t* to = layer.keys + at.slot * layer.keys_strides[0] + i * layer.keys_strides[1] + at.column * dim;
            if (layer.key_norm) norm_row(head, layer.key_norm, head, dim, step_.epsilon);
            rotate(head, cos, sin, dim, to);
        }
        for (int64_t i = 0; i < kv_heads; ++i, head += dim)
            std::memcpy(layer.values + at.slot * layer.values_strides[0] + i * layer.values_strides[1] +
                            at.column * dim,
                        head, dim * sizeof *head);
    }

    void attend(int64_t index, std::atomic<int64_t>& done, int64_t thread) const {
        const Layer& layer = step_.layers[index];
        attention::Call call = call_;
        call.layer = index;
        call.query = projected_;
        call.query_strides[0] = step_.head_dim, call.query_strides[1] = row_;
        call.keys = layer.keys, call.values = layer.values;
        for (int i = 0; i < 2; ++i)
            call.keys_strides[i] = layer.keys_strides[i], call.values_strides[i] = layer.values_strides[i];
        call.window = layer.window;
        call.out = attended_;
        float* scratch = softmax_ + thread * sizes_.scratch();
        for (int64_t i; (i = done.fetch_add(1, std::memory_order_relaxed)) < num_items_;)
            attention::attend<uint16_t>(call, sizes_, items_[i], items_[i + 1 < num_items_ ? i + 1 : i], scratch);
    }

    // The rows that are wanted, one after the other: what follows is computed for them alone.
    void keep(int64_t thread, int64_t threads) const {
        const int64_t dim = step_.heads * step_.head_dim;
        for (int64_t i = share(step_.num_kept, thread, threads); i < share(step_.num_kept, thread + 1, threads); ++i) {
            std::memcpy(kept_hidden_ + i * width_, step_.hidden + step_.kept[i] * width_, width_ * sizeof(uint16_t));
            std::memcpy(kept_attended_ + i * dim, attended_ + step_.kept[i] * dim, dim * sizeof(uint16_t));
        }
    }

    const Step& step_;
    const int64_t width_, row_, inner_;
    const attention::Call call_;
    const attention::Sizes sizes_;
    const int64_t num_items_;
    Scratch scratch_;
    attention::Item* items_;
    Place* places_;
    uint16_t *wide_, *normed_, *projected_, *attended_, *gated_, *kept_hidden_, *kept_attended_;
    float* softmax_;
    std::atomic<int64_t>* done_;
    Barrier barrier_;
};

}  // namespace

// Returns 1 if there is not enough memory.
extern "C" int decoder_step(const Step* step) {
    Run run(*step);
    if (!run.ready()) return 1;
    in_threads(step->threads, [&](int64_t thread, int64_t threads) { run.work(thread, threads); });
    return 0;
}

extern "C" int64_t decoder_layer_size() { return sizeof(Layer); }

extern "C" int64_t decoder_step_size() { return sizeof(Step); }
