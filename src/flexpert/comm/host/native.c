/* A whole exchange in one call, for layers that C walks (exchange.h).
 *
 * It is the calls that host_exchange.py makes, in their order, for what is usual: bytes as they are,
 * peers of this machine, nobody masked. What is not usual is left to Python: before anything is sent
 * by FX_LEFT, while waiting by asking it to wait on (fx_ask), and what fails is told afterwards
 * (native_phase, native_why, native_bad).
 */
#include "exchange.h"

/* cdef: begin */
int fx_exchange(void *buffer, const void *layer);
extern "Python" int fx_ask(void *python, int what, int64_t begun_ns);
/* cdef: end */

/* What Python is asked: to wait on for FX_DISPATCH or FX_COMBINE, and to be told of points passed. */
enum { FX_AT_DISPATCH = 8, FX_AT_DISPATCH_WAIT, FX_AT_COMBINE, FX_AT_COMBINE_WAIT };

static int fx_ask(void *python, int what, int64_t begun_ns);

static int stopped(fx_buffer *b, int phase, int64_t why, int64_t bad) {
    b->native_phase = phase;
    b->native_why = why;
    b->native_bad = bad;
    return FX_STOPPED;
}

/* A point of the exchange is passed; nonzero: not beyond it. */
static int passed(fx_buffer *b, int point) {
    return b->native_tells && fx_ask(b->python, point, 0) ? stopped(b, point, 0, 0) : 0;
}

static int wait_for_all(fx_buffer *b, int what) {
    const int64_t begun_ns = now_ns();
    int32_t missing[256], count;
    b->native_turns++;
    if (fx_wait(b, what, begun_ns, INT64_MAX, b->native_slice_ns, missing, &count) == FX_OK) {
        b->waited_ns[what] += now_ns() - begun_ns;
        return 0;
    }
    return fx_ask(b->python, what, begun_ns) ? stopped(b, what, 0, 0) : 0;
}

/* Memory for the rows of a dispatch: addresses and what comes with them, then x, and y if that is not
 * shared. */
static uint8_t *native_room(fx_buffer *b, int64_t pairs, int arrays) {
    const int64_t size = pairs * (20 + arrays * b->row_bytes) + 128;
    if (size > b->native_size) {
        free(b->native_memory);
        b->native_size = 0;
        b->native_memory = aligned_alloc(64, (size_t)(size + size / 2 + 63) / 64 * 64);
        if (b->native_memory) b->native_size = size + size / 2;
    }
    return b->native_memory;
}

/* After fx_receive: the rows through the experts here, and back. */
static int compute_and_answer(fx_buffer *b, const fx_layer *layer, const int32_t *offsets, int64_t pairs) {
    const int64_t array = (pairs * b->row_bytes + 63) / 64 * 64;
    uint8_t *shared = (uint8_t *)fx_room_for_results(b, pairs);
    uint8_t *memory = native_room(b, pairs, shared ? 1 : 2);
    if (!memory) return stopped(b, FX_DISPATCH, FX_NO_MEMORY, b->rank);
    uint8_t *x = memory, *y = shared ? shared : x + array;
    int64_t *rows = (int64_t *)(x + (shared ? 1 : 2) * array);
    float *weights = (float *)(rows + pairs);
    int32_t *sources = (int32_t *)(weights + pairs), *tokens = sources + pairs;
    fx_index(b, (uintptr_t)weights, (uintptr_t)sources, (uintptr_t)tokens, (uintptr_t)rows);
    fx_gather((uintptr_t)rows, pairs, 0, b->row_bytes, (uintptr_t)x);
    if (pairs && layer->compute(layer->of, x, offsets, pairs, y))
        return stopped(b, FX_DISPATCH, FX_NO_MEMORY, b->rank);
    if (passed(b, FX_AT_COMBINE)) return FX_STOPPED;
    fx_send_combine(b, (uintptr_t)y, layer->home);
    if (passed(b, FX_AT_COMBINE_WAIT) || wait_for_all(b, FX_COMBINE)) return FX_STOPPED;
    int64_t bad = 0;
    const int why = fx_reduce(b, (uintptr_t)y, (uintptr_t)layer->out, layer->home, &bad);
    return why ? stopped(b, FX_COMBINE, why, bad) : FX_WALKED;
}

int fx_exchange(void *buffer, const void *given) {
    fx_buffer *b = buffer;
    const fx_layer *layer = given;
    int64_t bad = 0;
    if (fx_is_interrupted(b) || __atomic_load_n(&b->changed, __ATOMIC_SEQ_CST)) return FX_LEFT;
    if (layer->tokens > b->max_tokens || layer->k > b->topk) return FX_LEFT;
    if (passed(b, FX_AT_DISPATCH)) return FX_STOPPED;
    fx_greet(b);
    if (fx_send_dispatch(b, (uintptr_t)layer->x, b->row_bytes, b->row_bytes, 0, (uintptr_t)layer->ids, 1,
                         (uintptr_t)layer->weights, layer->tokens, layer->k,
                         (uintptr_t)layer->table_rank, (uintptr_t)layer->table_slot, layer->experts,
                         &bad))
        return FX_LEFT;
    b->native_exchanges++;
    if (passed(b, FX_AT_DISPATCH_WAIT) || wait_for_all(b, FX_DISPATCH)) return FX_STOPPED;
    int32_t few[257], *offsets = few;
    if (layer->slots > 256 && !(offsets = malloc((size_t)(layer->slots + 1) * sizeof *offsets)))
        return stopped(b, FX_DISPATCH, FX_NO_MEMORY, b->rank);
    const int64_t pairs = fx_receive(b, layer->slots, (uintptr_t)offsets, &bad);
    const int how = pairs < 0 ? stopped(b, FX_DISPATCH, pairs, bad)
                              : compute_and_answer(b, layer, offsets, pairs);
    if (offsets != few) free(offsets);
    return how;
}
