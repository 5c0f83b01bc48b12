/* A layer of experts without Python: who has which is read from tables, which Python replaces between
 * two steps; the exchange is called through its address (exchange.h). Included by ops.c.
 */
#include "exchange.h"

#include <time.h>

/* Words of a layer of experts. */
enum { EXP_LAYER = AT_DIMS, EXP_WEIGHTS = AT_SCALAR, EXP_GATE = AT_EXTRA };

/* Scratch of at least so many bytes, or NULL. */
static char *moe_room(moe_step *moe, int64_t size) {
    if (size > moe->size) {
        free((void *)moe->memory);
        moe->size = size + size / 2;
        moe->memory = (intptr_t)aligned_alloc(64, (size_t)(moe->size + 63) / 64 * 64);
        if (!moe->memory) moe->size = 0;
    }
    return (char *)moe->memory;
}

static void fx_free_step(moe_step *moe) {
    free((void *)moe->memory);
    moe->memory = 0;
    moe->size = 0;
}

static int64_t time_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes of the buffers that a program has itself. */
static int64_t row_scratch(const row_program *program, long rows) {
    const int64_t *sizes = (const int64_t *)program->sizes;
    int64_t whole = 0;
    for (long i = 0; i < program->buffers; i++)
        if (i != program->source && i != program->result) whole += whole_lines(sizes[2 * i] + rows * sizes[2 * i + 1]);
    return whole;
}

static int operate(const kernels *here, const int64_t *op, const int64_t *step);

static int run_rows(const row_program *program, const char *source, char *result, long rows, char *scratch) {
    const int64_t(*words)[2] = (const int64_t(*)[2])program->words, *sizes = (const int64_t *)program->sizes;
    const int32_t *owners = (const int32_t *)program->owners;
    int64_t places[64];
    for (long i = 0; i < program->buffers; i++) {
        places[i] = (int64_t)(i == program->source ? source : i == program->result ? result : scratch);
        if (places[i] == (int64_t)scratch) scratch += whole_lines(sizes[2 * i] + rows * sizes[2 * i + 1]);
    }
    for (long o = 0; o < program->operations; o++, words += WIDTH, owners += WIDTH) {
        int64_t op[WIDTH];
        for (int i = 0; i < WIDTH; i++)
            op[i] = words[i][0] + words[i][1] * rows + (owners[i] < 0 ? 0 : places[owners[i]]);
        const int failed = operate(pick(), op, NULL);
        if (failed) return failed;
    }
    return 0;
}

static int fx_run_rows(const row_program *program, intptr_t source, intptr_t result, long rows) {
    char *scratch = aligned_alloc(64, (size_t)row_scratch(program, rows) + 64);
    if (!scratch) return NO_ROOM;
    const int failed = run_rows(program, (const char *)source, (char *)result, rows, scratch);
    free(scratch);
    return failed;
}

typedef struct {
    moe_step *moe;
    const moe_layer *layer;
    const row_program *gate;
    int dtype;
} expert_work;

/* As `LayerExperts.compute`. */
static int compute_experts(void *given, const void *x, const int32_t *offsets, int64_t rows, void *y) {
    const expert_work *work = given;
    const moe_layer *layer = work->layer;
    const long width = ITEM[work->dtype];
    const int64_t began = time_ns();
    const int64_t hidden = whole_lines(rows * layer->up.out_features * width);
    const int64_t gated = whole_lines(rows * layer->down.in_features * width);
    char *room = moe_room(work->moe, hidden + gated + row_scratch(work->gate, rows));
    if (!room) return NO_ROOM;
    const intptr_t begins = (intptr_t)offsets, ends = (intptr_t)(offsets + 1);
    int failed = fx_grouped(&layer->up, (intptr_t)x, begins, ends, (intptr_t)room, work->dtype);
    if (!failed) failed = run_rows(work->gate, room, room + hidden, rows, room + hidden + gated);
    if (!failed)
        failed = fx_grouped(&layer->down, (intptr_t)(room + hidden), begins, ends, (intptr_t)y, work->dtype);
    work->moe->compute_ns += time_ns() - began;
    return failed;
}

/* FX_WALKED, FX_LEFT, FX_STOPPED or NO_ROOM. */
static int walk_experts(const int64_t *op, moe_step *moe) {
    const long tokens = op[AT_SIZES], k = op[AT_SIZES + 1], index = op[EXP_LAYER];
    const int weights_of = op[AT_DTYPES] >> 8 & 255;
    if (!moe || !moe->exchange || index >= moe->count) return FX_LEFT;
    const moe_layer *layer = (const moe_layer *)moe->layers + index;
    if (!layer->ready || tokens * k > INT32_MAX) return FX_LEFT;
    const int64_t *ids = (const int64_t *)op[AT_B], *chosen = ids;
    for (long i = 0; i < tokens * k; i++)
        if (ids[i] < -1 || ids[i] >= layer->experts) return FX_LEFT;
    const int64_t floats = whole_lines((tokens * k + 16) * 4);
    char *room = moe_room(moe, floats + tokens * k * 8);
    if (!room) return NO_ROOM;
    float *weights = (float *)room;
    gather((const char *)op[EXP_WEIGHTS], 1, weights_of, tokens * k, weights);
    if (layer->split) { /* tokens take turns with the replicas; the last column is for no expert */
        int64_t *entries = (int64_t *)(room + floats);
        for (long i = 0; i < tokens * k; i++) {
            const int64_t *row = (const int64_t *)layer->split + i / k % layer->period * (layer->experts + 1);
            entries[i] = row[ids[i] < 0 ? layer->experts : ids[i]];
        }
        chosen = entries;
    }
    expert_work work = {moe, layer, (const row_program *)op[EXP_GATE], (int)(op[AT_DTYPES] & 255)};
    /* ids and weights are in the buffer's own memory before the scratch is used for something else */
    const fx_layer asked = {
        .x = (const void *)op[AT_A],
        .ids = chosen,
        .weights = weights,
        .table_rank = (const int32_t *)layer->table_rank,
        .table_slot = (const int32_t *)layer->table_slot,
        .out = (void *)op[AT_OUT],
        .tokens = (int32_t)tokens,
        .k = (int32_t)k,
        .experts = (int32_t)layer->entries,
        .slots = (int32_t)layer->slots,
        .home = moe->home,
        .compute = compute_experts,
        .of = &work,
    };
    const int how = ((fx_exchange_of)moe->exchange)((void *)moe->buffer, &asked);
    if (how != FX_WALKED) return how;
    for (long i = 0; layer->counts && i < tokens * k; i++)
        if (ids[i] >= 0) ((int64_t *)layer->counts)[ids[i]]++;
    moe->walked++;
    return FX_WALKED;
}
