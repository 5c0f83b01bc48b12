/* The hot path of the host backend: copies, sums, flags and futexes of one rank's exchanges.
 *
 * Python (buffer.py) decides and checks; each function here is one phase of an exchange, runs
 * without the GIL, and never trusts a number that a peer wrote: it copies it once, then checks it.
 *
 * Why one set of regions is enough. Within an epoch, every active rank flags every active rank in
 * both phases, even with nothing to send. So:
 *   - A writes dispatch n+1 into B's window after it has combine n from B, which B sends after it
 *     has gathered dispatch n: nobody overwrites rows (or a flag) that are still to be read.
 *   - B writes combine n+1 into A's window after it has dispatch n+1 from A, which A sends after
 *     it has reduced combine n.
 * Between epochs the same holds if the last exchange of the old one was whole on A. If it was not,
 * B may still be reading, and A must first see B's vote of the new epoch; buffer.py insists.
 * A rank that is no longer active can only write into its own region and its own flags.
 *
 * Why votes have four places per source, used in turn. A posts a vote after it has collected the
 * one before, so B has posted that, so B has read all votes of A but the last. Two places would
 * do; a reader looks for the exact tag in all of them, so that a vote needs no place derived from
 * its number (epochs may skip numbers, and a newcomer has no history). The spare ones keep the
 * vote that B still wants while A has already failed and begun another epoch.
 *
 * Why sleeping loses no wake-up. Waker: write flags, doorbell += 1, read waiters. Waiter: read
 * doorbell, check flags, write waiters, futex(doorbell still the same?). All on doorbell and
 * waiters is seq_cst: if the waker saw no waiter, the futex sees the new doorbell and returns.
 *
 * Tags are epoch << 32 | sequence and must be equal. The sequence may wrap: every exchange
 * overwrites its flag, so no tag of 2^32 exchanges ago is left.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* cdef: begin */
typedef struct {
    /* geometry; see layout.py */
    int32_t rank, capacity, max_tokens, hidden, topk, dtype;
    int64_t row_bytes, row_stride, meta_stride;
    int64_t doorbell_at, waiters_at, votes_at, dispatch_flags_at, combine_flags_at;
    int64_t rows_at, results_at;

    /* set from any thread, with atomics */
    uint32_t interrupted, rung;

    /* membership */
    int32_t active_count;
    int32_t active[256];
    uint8_t is_active[256];
    uintptr_t control[256]; /* control part of the window of rank i (the own one, too) */
    uintptr_t inbox[256];   /* own window: region of source i */
    uintptr_t outbox[256];  /* window of rank i: region of this rank */

    /* what was sent: [max_tokens, topk] each, unless noted */
    int32_t tokens;
    int32_t *owner;     /* rank that owns the k-th expert of a token; -1 none */
    int32_t *slot;      /* and its slot there */
    float *weight;
    int32_t *result;    /* place among the owner's results (home); row of y if the owner is self */
    int32_t *dest;      /* j-th destination of a token, ascending */
    int32_t *dest_row;  /* the token's row there */
    int32_t *dests;     /* [max_tokens] number of destinations */
    int32_t *sent;      /* tokens in the order of their rows, destination by destination */
    int32_t sent_at[256], sent_rows[256]; /* by rank */

    /* what was received: rows of all sources, ascending; grown when needed */
    int32_t from_at[256], from_rows[256]; /* by rank */
    int64_t plan_rows;
    int32_t *place;      /* [plan_rows, topk] slot, then row of x and y; -1 none */
    float *place_weight; /* [plan_rows, topk] */
    int32_t *cursor;     /* [cursor_slots] */
    int32_t cursor_slots;

    uint8_t votes[256][64]; /* of the active ranks, in order: length (first 4 bytes), payload at 16 */
} fx_buffer;

int fx_open(fx_buffer *b);
void fx_close(fx_buffer *b);
uintptr_t fx_map(int fd, int64_t offset, int64_t size);
void fx_unmap(uintptr_t at, int64_t size);
int fx_punch(int fd, int64_t offset, int64_t size);

int fx_send_dispatch(fx_buffer *b, uintptr_t x, uintptr_t ids, int wide, uintptr_t weights,
                     int tokens, int k, uintptr_t table_rank, uintptr_t table_slot, int experts,
                     uint64_t tag, int64_t *bad);
int64_t fx_receive(fx_buffer *b, int slots, uintptr_t offsets, int64_t *bad);
void fx_gather(fx_buffer *b, uintptr_t x, uintptr_t out, uintptr_t weights);
void fx_send_combine(fx_buffer *b, uintptr_t y, int home, uint64_t tag);
int fx_reduce(fx_buffer *b, uintptr_t y, uintptr_t out, int home, int64_t *bad);

void fx_post_vote(fx_buffer *b, int place, uint64_t tag, const char *payload, int length);
int fx_wait(fx_buffer *b, int what, uint64_t tag, int64_t deadline_ns, int32_t *missing,
            int32_t *missing_count);
int fx_wait_any_vote(fx_buffer *b, uint64_t tag, int64_t deadline_ns);
void fx_interrupt(fx_buffer *b);
void fx_resume(fx_buffer *b);
int fx_is_interrupted(fx_buffer *b);
void fx_ring(fx_buffer *b);
/* cdef: end */

enum { FX_OK = 0, FX_TIMEOUT = 1, FX_INTERRUPTED = 2, FX_AGAIN = 3, FX_RUNG = 4 };
enum { FX_DISPATCH = 0, FX_COMBINE = 1, FX_VOTE = 2 };
enum { FX_BF16 = 0, FX_FP16 = 1, FX_FP32 = 2 };
enum { FX_NO_SUCH_EXPERT = 1, FX_NO_OWNER = 2 };
enum { FX_WRONG_MODE = 1, FX_WRONG_ROWS = 2 };

#define FX_SLICE_NS 100000000LL /* return to Python this often, for signals */
#define FX_LINE 64
#define FX_VOTE_PLACES 4
#define FX_MAX_TOPK 64

typedef struct {
    uint64_t tag;
    uint32_t rows, mode;
} fx_flag;

typedef struct {
    uint64_t tag;
    uint32_t length, unused;
    uint8_t payload[48];
} fx_vote;

/* ---- memory --------------------------------------------------------------------------------- */

int fx_open(fx_buffer *b) {
    size_t pairs = (size_t)b->max_tokens * (size_t)b->topk;
    int32_t **arrays[] = {&b->owner, &b->slot, &b->result, &b->dest, &b->dest_row, &b->sent};
    int ok = 1;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i] = malloc(pairs * sizeof(int32_t));
        ok = ok && *arrays[i];
    }
    b->weight = malloc(pairs * sizeof(float));
    b->dests = malloc((size_t)b->max_tokens * sizeof(int32_t));
    return ok && b->weight && b->dests ? 0 : -1;
}

void fx_close(fx_buffer *b) {
    void *arrays[] = {b->owner, b->slot, b->result, b->dest, b->dest_row, b->sent,
                      b->weight, b->dests, b->place, b->place_weight, b->cursor};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    b->owner = b->slot = b->result = b->dest = b->dest_row = b->sent = b->dests = NULL;
    b->weight = b->place_weight = NULL;
    b->place = b->cursor = NULL;
}

uintptr_t fx_map(int fd, int64_t offset, int64_t size) {
    void *at = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                    (off_t)offset);
    return at == MAP_FAILED ? 0 : (uintptr_t)at;
}

void fx_unmap(uintptr_t at, int64_t size) { munmap((void *)at, (size_t)size); }

int fx_punch(int fd, int64_t offset, int64_t size) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
}

/* ---- sleeping and waking -------------------------------------------------------------------- */

static uint32_t *doorbell_of(const fx_buffer *b, int rank) {
    return (uint32_t *)(b->control[rank] + (uintptr_t)b->doorbell_at);
}

static uint32_t *waiters_of(const fx_buffer *b, int rank) {
    return (uint32_t *)(b->control[rank] + (uintptr_t)b->waiters_at);
}

/* After the flags are written. */
static void wake(const fx_buffer *b, int rank) {
    __atomic_fetch_add(doorbell_of(b, rank), 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(waiters_of(b, rank), __ATOMIC_SEQ_CST))
        syscall(SYS_futex, doorbell_of(b, rank), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Until the doorbell is no longer `seen`, the deadline, a signal, or the end of the slice. */
static int doze(fx_buffer *b, uint32_t seen, int64_t deadline_ns, int64_t slice_end_ns) {
    int64_t now = now_ns();
    if (now >= deadline_ns) return FX_TIMEOUT;
    if (now >= slice_end_ns) return FX_AGAIN;
    int64_t left = (deadline_ns < slice_end_ns ? deadline_ns : slice_end_ns) - now;
    struct timespec limit = {left / 1000000000LL, left % 1000000000LL};
    __atomic_fetch_add(waiters_of(b, b->rank), 1, __ATOMIC_SEQ_CST);
    long rc = syscall(SYS_futex, doorbell_of(b, b->rank), FUTEX_WAIT, seen, &limit, NULL, 0);
    int error = rc ? errno : 0;
    __atomic_fetch_sub(waiters_of(b, b->rank), 1, __ATOMIC_SEQ_CST);
    return error == EINTR ? FX_AGAIN : FX_OK;
}

void fx_interrupt(fx_buffer *b) {
    __atomic_store_n(&b->interrupted, 1, __ATOMIC_SEQ_CST);
    wake(b, b->rank);
}

void fx_resume(fx_buffer *b) { __atomic_store_n(&b->interrupted, 0, __ATOMIC_SEQ_CST); }

int fx_is_interrupted(fx_buffer *b) {
    return (int)__atomic_load_n(&b->interrupted, __ATOMIC_SEQ_CST);
}

void fx_ring(fx_buffer *b) {
    __atomic_store_n(&b->rung, 1, __ATOMIC_SEQ_CST);
    wake(b, b->rank);
}

/* ---- flags and votes ------------------------------------------------------------------------ */

static fx_flag *flag_of(const fx_buffer *b, int64_t flags_at, int window, int source) {
    return (fx_flag *)(b->control[window] + (uintptr_t)flags_at + (uintptr_t)source * FX_LINE);
}

static fx_vote *vote_of(const fx_buffer *b, int window, int source, int place) {
    return (fx_vote *)(b->control[window] + (uintptr_t)b->votes_at +
                       (uintptr_t)(source * FX_VOTE_PLACES + place) * FX_LINE);
}

static void raise_flag(const fx_buffer *b, int64_t flags_at, int to, uint32_t rows, uint32_t mode,
                       uint64_t tag) {
    fx_flag *flag = flag_of(b, flags_at, to, b->rank);
    flag->rows = rows;
    flag->mode = mode;
    __atomic_store_n(&flag->tag, tag, __ATOMIC_RELEASE);
    wake(b, to);
}

void fx_post_vote(fx_buffer *b, int place, uint64_t tag, const char *payload, int length) {
    for (int i = 0; i < b->active_count; i++) {
        fx_vote *vote = vote_of(b, b->active[i], b->rank, place);
        __atomic_store_n(&vote->tag, 0, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        vote->length = (uint32_t)length;
        memcpy(vote->payload, payload, (size_t)length);
        __atomic_store_n(&vote->tag, tag, __ATOMIC_RELEASE);
        wake(b, b->active[i]);
    }
}

static int has_vote(const fx_buffer *b, int source, uint64_t tag, void *copy) {
    for (int place = 0; place < FX_VOTE_PLACES; place++) {
        fx_vote *vote = vote_of(b, b->rank, source, place);
        if (__atomic_load_n(&vote->tag, __ATOMIC_ACQUIRE) != tag) continue;
        if (!copy) return 1;
        uint8_t *to = copy;
        memcpy(to, &vote->length, sizeof vote->length);
        memcpy(to + 16, vote->payload, sizeof vote->payload);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&vote->tag, __ATOMIC_RELAXED) == tag) return 1;
    }
    return 0;
}

/* Wait for all active ranks. On FX_TIMEOUT `missing` holds the ids that did not come. */
int fx_wait(fx_buffer *b, int what, uint64_t tag, int64_t deadline_ns, int32_t *missing,
            int32_t *missing_count) {
    int64_t slice_end_ns = 0;
    int64_t flags_at = what == FX_DISPATCH ? b->dispatch_flags_at : b->combine_flags_at;
    int32_t waiting[256]; /* indices into active */
    int n = b->active_count;
    for (int i = 0; i < n; i++) waiting[i] = i;
    for (;;) {
        uint32_t seen = __atomic_load_n(doorbell_of(b, b->rank), __ATOMIC_SEQ_CST);
        if (fx_is_interrupted(b)) return FX_INTERRUPTED;
        int left = 0;
        for (int i = 0; i < n; i++) {
            int source = b->active[waiting[i]];
            int here = what == FX_VOTE
                           ? has_vote(b, source, tag, b->votes[waiting[i]])
                           : __atomic_load_n(&flag_of(b, flags_at, b->rank, source)->tag,
                                             __ATOMIC_ACQUIRE) == tag;
            if (!here) waiting[left++] = waiting[i];
        }
        n = left;
        if (n == 0) return FX_OK;
        if (!slice_end_ns) slice_end_ns = now_ns() + FX_SLICE_NS;
        int how = doze(b, seen, deadline_ns, slice_end_ns);
        if (how == FX_TIMEOUT) {
            for (int i = 0; i < n; i++) missing[i] = b->active[waiting[i]];
            *missing_count = n;
        }
        if (how != FX_OK) return how;
    }
}

/* Wait for the vote of any peer (FX_OK) or a ring (FX_RUNG, forgotten then). */
int fx_wait_any_vote(fx_buffer *b, uint64_t tag, int64_t deadline_ns) {
    int64_t slice_end_ns = now_ns() + FX_SLICE_NS;
    for (;;) {
        uint32_t seen = __atomic_load_n(doorbell_of(b, b->rank), __ATOMIC_SEQ_CST);
        if (fx_is_interrupted(b)) return FX_INTERRUPTED;
        for (int i = 0; i < b->active_count; i++)
            if (b->active[i] != b->rank && has_vote(b, b->active[i], tag, NULL)) return FX_OK;
        if (__atomic_exchange_n(&b->rung, 0, __ATOMIC_SEQ_CST)) return FX_RUNG;
        int how = doze(b, seen, deadline_ns, slice_end_ns);
        if (how != FX_OK) return how;
    }
}

/* ---- sums of rows --------------------------------------------------------------------------- */

/* bit for bit what torch does on any machine: no FMA (-ffp-contract=off), round to nearest even */

static inline float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float from_bf16(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

static inline uint16_t to_bf16(float f) {
    uint32_t u = float_to_bits(f);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

/* fp16 through float arithmetic, as in c10/util/Half.h: vectorises without F16C */
static inline float from_fp16(uint16_t h) {
    uint32_t w = (uint32_t)h << 16, sign = w & 0x80000000u, two = w + w;
    float normal = bits_to_float((two >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    float small = bits_to_float((two >> 17) | (126u << 23)) - 0.5f;
    return bits_to_float(sign | (two < (1u << 27) ? float_to_bits(small) : float_to_bits(normal)));
}

static inline uint16_t to_fp16(float f) {
    uint32_t w = float_to_bits(f), two = w + w, sign = w & 0x80000000u;
    float base = (bits_to_float(w & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t bias = two & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = bits_to_float((bias >> 1) + 0x07800000u) + base;
    uint32_t bits = float_to_bits(base);
    uint32_t value = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return (uint16_t)((sign >> 16) | (two > 0xFF000000u ? 0x7E00u : value));
}

static inline float from_fp32(float f) { return f; }
static inline float to_fp32(float f) { return f; }

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FX_CLONES
#endif

#define FX_BLOCK 512

/* out = sum of weights[j] * rows[j], from 0, in the order of j, in float32 */
#define FX_SUM(name, type, load, store)                                                           \
    FX_CLONES static void name(uint8_t *restrict out, const uint8_t *const *rows,                 \
                               const float *weights, int n, int hidden) {                         \
        float sum[FX_BLOCK];                                                                      \
        for (int at = 0; at < hidden; at += FX_BLOCK) {                                           \
            int size = hidden - at < FX_BLOCK ? hidden - at : FX_BLOCK;                           \
            for (int i = 0; i < size; i++) sum[i] = 0.0f;                                         \
            for (int j = 0; j < n; j++) {                                                         \
                const type *row = (const type *)rows[j] + at;                                     \
                float weight = weights[j];                                                        \
                for (int i = 0; i < size; i++) sum[i] += weight * load(row[i]);                   \
            }                                                                                     \
            type *to = (type *)out + at;                                                          \
            for (int i = 0; i < size; i++) to[i] = store(sum[i]);                                 \
        }                                                                                         \
    }

FX_SUM(sum_bf16, uint16_t, from_bf16, to_bf16)
FX_SUM(sum_fp16, uint16_t, from_fp16, to_fp16)
FX_SUM(sum_fp32, float, from_fp32, to_fp32)

static void sum_rows(const fx_buffer *b, uint8_t *out, const uint8_t *const *rows,
                     const float *weights, int n) {
    if (b->dtype == FX_BF16)
        sum_bf16(out, rows, weights, n, b->hidden);
    else if (b->dtype == FX_FP16)
        sum_fp16(out, rows, weights, n, b->hidden);
    else
        sum_fp32(out, rows, weights, n, b->hidden);
}

/* ---- dispatch ------------------------------------------------------------------------------- */

/* Active ranks in the order in which this one serves them: its successors first, itself last. */
static int nth_peer(const fx_buffer *b, int n) {
    int self = 0;
    while (b->active[self] != b->rank) self++;
    return b->active[(self + 1 + n) % b->active_count];
}

/* Look up the owners of a token's experts; its destinations come out ascending, each once. */
static int route_token(fx_buffer *b, int t, const void *ids, int wide, const float *weights, int k,
                       const int32_t *table_rank, const int32_t *table_slot, int experts,
                       int64_t *bad) {
    int32_t *owner = b->owner + (size_t)t * (size_t)b->topk;
    int32_t *slot = b->slot + (size_t)t * (size_t)b->topk;
    float *weight = b->weight + (size_t)t * (size_t)b->topk;
    int32_t *dest = b->dest + (size_t)t * (size_t)b->topk;
    int n = 0;
    for (int j = 0; j < b->topk; j++) {
        int64_t e = -1;
        if (j < k) {
            size_t at = (size_t)t * (size_t)k + (size_t)j;
            e = wide ? ((const int64_t *)ids)[at] : ((const int32_t *)ids)[at];
            weight[j] = weights[at];
        }
        owner[j] = slot[j] = -1;
        if (e == -1) continue;
        *bad = e;
        if (e < 0 || e >= experts) return FX_NO_SUCH_EXPERT;
        int32_t r = table_rank[e];
        if (r < 0 || r >= b->capacity || !b->is_active[r] || table_slot[e] < 0) return FX_NO_OWNER;
        owner[j] = r;
        slot[j] = table_slot[e];
        int i = n;
        while (i > 0 && dest[i - 1] > r) i--;
        if (i > 0 && dest[i - 1] == r) continue;
        memmove(dest + i + 1, dest + i, (size_t)(n - i) * sizeof *dest);
        dest[i] = r;
        n++;
    }
    b->dests[t] = n;
    return 0;
}

/* Place of every sent row: `sent` lists, destination by destination, the tokens that go there. */
static void plan_rows(fx_buffer *b) {
    memset(b->sent_rows, 0, sizeof b->sent_rows);
    for (int t = 0; t < b->tokens; t++)
        for (int j = 0; j < b->dests[t]; j++) b->sent_rows[b->dest[(size_t)t * b->topk + j]]++;
    int at = 0;
    for (int i = 0; i < b->active_count; i++) {
        int to = b->active[i];
        b->sent_at[to] = at;
        at += b->sent_rows[to];
        b->sent_rows[to] = 0;
    }
    for (int t = 0; t < b->tokens; t++)
        for (int j = 0; j < b->dests[t]; j++) {
            size_t pair = (size_t)t * b->topk + j;
            int to = b->dest[pair];
            b->dest_row[pair] = b->sent_rows[to];
            b->sent[b->sent_at[to] + b->sent_rows[to]++] = t;
        }
}

static void send_rows(fx_buffer *b, int to, const uint8_t *x) {
    uint8_t *region = (uint8_t *)b->outbox[to];
    int32_t results = 0;
    for (int r = 0; r < b->sent_rows[to]; r++) {
        int t = b->sent[b->sent_at[to] + r];
        size_t first = (size_t)t * (size_t)b->topk;
        int32_t *slots = (int32_t *)(region + (size_t)r * (size_t)b->meta_stride);
        float *weights = (float *)(slots + b->topk);
        for (int j = 0; j < b->topk; j++) {
            int here = b->owner[first + j] == to;
            slots[j] = here ? b->slot[first + j] : -1;
            weights[j] = here ? b->weight[first + j] : 0.0f;
            if (here) b->result[first + j] = results++;
        }
        if (to != b->rank) /* own rows are gathered from x itself */
            memcpy(region + b->rows_at + (size_t)r * (size_t)b->row_stride,
                   x + (size_t)t * (size_t)b->row_bytes, (size_t)b->row_bytes);
    }
}

/* Nothing is written to a peer unless all ids are good. Returns 0 or why not, with *bad = expert. */
int fx_send_dispatch(fx_buffer *b, uintptr_t x, uintptr_t ids, int wide, uintptr_t weights,
                     int tokens, int k, uintptr_t table_rank, uintptr_t table_slot, int experts,
                     uint64_t tag, int64_t *bad) {
    for (int t = 0; t < tokens; t++) {
        int why = route_token(b, t, (const void *)ids, wide, (const float *)weights, k,
                              (const int32_t *)table_rank, (const int32_t *)table_slot, experts, bad);
        if (why) return why;
    }
    b->tokens = tokens;
    plan_rows(b);
    for (int n = 0; n < b->active_count; n++) {
        int to = nth_peer(b, n);
        send_rows(b, to, (const uint8_t *)x);
        raise_flag(b, b->dispatch_flags_at, to, (uint32_t)b->sent_rows[to], 0, tag);
    }
    return 0;
}

static int grow_plan(fx_buffer *b, int64_t rows, int slots) {
    if (rows > b->plan_rows) {
        size_t pairs = (size_t)(rows + rows / 2) * (size_t)b->topk;
        int32_t *place = realloc(b->place, pairs * sizeof *place);
        if (place) b->place = place;
        float *weight = realloc(b->place_weight, pairs * sizeof *weight);
        if (weight) b->place_weight = weight;
        if (!place || !weight) return -1;
        b->plan_rows = rows + rows / 2;
    }
    if (slots > b->cursor_slots) {
        int32_t *cursor = realloc(b->cursor, (size_t)slots * sizeof *cursor);
        if (!cursor) return -1;
        b->cursor = cursor;
        b->cursor_slots = slots;
    }
    return 0;
}

/* After fx_wait: count rows per slot. Fills offsets [slots + 1]; returns the number of rows to
 * gather, -1 if *bad is the id of a peer that wrote nonsense, -2 if memory is short. */
int64_t fx_receive(fx_buffer *b, int slots, uintptr_t offsets_at, int64_t *bad) {
    int32_t *offsets = (int32_t *)offsets_at;
    int64_t rows = 0;
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        uint32_t count = flag_of(b, b->dispatch_flags_at, b->rank, source)->rows;
        *bad = source;
        if (count > (uint32_t)b->max_tokens) return -1;
        /* self: rows are taken from x by `sent`, which must be as long */
        if (source == b->rank && count != (uint32_t)b->sent_rows[source]) return -1;
        b->from_at[source] = (int32_t)rows;
        b->from_rows[source] = (int32_t)count;
        rows += count;
    }
    if (grow_plan(b, rows, slots)) return -2;
    memset(offsets, 0, (size_t)(slots + 1) * sizeof *offsets);
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        *bad = source;
        for (int r = 0; r < b->from_rows[source]; r++) {
            const uint8_t *meta = (uint8_t *)b->inbox[source] + (size_t)r * (size_t)b->meta_stride;
            size_t first = (size_t)(b->from_at[source] + r) * (size_t)b->topk;
            memcpy(b->place + first, meta, (size_t)b->topk * sizeof(int32_t));
            memcpy(b->place_weight + first, meta + (size_t)b->topk * sizeof(int32_t),
                   (size_t)b->topk * sizeof(float));
            for (int j = 0; j < b->topk; j++) {
                int32_t slot = b->place[first + j];
                if (slot == -1) continue;
                if (slot < 0 || slot >= slots) return -1;
                offsets[slot + 1]++;
            }
        }
    }
    for (int s = 0; s < slots; s++) {
        b->cursor[s] = offsets[s];
        offsets[s + 1] += offsets[s];
    }
    return offsets[slots];
}

/* Copy every (row, slot) to its place in out; remember the place for combine. */
void fx_gather(fx_buffer *b, uintptr_t x, uintptr_t out, uintptr_t weights_at) {
    float *weights = (float *)weights_at;
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        for (int r = 0; r < b->from_rows[source]; r++) {
            size_t first = (size_t)(b->from_at[source] + r) * (size_t)b->topk;
            int t = source == b->rank ? b->sent[b->sent_at[source] + r] : -1;
            const uint8_t *row =
                t >= 0 ? (const uint8_t *)x + (size_t)t * (size_t)b->row_bytes
                       : (const uint8_t *)b->inbox[source] + b->rows_at +
                             (size_t)r * (size_t)b->row_stride;
            for (int j = 0; j < b->topk; j++) {
                int32_t slot = b->place[first + j];
                if (slot < 0) continue;
                int32_t at = b->cursor[slot]++;
                b->place[first + j] = at;
                weights[at] = b->place_weight[first + j];
                if (t >= 0) b->result[(size_t)t * (size_t)b->topk + j] = at;
                memcpy((uint8_t *)out + (size_t)at * (size_t)b->row_bytes, row,
                       (size_t)b->row_bytes);
            }
        }
    }
}

/* ---- combine -------------------------------------------------------------------------------- */

/* home: one row per (token, expert), as it is; else one weighted sum per row. Packed both ways. */
static void send_results(fx_buffer *b, int to, const uint8_t *y, int home) {
    uint8_t *results = (uint8_t *)b->outbox[to] + b->results_at;
    size_t stride = (size_t)b->row_stride;
    for (int r = 0; r < b->from_rows[to]; r++) {
        size_t first = (size_t)(b->from_at[to] + r) * (size_t)b->topk;
        const uint8_t *rows[FX_MAX_TOPK];
        float weights[FX_MAX_TOPK];
        int n = 0;
        for (int j = 0; j < b->topk; j++) {
            int32_t at = b->place[first + j];
            if (at < 0) continue;
            rows[n] = y + (size_t)at * (size_t)b->row_bytes;
            weights[n++] = b->place_weight[first + j];
        }
        if (home) {
            for (int j = 0; j < n; j++, results += stride)
                memcpy(results, rows[j], (size_t)b->row_bytes);
        } else {
            sum_rows(b, results, rows, weights, n);
            results += stride;
        }
    }
}

void fx_send_combine(fx_buffer *b, uintptr_t y, int home, uint64_t tag) {
    for (int n = 0; n < b->active_count; n++) {
        int to = nth_peer(b, n);
        if (to != b->rank || !home) /* own rows are summed from y itself */
            send_results(b, to, (const uint8_t *)y, home);
        raise_flag(b, b->combine_flags_at, to, (uint32_t)b->from_rows[to], (uint32_t)home, tag);
    }
}

/* After fx_wait: the sums of all tokens. Returns 0, or what is wrong with peer *bad. */
int fx_reduce(fx_buffer *b, uintptr_t y, uintptr_t out, int home, int64_t *bad) {
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        const fx_flag *flag = flag_of(b, b->combine_flags_at, b->rank, source);
        *bad = source;
        if (flag->mode != (uint32_t)home) return FX_WRONG_MODE;
        if (flag->rows != (uint32_t)b->sent_rows[source]) return FX_WRONG_ROWS;
    }
    static const float ones[FX_MAX_TOPK] = {[0 ... FX_MAX_TOPK - 1] = 1.0f};
    size_t stride = (size_t)b->row_stride;
    for (int t = 0; t < b->tokens; t++) {
        size_t first = (size_t)t * (size_t)b->topk;
        const uint8_t *rows[FX_MAX_TOPK];
        float weights[FX_MAX_TOPK];
        int n = 0;
        if (home) {
            for (int j = 0; j < b->topk; j++) {
                int32_t owner = b->owner[first + j];
                if (owner < 0) continue;
                size_t at = (size_t)b->result[first + j];
                rows[n] = owner == b->rank
                              ? (const uint8_t *)y + at * (size_t)b->row_bytes
                              : (const uint8_t *)b->inbox[owner] + b->results_at + at * stride;
                weights[n++] = b->weight[first + j];
            }
        } else {
            for (; n < b->dests[t]; n++)
                rows[n] = (const uint8_t *)b->inbox[b->dest[first + n]] + b->results_at +
                          (size_t)b->dest_row[first + n] * stride;
        }
        sum_rows(b, (uint8_t *)out + (size_t)t * (size_t)b->row_bytes, rows,
                 home ? weights : ones, n);
    }
    return 0;
}
