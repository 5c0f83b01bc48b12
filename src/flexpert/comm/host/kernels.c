/* The hot path of the host backend: copies, sums, flags and futexes of one rank's exchanges.
 *
 * Python decides and checks; each function here is one phase of an exchange, runs without the GIL,
 * and never trusts a number that a peer wrote: it copies it once, then checks it.
 *
 * Tags. Each pair of ranks counts its own exchanges and votes. A flag carries
 * epoch << 32 | link << 20 | count and must be equal to what its reader expects. Counts start anew
 * with an epoch and with a link; they may wrap, since each exchange overwrites its flag.
 *
 * Links. `epoch` begins on both sides at once, with all links up as number 0. Within an epoch a
 * rank that unmasks a peer starts the link afresh: it adds one to its own generation, and says so
 * in its hello (epoch, own generation, the peer's generation as it has seen it). A side may send
 * once it knows the peer's generation and the peer has seen its own; the link's number is the sum
 * of both generations, so it never comes back. Hellos are read and written only at the beginning of
 * an exchange and while waiting in it, i.e. when this rank reads nobody's rows: who sees the peer's
 * hello may overwrite what it had sent before. What cannot be sent yet is owed, and sent from
 * the waiting loop.
 *
 * Why one set of regions is enough. While a link is up, both sides flag each other in both phases
 * of every exchange, even with nothing to send. So:
 *   - A writes dispatch n+1 into B's window after it has combine n from B, which B sends after it
 *     has received dispatch n: nobody overwrites rows (or a flag) that are still to be read. Rows
 *     of dispatch n may be gathered until B's combine is sent.
 *   - B writes combine n+1 into A's window after it has dispatch n+1 from A, which A sends after
 *     it has reduced combine n.
 * A side that gives up on the other masks it, writes no more, and later needs a hello. Between
 * epochs the same holds if the last exchange of the old one was whole on A. If it was not,
 * B may still be reading, and A must first see B's vote of the new epoch; host_exchange.py
 * insists.
 *
 * Shared rows. Ranks of one machine do not send each other rows. A rank keeps a token's payload once,
 * in its own window, whoever wants it, and the results of its experts where these have written them;
 * peers have both mapped to read. What is written into a peer's window is of each row the meta, and
 * of each result where it lies. The home of a token adds up what it finds there, rounding where a
 * partial sum would have been rounded on its way: with the same bits as if it had been sent.
 *   - A shares payloads n+1 after it has combine n from all to whom it shared n: they send it after
 *     they have read payloads n. A shares results n+1 after it has dispatch n+1 from all to whom it
 *     shared n: they send it after they have reduced combine n. A vote says both.
 *   - Who was dropped in between may still read. For as long as anybody is waited for, nothing is
 *     shared then: rows are sent, as to another machine, and the reader finds the old ones.
 *   - One that has slept for longer would read results that have been written over. So A counts a
 *     version up before it does that, the flag of its combine says which one it shares, and a home
 *     looks at it again after it has added up: it does not take a sum of which it was not that one.
 *     Payloads need no such count: what a dropped rank makes of them goes to nobody.
 *
 * Beats. A rank that waits for long says so in the second word of its hellos (epoch, count). Who
 * runs out of time does not blame those: they wait as well, for a third one, and not for ever.
 *
 * Why votes have four lines per source, used in turn. A posts a vote after it has collected the
 * one before, so B has posted that, so B has read all votes of A but the last. Two lines would
 * do; a reader looks for the exact tag in all of them, so that a vote needs no line derived from
 * its number (epochs may skip numbers, and a newcomer has no history). The spare ones keep the
 * vote that B still wants while A has already failed and begun another epoch.
 *
 * Why sleeping loses no wake-up. Waker: write flags, doorbell += 1, read waiters. Waiter: read
 * doorbell, check flags, write waiters, futex(doorbell still the same?). All on doorbell and
 * waiters is seq_cst: if the waker saw no waiter, the futex sees the new doorbell and returns.
 *
 * Peers on other machines have an outbox in own memory (staging) and no control part. What would
 * be a store into their window is noted as due; remote.py sends it over NIXL, and stores what
 * arrives into the inbox.
 *
 * Two levels. A rank may send to a whole machine at once: each token that any rank there needs
 * goes once to one of them, the *gateway* of this sender (gateways.py chooses the same one on all
 * ranks). The flag then says FX_MERGED, and each row tells for each of its experts which rank of
 * the machine is meant. The gateway hands the flag on to its siblings, in a line for this sender in
 * the places they have exported to it; they read the rows where they lie, in the gateway's memory,
 * of which they have a mapping (relays.py). Back go partial sums: each sibling leaves them, in
 * float32 and at the index of the merged row, in the outbox of its own link to the sender, which
 * the gateway has mapped, and raises its ordinary combine flag for the gateway. When those of all
 * siblings are there, the gateway adds them up and answers the sender, once for the machine.
 *   - The gateway is not through with a dispatch before it has handed on all it must: it hands a
 *     flag on to a sibling once both have come, and it waits for both.
 *   - The sender writes dispatch n+1 into the gateway's memory after the answer n, which the gateway
 *     gives after the combine flags n of its siblings, and they raise them after they have read.
 *   - A sibling leaves sums n+1 after dispatch n+1 of the gateway, which has added up sums n before.
 *   - Whether rows are merged is for the sender to decide, each time; readers take both. So a rank
 *     that masks a peer in the middle of an epoch sends directly from then on, and tells nobody.
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
    int64_t row_bytes, result_stride, meta_bytes;
    int64_t doorbell_at, waiters_at, leases_at;
    int64_t hello_at, votes_at, dispatch_flag_at, combine_flag_at, relayed_flags_at, rows_at,
        results_at, partials_at, partial_stride;
    int64_t shared_version_at, shared_results_at;
    int64_t shared_results; /* rows there is room for; 0: results are not shared */
    uint8_t nonce[16]; /* of the own window */
    int32_t lenient;   /* experts without an active owner are skipped and counted */

    /* set from any thread, with atomics */
    uint32_t interrupted, rung;
    uint8_t gone[256]; /* FX_GONE_*: waiting for this rank is in vain */

    /* membership */
    int32_t active_count;
    int32_t active[256];
    uint8_t is_active[256];
    uintptr_t control[256]; /* control part of the window of rank i (the own one, too); 0 remote */
    uintptr_t inbox[256];   /* own window: place of source i */
    uintptr_t outbox[256];  /* window of rank i: place of this rank; 0 not exported yet */
    uintptr_t shared[256];  /* window of rank i: the rows that it shares; 0 remote */
    uint8_t remote[256];

    /* two levels, of this epoch; see gateways.py */
    int16_t via_out[256]; /* rank that gets what is meant for rank i; -1 rank i itself */
    int16_t via_in[256];  /* rank of this machine that gets what rank i sends here; -1 each */
    int32_t sibling_count;
    int32_t siblings[256];        /* the other ranks of this machine that take part */
    uintptr_t gateway_inbox[256]; /* of via_in[i], mapped here: place of source i; 0 not yet */
    uintptr_t *sibling_outbox;    /* [256, 256] of sibling i, mapped here: for peer j; 0 not yet */

    /* links */
    uint32_t epoch;
    uint16_t own_gen[256], peer_gen[256];
    uint8_t up[256];
    uint64_t session[256]; /* the tag without the count */
    uint32_t exchanges[256], votes_done[256];
    uint8_t owed[256]; /* FX_OWED_*: to be sent once the link is up */
    uint8_t due[256];  /* FX_DUE_*: to be sent over NIXL */
    uint8_t come[256]; /* by this wait */
    uint8_t reads_tokens[256], reads_results[256]; /* were shared with it, and it may not be through */
    int64_t unshared_until_ns; /* somebody may read what was shared with it before it was dropped */
    uint8_t shares_tokens, shares_results; /* in the dispatch, in the combine under way */
    uint32_t beat;     /* how often this rank has said that it waits */
    int32_t to_open;   /* a peer has exported its place by now: Python should map it */

    /* the own vote of this step; ballot_bytes -1: not posted */
    uint8_t ballot[48];
    int32_t ballot_bytes, ballot_line;

    /* what was sent: [max_tokens, topk] each, unless noted */
    int32_t tokens;
    int32_t payload_kind;
    int64_t payload_bytes, payload_stride; /* stride of the source */
    uintptr_t payload;
    int32_t *owner;     /* rank that owns the k-th expert of a token; -1 none; -3 - rank masked */
    int32_t *slot;      /* and its slot there */
    float *weight;
    int32_t *result;    /* place among the owner's results (home); row of y if the owner is self */
    int32_t *dest;      /* j-th destination of a token, ascending */
    int32_t *dest_row;  /* the token's row there */
    int32_t *dests;     /* [max_tokens] number of destinations */
    int32_t *sent;      /* tokens in the order of their rows, destination by destination */
    int32_t sent_at[256], sent_rows[256]; /* by rank */
    int32_t *merged;    /* like `sent`, gateway by gateway */
    int32_t merged_at[256], merged_rows[256]; /* by gateway */
    int32_t *merged_row; /* the token's row at the gateway of its j-th destination; -1 none, or told
                            with an earlier destination already */
    int32_t wire_rows[256]; /* rows of dispatch in the outbox, by rank */
    int64_t lost_pairs;

    /* what was received: rows of all sources, ascending; grown when needed */
    int32_t from_at[256], from_rows[256]; /* by rank */
    int32_t from_results[256];            /* rows of result sent to it */
    uintptr_t dispatch_flag[256];         /* the flag that has come */
    uintptr_t from_place[256];            /* where its rows lie: as far from here as from a place */
    int32_t from_merged[256];             /* merged rows of it, also those for siblings; -1 direct */
    uint8_t from_shared[256];             /* its payloads are shared */
    uint8_t merging;                      /* as a gateway: sums of siblings are to be answered */
    uint8_t home;                         /* the mode of the combine under way */
    int64_t plan_rows;
    int32_t *place_row;   /* [plan_rows] the row among those of its source */
    int32_t *place;      /* [plan_rows, topk] slot, then row of x and y; -1 none */
    float *place_weight; /* [plan_rows, topk] */
    int32_t *place_token; /* [plan_rows] */
    int32_t *cursor;     /* [cursor_slots] */
    int32_t cursor_slots;

    uint8_t votes[256][64]; /* by rank: length (first 4 bytes), payload at 16 */

    /* counted */
    int64_t bytes_sent[256];
    int64_t wait_ns[2][256]; /* dispatch, combine: from the begin of the wait to the flag */
    int64_t waited_ns[2];    /* in such waits, for all peers together; those that failed do not count */

    /* exchanges that C walks, see native.c */
    uint32_t changed;        /* from any thread: Python has a change to apply before the next one */
    int32_t native_tells;    /* points that are passed are told */
    int64_t native_slice_ns; /* after which a wait goes on in Python */
    void *python;            /* who is asked */
    int64_t native_exchanges, native_turns; /* counted */
    int32_t native_phase;    /* of what stopped one */
    int64_t native_why, native_bad;
    uint8_t *native_memory;
    int64_t native_size;
} fx_buffer;

int fx_open(fx_buffer *b);
void fx_close(fx_buffer *b);
uintptr_t fx_map(int fd, int64_t offset, int64_t size);
uintptr_t fx_map_to_read(int fd, int64_t offset, int64_t size);
void fx_unmap(uintptr_t at, int64_t size);
int fx_punch(int fd, int64_t offset, int64_t size);
void fx_export_place(fx_buffer *b, int source, int64_t place, const char *nonce);
int64_t fx_exported_place(fx_buffer *b, int peer);
void fx_leave_shared(fx_buffer *b, int64_t for_ns);
uintptr_t fx_room_for_tokens(fx_buffer *b);
uintptr_t fx_room_for_results(fx_buffer *b, int64_t rows);
int fx_forget_shared(fx_buffer *b);

void fx_begin_epoch(fx_buffer *b, uint32_t epoch);
void fx_unmask(fx_buffer *b, int peer);
void fx_hello(fx_buffer *b, int peer);
void fx_greet(fx_buffer *b);
void fx_set_gone(fx_buffer *b, int peer, int why);
int fx_gone(fx_buffer *b, int peer);

int fx_send_dispatch(fx_buffer *b, uintptr_t payload, int64_t stride, int64_t bytes, int kind,
                     uintptr_t ids, int wide, uintptr_t weights, int tokens, int k,
                     uintptr_t table_rank, uintptr_t table_slot, int experts, int64_t *bad);
int fx_is_merged(fx_buffer *b, int source);
int64_t fx_receive(fx_buffer *b, int slots, uintptr_t offsets, int64_t *bad);
void fx_index(fx_buffer *b, uintptr_t weights, uintptr_t sources, uintptr_t tokens, uintptr_t rows);
void fx_gather(uintptr_t rows, int64_t count, int64_t offset, int64_t bytes, uintptr_t out);
void fx_send_combine(fx_buffer *b, uintptr_t y, int home);
void fx_set_weights(fx_buffer *b, uintptr_t weights, int k);
int fx_reduce(fx_buffer *b, uintptr_t y, uintptr_t out, int home, int64_t *bad);
void fx_loss(fx_buffer *b, int k, uintptr_t weight, uintptr_t choices, uintptr_t ranks);

void fx_post_vote(fx_buffer *b, const char *payload, int length);
void fx_end_vote(fx_buffer *b);
int fx_wait(fx_buffer *b, int what, int64_t begun_ns, int64_t deadline_ns, int64_t slice_ns,
            int32_t *missing, int32_t *missing_count);
int fx_gateway_of(fx_buffer *b, int source, int what);
int fx_wait_any_vote(fx_buffer *b, int64_t deadline_ns, int64_t slice_ns);
void fx_beat(fx_buffer *b);
uint64_t fx_beat_of(fx_buffer *b, int peer);
void fx_interrupt(fx_buffer *b);
void fx_resume(fx_buffer *b);
int fx_is_interrupted(fx_buffer *b);
void fx_ring(fx_buffer *b);
void fx_ring_peer(fx_buffer *b, int peer);
/* cdef: end */

enum { FX_OK = 0, FX_TIMEOUT = 1, FX_INTERRUPTED = 2, FX_AGAIN = 3, FX_RUNG = 4, FX_LOST = 5 };
enum { FX_DISPATCH = 0, FX_COMBINE = 1, FX_VOTE = 2 };
enum { FX_BF16 = 0, FX_FP16 = 1, FX_FP32 = 2 };
enum { FX_NO_SUCH_EXPERT = 1, FX_NO_OWNER = 2 };
enum { FX_WRONG_MODE = 1, FX_WRONG_ROWS = 2, FX_WRITTEN_OVER = 3 };
enum { FX_NONSENSE = -1, FX_NO_MEMORY = -2, FX_WRONG_PAYLOAD = -3 };
enum { FX_GONE_ENDED = 1, FX_GONE_RESTARTED = 4 }; /* the others: see codes.py */
enum { FX_OWED_DISPATCH = 1, FX_OWED_VOTE = 2 };
enum { FX_DUE_HELLO = 1, FX_DUE_VOTE = 2, FX_DUE_DISPATCH = 4, FX_DUE_COMBINE = 8 };

#define FX_LINE 64
#define FX_VOTE_LINES 4
#define FX_MAX_TOPK 64
#define FX_MAX_SLOT 32767
#define FX_MERGED 0x100u /* in the mode of a flag: for or from all ranks of a machine */
#define FX_SHARED 0x200u /* in the mode of a flag: rows are read where the sender has them */

typedef struct {
    uint64_t tag;
    uint32_t rows, mode, bytes;
} fx_flag;

typedef struct {
    uint64_t tag;
    uint32_t length, unused;
    uint8_t payload[48];
} fx_vote;

typedef struct {
    int64_t place; /* plus one; 0 none */
    uint8_t nonce[16];
    uint8_t unused[8];
} fx_lease;

/* at the front of a row: token, weights [topk] float32, slots [topk] int16; merged also owners
 * [topk] uint8 */
#define FX_META_WEIGHTS 8

static float *meta_weights(uint8_t *row) { return (float *)(row + FX_META_WEIGHTS); }

static int16_t *meta_slots(const fx_buffer *b, uint8_t *row) {
    return (int16_t *)(meta_weights(row) + b->topk);
}

static uint8_t *meta_owners(const fx_buffer *b, uint8_t *row) {
    return (uint8_t *)(meta_slots(b, row) + b->topk);
}

/* ---- memory --------------------------------------------------------------------------------- */

int fx_open(fx_buffer *b) {
    size_t pairs = (size_t)b->max_tokens * (size_t)b->topk;
    int32_t **arrays[] = {&b->owner,    &b->slot, &b->result, &b->dest,
                          &b->dest_row, &b->sent, &b->merged, &b->merged_row};
    int ok = 1;
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i] = malloc(pairs * sizeof(int32_t));
        ok = ok && *arrays[i];
    }
    b->weight = malloc(pairs * sizeof(float));
    b->dests = malloc((size_t)b->max_tokens * sizeof(int32_t));
    b->sibling_outbox = calloc(256 * 256, sizeof *b->sibling_outbox);
    return ok && b->weight && b->dests && b->sibling_outbox ? 0 : -1;
}

void fx_close(fx_buffer *b) {
    void *arrays[] = {b->owner,        b->slot,         b->result,      b->dest,
                      b->dest_row,     b->sent,         b->merged,      b->merged_row,
                      b->weight,       b->dests,        b->place,       b->place_row,
                      b->place_weight, b->place_token,  b->cursor,      b->sibling_outbox};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    b->owner = b->slot = b->result = b->dest = b->dest_row = b->sent = b->dests = NULL;
    b->merged = b->merged_row = NULL;
    b->weight = b->place_weight = NULL;
    b->place = b->place_row = b->place_token = b->cursor = NULL;
    b->sibling_outbox = NULL;
    free(b->native_memory);
    b->native_memory = NULL;
    b->native_size = 0;
}

static uintptr_t map_part(int fd, int64_t offset, int64_t size, int protection) {
    int flags = MAP_NORESERVE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    void *at = mmap(NULL, (size_t)size, protection, flags, fd, (off_t)offset);
    return at == MAP_FAILED ? 0 : (uintptr_t)at;
}

uintptr_t fx_map(int fd, int64_t offset, int64_t size) {
    return map_part(fd, offset, size, PROT_READ | PROT_WRITE);
}

uintptr_t fx_map_to_read(int fd, int64_t offset, int64_t size) {
    return map_part(fd, offset, size, PROT_READ);
}

void fx_unmap(uintptr_t at, int64_t size) { munmap((void *)at, (size_t)size); }

int fx_punch(int fd, int64_t offset, int64_t size) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
}

static fx_lease *lease_of(const fx_buffer *b, int window, int source) {
    return (fx_lease *)(b->control[window] + (uintptr_t)b->leases_at +
                        (uintptr_t)source * sizeof(fx_lease));
}

/* Tell a source which place of the own window it may write; -1: none any more. */
void fx_export_place(fx_buffer *b, int source, int64_t place, const char *nonce) {
    fx_lease *lease = lease_of(b, b->rank, source);
    __atomic_store_n(&lease->place, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    if (place < 0) return;
    memcpy(lease->nonce, nonce, sizeof lease->nonce);
    __atomic_store_n(&lease->place, place + 1, __ATOMIC_RELEASE);
}

/* The place that a peer has exported to this very process, or -1. */
int64_t fx_exported_place(fx_buffer *b, int peer) {
    const fx_lease *lease = lease_of(b, peer, b->rank);
    int64_t place = __atomic_load_n(&lease->place, __ATOMIC_ACQUIRE);
    if (place <= 0 || memcmp(lease->nonce, b->nonce, sizeof b->nonce) != 0) return -1;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&lease->place, __ATOMIC_RELAXED) == place ? place - 1 : -1;
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

void fx_ring_peer(fx_buffer *b, int peer) {
    if (b->control[peer]) wake(b, peer);
}

void fx_set_gone(fx_buffer *b, int peer, int why) {
    __atomic_store_n(&b->gone[peer], (uint8_t)why, __ATOMIC_SEQ_CST);
    if (why) wake(b, b->rank);
}

int fx_gone(fx_buffer *b, int peer) {
    return (int)__atomic_load_n(&b->gone[peer], __ATOMIC_SEQ_CST);
}

/* ---- rows that are shared ------------------------------------------------------------------- */

static uint32_t *shared_version_of(const fx_buffer *b, int rank) {
    return (uint32_t *)(b->control[rank] + (uintptr_t)b->shared_version_at);
}

/* Ranks that are not active any more may be reading what was shared with them: nothing is written over
 * for a while, unless their processes have ended. */
void fx_leave_shared(fx_buffer *b, int64_t for_ns) {
    for (int peer = 0; peer < 256; peer++) {
        if (b->is_active[peer] || !(b->reads_tokens[peer] | b->reads_results[peer])) continue;
        b->reads_tokens[peer] = b->reads_results[peer] = 0;
        int64_t until = now_ns() + for_ns;
        if (fx_gone(b, peer) != FX_GONE_ENDED && until > b->unshared_until_ns)
            b->unshared_until_ns = until;
    }
}

static int may_share(fx_buffer *b) {
    if (b->unshared_until_ns && now_ns() >= b->unshared_until_ns) b->unshared_until_ns = 0;
    return !b->unshared_until_ns;
}

static int shares_with(const fx_buffer *b, int peer) { return peer != b->rank && !b->remote[peer]; }

static int has_readers(const fx_buffer *b) {
    for (int i = 0; i < b->active_count; i++)
        if (shares_with(b, b->active[i])) return 1;
    return 0;
}

/* Between two exchanges: where payloads of the next dispatch may be written, so that they are not
 * copied; or 0. */
uintptr_t fx_room_for_tokens(fx_buffer *b) {
    return has_readers(b) && may_share(b) ? b->shared[b->rank] : 0;
}

/* After the waiting half of a dispatch: where its results may be written, so that peers read them
 * there; or 0: anywhere, and they are sent. */
uintptr_t fx_room_for_results(fx_buffer *b, int64_t rows) {
    if (rows > b->shared_results || !has_readers(b) || !may_share(b)) return 0;
    __atomic_fetch_add(shared_version_of(b, b->rank), 1, __ATOMIC_SEQ_CST);
    return b->shared[b->rank] + (uintptr_t)b->shared_results_at;
}

/* Whether the memory of the shared rows may be given back, as far as peers of this epoch and of those
 * before it are concerned. */
int fx_forget_shared(fx_buffer *b) {
    if (has_readers(b) || !may_share(b)) return 0;
    __atomic_fetch_add(shared_version_of(b, b->rank), 1, __ATOMIC_SEQ_CST);
    return 1;
}

/* ---- lines: what a source tells the owner of a window --------------------------------------- */

static void *line(uintptr_t place, int64_t at) { return (void *)(place + (uintptr_t)at); }

/* After a line in the outbox is written. */
static void delivered(fx_buffer *b, int to, uint8_t due) {
    if (b->remote[to])
        b->due[to] |= due;
    else
        wake(b, to);
}

static void say_hello(fx_buffer *b, int to) {
    uint64_t word = (uint64_t)b->epoch << 32 | (uint64_t)b->own_gen[to] << 16 | b->peer_gen[to];
    __atomic_store_n((uint64_t *)line(b->outbox[to], b->hello_at), word, __ATOMIC_RELEASE);
    delivered(b, to, FX_DUE_HELLO);
}

static void raise_flag(fx_buffer *b, int to, int64_t at, uint32_t rows, uint32_t mode,
                       uint32_t bytes, uint8_t due) {
    fx_flag *flag = line(b->outbox[to], at);
    flag->rows = rows;
    flag->mode = mode;
    flag->bytes = bytes;
    __atomic_store_n(&flag->tag, b->session[to] | (b->exchanges[to] & 0xFFFFFu), __ATOMIC_RELEASE);
    delivered(b, to, due);
}

static const fx_flag *flag_from(const fx_buffer *b, int source, int64_t at) {
    return line(b->inbox[source], at);
}

static int is_raised(const fx_buffer *b, int source, int64_t at) {
    return __atomic_load_n(&flag_from(b, source, at)->tag, __ATOMIC_ACQUIRE) ==
           (b->session[source] | (b->exchanges[source] & 0xFFFFFu));
}

static uint64_t vote_tag(const fx_buffer *b, int peer) {
    return b->session[peer] | ((b->votes_done[peer] + 1) & 0xFFFFFu);
}

static void send_vote(fx_buffer *b, int to) {
    fx_vote *vote = line(b->outbox[to], b->votes_at + b->ballot_line * FX_LINE);
    __atomic_store_n(&vote->tag, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    vote->length = (uint32_t)b->ballot_bytes;
    memcpy(vote->payload, b->ballot, (size_t)b->ballot_bytes);
    __atomic_store_n(&vote->tag, vote_tag(b, to), __ATOMIC_RELEASE);
    delivered(b, to, FX_DUE_VOTE);
}

static int has_vote(const fx_buffer *b, int source, void *copy) {
    uint64_t tag = vote_tag(b, source);
    for (int i = 0; i < FX_VOTE_LINES; i++) {
        fx_vote *vote = line(b->inbox[source], b->votes_at + i * FX_LINE);
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

/* ---- links ---------------------------------------------------------------------------------- */

static void begin_link(fx_buffer *b, int peer) {
    uint64_t number = ((uint64_t)b->own_gen[peer] + b->peer_gen[peer]) & 0xFFFu;
    b->session[peer] = (uint64_t)b->epoch << 32 | number << 20;
    b->exchanges[peer] = b->votes_done[peer] = 0;
    b->up[peer] = 1;
}

/* After active and the outboxes are set: all links start as number 0. */
void fx_begin_epoch(fx_buffer *b, uint32_t epoch) {
    b->epoch = epoch;
    memset(b->own_gen, 0, sizeof b->own_gen);
    memset(b->peer_gen, 0, sizeof b->peer_gen);
    memset(b->owed, 0, sizeof b->owed);
    memset(b->up, 0, sizeof b->up);
    for (int i = 0; i < b->active_count; i++)
        if (b->outbox[b->active[i]]) begin_link(b, b->active[i]);
}

void fx_unmask(fx_buffer *b, int peer) {
    b->own_gen[peer]++;
    b->up[peer] = 0;
    b->owed[peer] = 0;
    if (b->outbox[peer]) say_hello(b, peer);
}

/* After the peer's place is mapped late. */
void fx_hello(fx_buffer *b, int peer) { say_hello(b, peer); }

/* Read the peer's hello and answer it. Returns whether the link has just come up. */
static int advance(fx_buffer *b, int peer) {
    if (!b->outbox[peer]) return 0;
    uint64_t word =
        __atomic_load_n((uint64_t *)line(b->inbox[peer], b->hello_at), __ATOMIC_ACQUIRE);
    int current = (uint32_t)(word >> 32) == b->epoch;
    uint16_t gen = current ? (uint16_t)(word >> 16) : 0, seen = current ? (uint16_t)word : 0;
    if (gen != b->peer_gen[peer]) {
        b->peer_gen[peer] = gen;
        b->up[peer] = 0;
        say_hello(b, peer);
    }
    if (b->up[peer] || seen != b->own_gen[peer]) return 0;
    begin_link(b, peer);
    return 1;
}

/* At the beginning of an exchange, when nobody's rows are being read. */
void fx_greet(fx_buffer *b) {
    for (int i = 0; i < b->active_count; i++)
        if (b->active[i] != b->rank) advance(b, b->active[i]);
}

static int has_restarted(const fx_buffer *b, int peer) {
    uint64_t word =
        __atomic_load_n((uint64_t *)line(b->inbox[peer], b->hello_at), __ATOMIC_ACQUIRE);
    return (uint32_t)(word >> 32) == b->epoch && (uint16_t)(word >> 16) != b->peer_gen[peer];
}

static void send_dispatch(fx_buffer *b, int to);

/* While waiting for a peer: bring the link up, then send what is owed. What had gone out on a link
 * that the peer has started afresh is owed again. Returns whether the link has just come up. */
static int refresh(fx_buffer *b, int peer, int what) {
    uint8_t was_up = b->up[peer];
    int came_up = advance(b, peer);
    if (was_up && (came_up || !b->up[peer])) {
        if (what == FX_DISPATCH) b->owed[peer] = FX_OWED_DISPATCH;
        if (what == FX_VOTE && b->ballot_bytes >= 0) b->owed[peer] = FX_OWED_VOTE;
    }
    if (!came_up) return 0;
    if (b->owed[peer] == FX_OWED_DISPATCH) send_dispatch(b, peer);
    if (b->owed[peer] == FX_OWED_VOTE) send_vote(b, peer);
    b->owed[peer] = 0;
    return 1;
}

/* ---- votes and waits ------------------------------------------------------------------------ */

void fx_post_vote(fx_buffer *b, const char *payload, int length) {
    b->ballot_line = (b->ballot_line + 1) % FX_VOTE_LINES;
    b->ballot_bytes = length;
    memcpy(b->ballot, payload, (size_t)length);
    memset(b->come, 0, sizeof b->come);
    for (int i = 0; i < b->active_count; i++) {
        int to = b->active[i];
        b->owed[to] = b->up[to] ? 0 : FX_OWED_VOTE;
        if (b->up[to]) send_vote(b, to);
    }
}

void fx_end_vote(fx_buffer *b) {
    b->ballot_bytes = -1;
    for (int i = 0; i < b->active_count; i++) b->votes_done[b->active[i]]++;
}

/* ---- two levels: what a gateway hands on ---------------------------------------------------- */

/* A gateway's line for the dispatch flag of a source, in a place that the gateway may write. */
static fx_flag *relayed_flag(const fx_buffer *b, uintptr_t place, int source) {
    return line(place, b->relayed_flags_at + source * FX_LINE);
}

/* The dispatch flag of a source, be it from itself or handed on; or NULL. */
static const fx_flag *dispatch_flag_from(const fx_buffer *b, int source) {
    if (is_raised(b, source, b->dispatch_flag_at)) return flag_from(b, source, b->dispatch_flag_at);
    int gateway = b->via_in[source];
    if (gateway < 0 || gateway == b->rank || !b->inbox[gateway]) return NULL;
    const fx_flag *flag = relayed_flag(b, b->inbox[gateway], source);
    uint64_t tag = b->session[source] | (b->exchanges[source] & 0xFFFFFu);
    return __atomic_load_n(&flag->tag, __ATOMIC_ACQUIRE) == tag ? flag : NULL;
}

/* Whether what a source has dispatched to this rank is merged; once it has come. */
int fx_is_merged(fx_buffer *b, int source) {
    return b->dispatch_flag[source] &&
           (((const fx_flag *)b->dispatch_flag[source])->mode & FX_MERGED) != 0;
}

static void hand_on(fx_buffer *b, int source, int sibling) {
    const fx_flag *from = (const fx_flag *)b->dispatch_flag[source];
    fx_flag *flag = relayed_flag(b, b->outbox[sibling], source);
    flag->rows = from->rows;
    flag->mode = from->mode;
    flag->bytes = from->bytes;
    uint64_t tag = b->session[source] | (b->exchanges[source] & 0xFFFFFu);
    __atomic_store_n(&flag->tag, tag, __ATOMIC_RELEASE);
    wake(b, sibling);
}

static int is_sibling(const fx_buffer *b, int rank) {
    for (int i = 0; i < b->sibling_count; i++)
        if (b->siblings[i] == rank) return 1;
    return 0;
}

/* A dispatch has come: a merged one goes to the siblings whose own has come, too, i.e. who are in
 * this exchange; the own one of a sibling means that it can be given the merged ones so far. */
static void relay_dispatch(fx_buffer *b, int source) {
    if (b->via_in[source] == b->rank && fx_is_merged(b, source))
        for (int i = 0; i < b->sibling_count; i++)
            if (b->come[b->siblings[i]]) hand_on(b, source, b->siblings[i]);
    if (!is_sibling(b, source)) return;
    for (int i = 0; i < b->active_count; i++) {
        int other = b->active[i];
        if (b->via_in[other] == b->rank && b->come[other] && fx_is_merged(b, other))
            hand_on(b, other, source);
    }
}

/* Whether a gateway has answered for all ranks of its machine. */
static int has_merged_results(const fx_buffer *b, int gateway) {
    return gateway >= 0 && is_raised(b, gateway, b->combine_flag_at) &&
           (flag_from(b, gateway, b->combine_flag_at)->mode & FX_MERGED) != 0;
}

static int has_exchanged(fx_buffer *b, int source, int what) {
    if (what == FX_COMBINE)
        return is_raised(b, source, b->combine_flag_at) ||
               has_merged_results(b, b->via_out[source]);
    b->dispatch_flag[source] = (uintptr_t)dispatch_flag_from(b, source);
    return b->dispatch_flag[source] != 0;
}

static int answer_merged(fx_buffer *b);

static void add_missing(int32_t *missing, int32_t *count, int rank) {
    for (int i = 0; i < *count; i++)
        if (missing[i] == rank) return;
    missing[(*count)++] = rank;
}

/* The rank through which the word of a source comes that is waited for; -1 itself. */
int fx_gateway_of(fx_buffer *b, int source, int what) {
    int gateway = -1;
    if (what == FX_DISPATCH) gateway = b->via_in[source];
    if (what == FX_COMBINE && !b->home) gateway = b->via_out[source];
    return gateway == b->rank || gateway == source ? -1 : gateway;
}

/* ---- waiting for all ------------------------------------------------------------------------ */

/* Whether a source has written what is waited for; brings its link up on the way. */
static int has_come(fx_buffer *b, int source, int what) {
    for (int pass = 0; pass < 2; pass++) {
        if (b->up[source] && (what == FX_VOTE ? has_vote(b, source, b->votes[source])
                                              : has_exchanged(b, source, what)))
            return 1;
        if (what == FX_COMBINE || source == b->rank) return 0;
        if (!b->outbox[source] && b->control[source] && fx_exported_place(b, source) >= 0) b->to_open = 1;
        if (!refresh(b, source, what)) return 0;
    }
    return 0;
}

/* Wait for all active ranks. On FX_TIMEOUT `missing` holds the ids that did not come, on FX_LOST
 * those that never will. Comes back after slice_ns with FX_AGAIN. */
int fx_wait(fx_buffer *b, int what, int64_t begun_ns, int64_t deadline_ns, int64_t slice_ns,
            int32_t *missing, int32_t *missing_count) {
    int64_t slice_end_ns = 0;
    int32_t waiting[256];
    int n = 0;
    for (int i = 0; i < b->active_count; i++)
        if (!b->come[b->active[i]]) waiting[n++] = b->active[i];
    for (;;) {
        uint32_t seen = __atomic_load_n(doorbell_of(b, b->rank), __ATOMIC_SEQ_CST);
        if (fx_is_interrupted(b)) return FX_INTERRUPTED;
        int left = 0;
        int32_t lost = 0;
        int64_t now = 0;
        for (int i = 0; i < n; i++) {
            int source = waiting[i], gateway = fx_gateway_of(b, source, what);
            int gone = fx_gone(b, source); /* before the flag: a rank may write and then end */
            int gateway_gone = gateway >= 0 && fx_gone(b, gateway);
            if (has_come(b, source, what)) {
                b->come[source] = 1;
                if (what != FX_DISPATCH) b->reads_tokens[source] = 0;
                if (what != FX_COMBINE) b->reads_results[source] = 0;
                if (what == FX_VOTE) continue;
                if (what == FX_DISPATCH) relay_dispatch(b, source);
                if (!now) now = now_ns();
                b->wait_ns[what][source] += now - begun_ns;
                continue;
            }
            if (!gone && what == FX_COMBINE && source != b->rank && has_restarted(b, source)) {
                b->gone[source] = FX_GONE_RESTARTED;
                gone = 1;
            }
            if (gone) add_missing(missing, &lost, source);
            if (gateway_gone) add_missing(missing, &lost, gateway);
            waiting[left++] = source;
        }
        n = left;
        if (what == FX_COMBINE && answer_merged(b)) return FX_AGAIN; /* to be sent */
        if (n == 0) return FX_OK;
        if (lost) {
            *missing_count = lost;
            return FX_LOST;
        }
        if (b->to_open) return FX_AGAIN;
        if (!slice_end_ns) slice_end_ns = now_ns() + slice_ns;
        int how = doze(b, seen, deadline_ns, slice_end_ns);
        if (how == FX_TIMEOUT) {
            *missing_count = 0;
            for (int i = 0; i < n; i++) {
                int gateway = fx_gateway_of(b, waiting[i], what);
                add_missing(missing, missing_count, waiting[i]);
                if (gateway >= 0) add_missing(missing, missing_count, gateway);
            }
        }
        if (how != FX_OK) return how;
    }
}

/* Wait for the vote of any peer (FX_OK), a ring (FX_RUNG, forgotten then), or the loss of one. */
int fx_wait_any_vote(fx_buffer *b, int64_t deadline_ns, int64_t slice_ns) {
    int64_t slice_end_ns = now_ns() + slice_ns;
    for (;;) {
        uint32_t seen = __atomic_load_n(doorbell_of(b, b->rank), __ATOMIC_SEQ_CST);
        if (fx_is_interrupted(b)) return FX_INTERRUPTED;
        for (int i = 0; i < b->active_count; i++) {
            int source = b->active[i];
            if (source == b->rank) continue;
            refresh(b, source, FX_VOTE);
            if (b->up[source] && has_vote(b, source, NULL)) return FX_OK;
        }
        if (__atomic_exchange_n(&b->rung, 0, __ATOMIC_SEQ_CST)) return FX_RUNG;
        int how = doze(b, seen, deadline_ns, slice_end_ns);
        if (how != FX_OK) return how;
    }
}

static uint64_t *beat_in(uintptr_t place, const fx_buffer *b) {
    return (uint64_t *)line(place, b->hello_at) + 1;
}

/* Say that this rank waits. Nobody is woken for it. */
void fx_beat(fx_buffer *b) {
    uint64_t word = (uint64_t)b->epoch << 32 | ++b->beat;
    for (int i = 0; i < b->active_count; i++) {
        int to = b->active[i];
        if (to == b->rank || !b->outbox[to]) continue;
        __atomic_store_n(beat_in(b->outbox[to], b), word, __ATOMIC_RELEASE);
        if (b->remote[to]) b->due[to] |= FX_DUE_HELLO;
    }
}

/* The last beat of a peer in this epoch; 0 none. */
uint64_t fx_beat_of(fx_buffer *b, int peer) {
    if (!b->inbox[peer]) return 0;
    uint64_t word = __atomic_load_n(beat_in(b->inbox[peer], b), __ATOMIC_ACQUIRE);
    return (uint32_t)(word >> 32) == b->epoch ? word : 0;
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
#define FX_TERM(load, j) (w##j * load(r##j[i]))

/* out = sum of weights[j] * rows[j], from +0, in the order of j, in float32. Up to four rows are
 * read side by side and need no memory between; more go four by four over a block of sums. */
#define FX_SUM(name, type, to, load, store)                                                       \
    FX_CLONES static void name(uint8_t *restrict out_at, const uint8_t *const *rows,              \
                               const float *weights, int n, int hidden) {                         \
        to *restrict out = (to *)out_at;                                                          \
        const type *restrict r0 = (const type *)rows[0], *restrict r1 = (const type *)rows[1],    \
                   *restrict r2 = (const type *)rows[2], *restrict r3 = (const type *)rows[3];    \
        float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];                 \
        if (n == 0) {                                                                             \
            memset(out, 0, (size_t)hidden * sizeof(to));                                          \
        } else if (n == 1) {                                                                      \
            for (int i = 0; i < hidden; i++) out[i] = store(0.0f + FX_TERM(load, 0));             \
        } else if (n == 2) {                                                                      \
            for (int i = 0; i < hidden; i++)                                                      \
                out[i] = store(0.0f + FX_TERM(load, 0) + FX_TERM(load, 1));                       \
        } else if (n == 3) {                                                                      \
            for (int i = 0; i < hidden; i++)                                                      \
                out[i] = store(0.0f + FX_TERM(load, 0) + FX_TERM(load, 1) + FX_TERM(load, 2));    \
        } else if (n == 4) {                                                                      \
            for (int i = 0; i < hidden; i++)                                                      \
                out[i] = store(0.0f + FX_TERM(load, 0) + FX_TERM(load, 1) + FX_TERM(load, 2) +    \
                               FX_TERM(load, 3));                                                 \
        } else {                                                                                  \
            float sum[FX_BLOCK];                                                                  \
            for (int at = 0; at < hidden; at += FX_BLOCK) {                                       \
                int size = hidden - at < FX_BLOCK ? hidden - at : FX_BLOCK;                       \
                for (int i = 0; i < size; i++) sum[i] = 0.0f;                                     \
                int j = 0;                                                                        \
                for (; j + 4 <= n; j += 4) {                                                      \
                    r0 = (const type *)rows[j] + at, r1 = (const type *)rows[j + 1] + at;         \
                    r2 = (const type *)rows[j + 2] + at, r3 = (const type *)rows[j + 3] + at;     \
                    w0 = weights[j], w1 = weights[j + 1];                                         \
                    w2 = weights[j + 2], w3 = weights[j + 3];                                     \
                    for (int i = 0; i < size; i++)                                                \
                        sum[i] = sum[i] + FX_TERM(load, 0) + FX_TERM(load, 1) +                   \
                                 FX_TERM(load, 2) + FX_TERM(load, 3);                             \
                }                                                                                 \
                for (; j < n; j++) {                                                              \
                    r0 = (const type *)rows[j] + at, w0 = weights[j];                             \
                    for (int i = 0; i < size; i++) sum[i] += FX_TERM(load, 0);                    \
                }                                                                                 \
                for (int i = 0; i < size; i++) out[at + i] = store(sum[i]);                       \
            }                                                                                     \
        }                                                                                         \
    }

FX_SUM(sum_fp16, uint16_t, uint16_t, from_fp16, to_fp16)
FX_SUM(sum_fp32, float, float, from_fp32, to_fp32)
FX_SUM(partial_bf16, uint16_t, float, from_bf16, to_fp32)
FX_SUM(partial_fp16, uint16_t, float, from_fp16, to_fp32)
FX_SUM(total_bf16, float, uint16_t, from_fp32, to_bf16)
FX_SUM(total_fp16, float, uint16_t, from_fp32, to_fp16)

static void fill_four(const uint8_t **rows, float *weights, int n) {
    for (int j = n; j < 4; j++) {
        rows[j] = NULL;
        weights[j] = 0.0f;
    }
}

/* What a token's home reads of its results: rows and weights of one partial sum after the other;
 * ends: where each of them ends. */
typedef struct {
    const uint8_t *rows[FX_MAX_TOPK + 4];
    float weights[FX_MAX_TOPK + 4];
    int ends[FX_MAX_TOPK];
    int count, sums;
} fx_terms;

/* out = the sum of partial sums, each rounded as if it had been sent as a row, from +0. */
#define FX_SUM_OF_SUMS(name, type, load, store)                                                   \
    FX_CLONES static void name(uint8_t *restrict out_at, const fx_terms *terms, int hidden) {     \
        type *restrict out = (type *)out_at;                                                      \
        float total[FX_BLOCK], sum[FX_BLOCK];                                                     \
        for (int at = 0; at < hidden; at += FX_BLOCK) {                                           \
            int size = hidden - at < FX_BLOCK ? hidden - at : FX_BLOCK;                           \
            for (int i = 0; i < size; i++) total[i] = 0.0f;                                       \
            for (int s = 0, j = 0; s < terms->sums; s++) {                                        \
                for (int i = 0; i < size; i++) sum[i] = 0.0f;                                     \
                for (; j < terms->ends[s]; j++) {                                                 \
                    const type *row = (const type *)terms->rows[j] + at;                          \
                    float weight = terms->weights[j];                                             \
                    for (int i = 0; i < size; i++) sum[i] += weight * load(row[i]);               \
                }                                                                                 \
                for (int i = 0; i < size; i++) total[i] += load(store(sum[i]));                   \
            }                                                                                     \
            for (int i = 0; i < size; i++) out[at + i] = store(total[i]);                         \
        }                                                                                         \
    }

FX_SUM_OF_SUMS(sums_fp16, uint16_t, from_fp16, to_fp16)
FX_SUM_OF_SUMS(sums_fp32, float, from_fp32, to_fp32)

/* bf16 by words of two: the lower one is shifted up, the upper one is a float but for the bits below
 * it. No memory between: a sum of 32 columns lies in registers, whatever number of rows it has. */
typedef float fx_floats __attribute__((vector_size(32)));
typedef uint32_t fx_words __attribute__((vector_size(32)));

#define FX_UPPER 0xFFFF0000u
#define FX_TO_UPPER(u) (((u) + (((u) >> 16) & 1u) + 0x7FFFu) & FX_UPPER)

/* Half of the columns each: lower and upper ones of two vectors. */
typedef struct {
    fx_floats low[2], up[2];
} fx_columns;

static inline __attribute__((always_inline)) void add_bf16(fx_columns *sum, const uint8_t *row,
                                                           float weight) {
    for (int v = 0; v < 2; v++) {
        fx_words words;
        memcpy(&words, row + v * sizeof words, sizeof words);
        sum->low[v] += weight * (fx_floats)(words << 16);
        sum->up[v] += weight * (fx_floats)(words & FX_UPPER);
    }
}

/* Of a NaN no bit is below the upper half, as long as there is none in a weight that is NaN. */
static inline __attribute__((always_inline)) void add_rounded(fx_columns *total,
                                                              const fx_columns *sum) {
    for (int v = 0; v < 2; v++) {
        total->low[v] += (fx_floats)FX_TO_UPPER((fx_words)sum->low[v]);
        total->up[v] += (fx_floats)FX_TO_UPPER((fx_words)sum->up[v]);
    }
}

static inline __attribute__((always_inline)) void store_bf16(uint8_t *out, const fx_columns *sum) {
    const fx_words nan = {0x7FC00000u, 0x7FC00000u, 0x7FC00000u, 0x7FC00000u,
                          0x7FC00000u, 0x7FC00000u, 0x7FC00000u, 0x7FC00000u};
    for (int v = 0; v < 2; v++) {
        fx_words low_nan = (fx_words)(sum->low[v] != sum->low[v]);
        fx_words up_nan = (fx_words)(sum->up[v] != sum->up[v]);
        fx_words low = FX_TO_UPPER((fx_words)sum->low[v]), up = FX_TO_UPPER((fx_words)sum->up[v]);
        low = (low & ~low_nan) | (nan & low_nan);
        up = (up & ~up_nan) | (nan & up_nan);
        fx_words words = (low >> 16) | up;
        memcpy(out + v * sizeof words, &words, sizeof words);
    }
}

#define FX_COLUMNS 32

FX_CLONES static void sum_bf16(uint8_t *restrict out, const uint8_t *const *rows,
                               const float *weights, int n, int hidden) {
    int i = 0;
    for (; i + FX_COLUMNS <= hidden; i += FX_COLUMNS) {
        fx_columns sum = {0};
        for (int j = 0; j < n; j++) add_bf16(&sum, rows[j] + 2 * i, weights[j]);
        store_bf16(out + 2 * i, &sum);
    }
    for (; i < hidden; i++) {
        float sum = 0.0f;
        for (int j = 0; j < n; j++) sum += weights[j] * from_bf16(((const uint16_t *)rows[j])[i]);
        ((uint16_t *)out)[i] = to_bf16(sum);
    }
}

FX_CLONES static void sums_bf16(uint8_t *restrict out, const fx_terms *terms, int hidden) {
    int i = 0;
    for (; i + FX_COLUMNS <= hidden; i += FX_COLUMNS) {
        fx_columns total = {0};
        for (int s = 0, j = 0; s < terms->sums; s++) {
            fx_columns sum = {0};
            for (; j < terms->ends[s]; j++) add_bf16(&sum, terms->rows[j] + 2 * i, terms->weights[j]);
            add_rounded(&total, &sum);
        }
        store_bf16(out + 2 * i, &total);
    }
    for (; i < hidden; i++) {
        float total = 0.0f;
        for (int s = 0, j = 0; s < terms->sums; s++) {
            float sum = 0.0f;
            for (; j < terms->ends[s]; j++)
                sum += terms->weights[j] * from_bf16(((const uint16_t *)terms->rows[j])[i]);
            total += from_bf16(to_bf16(sum));
        }
        ((uint16_t *)out)[i] = to_bf16(total);
    }
}

/* From rows to float32. rows and weights have room for four, whatever n. */
static void sum_to_partial(const fx_buffer *b, uint8_t *out, const uint8_t **rows, float *weights,
                           int n) {
    fill_four(rows, weights, n);
    if (b->dtype == FX_BF16)
        partial_bf16(out, rows, weights, n, b->hidden);
    else if (b->dtype == FX_FP16)
        partial_fp16(out, rows, weights, n, b->hidden);
    else
        sum_fp32(out, rows, weights, n, b->hidden);
}

/* From float32 to a row. */
static void sum_partials(const fx_buffer *b, uint8_t *out, const uint8_t **rows, float *weights,
                         int n) {
    fill_four(rows, weights, n);
    if (b->dtype == FX_BF16)
        total_bf16(out, rows, weights, n, b->hidden);
    else if (b->dtype == FX_FP16)
        total_fp16(out, rows, weights, n, b->hidden);
    else
        sum_fp32(out, rows, weights, n, b->hidden);
}

static void sum_rows(const fx_buffer *b, uint8_t *out, const uint8_t **rows, float *weights,
                     int n) {
    fill_four(rows, weights, n);
    if (b->dtype == FX_BF16)
        sum_bf16(out, rows, weights, n, b->hidden);
    else if (b->dtype == FX_FP16)
        sum_fp16(out, rows, weights, n, b->hidden);
    else
        sum_fp32(out, rows, weights, n, b->hidden);
}

static void sum_of_sums(const fx_buffer *b, uint8_t *out, fx_terms *terms) {
    for (int j = 0; j < terms->count; j++)
        if (terms->weights[j] != terms->weights[j]) terms->weights[j] = bits_to_float(0x7FC00000u);
    if (b->dtype == FX_BF16)
        sums_bf16(out, terms, b->hidden);
    else if (b->dtype == FX_FP16)
        sums_fp16(out, terms, b->hidden);
    else
        sums_fp32(out, terms, b->hidden);
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
        int32_t r = table_rank[e], s = table_slot[e];
        if (r >= b->capacity || r < -1 || s > FX_MAX_SLOT || (r >= 0 && s < 0)) return FX_NO_OWNER;
        if (r < 0 || !b->is_active[r]) {
            if (!b->lenient) return FX_NO_OWNER;
            owner[j] = -3 - r;
            continue;
        }
        owner[j] = r;
        slot[j] = s;
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

/* The same for what goes through gateways: each token once, whoever needs it there. */
static void plan_merged(fx_buffer *b) {
    memset(b->merged_rows, 0, sizeof b->merged_rows);
    for (int t = 0; t < b->tokens; t++)
        for (int j = 0; j < b->dests[t]; j++) {
            size_t first = (size_t)t * b->topk;
            int gateway = b->via_out[b->dest[first + j]];
            for (int i = 0; gateway >= 0 && i < j; i++)
                if (b->via_out[b->dest[first + i]] == gateway) gateway = -1;
            b->merged_row[first + j] = gateway < 0 ? -1 : b->merged_rows[gateway]++;
        }
    int at = 0;
    for (int i = 0; i < b->active_count; i++) {
        b->merged_at[b->active[i]] = at;
        at += b->merged_rows[b->active[i]];
    }
    for (int t = 0; t < b->tokens; t++)
        for (int j = 0; j < b->dests[t]; j++) {
            size_t pair = (size_t)t * b->topk + j;
            if (b->merged_row[pair] < 0) continue;
            b->merged[b->merged_at[b->via_out[b->dest[pair]]] + b->merged_row[pair]] = t;
        }
}

static int64_t wire_stride(const fx_buffer *b) {
    return b->meta_bytes + (b->payload_bytes + FX_LINE - 1) / FX_LINE * FX_LINE;
}

static int64_t shared_stride(const fx_buffer *b) { return wire_stride(b) - b->meta_bytes; }

/* Once each, the payloads that peers of this machine want. */
static void share_payloads(fx_buffer *b) {
    uint8_t *out = (uint8_t *)b->shared[b->rank];
    int64_t stride = shared_stride(b);
    if ((uintptr_t)out == b->payload) return; /* written there */
    for (int t = 0; t < b->tokens; t++) {
        const int32_t *dest = b->dest + (size_t)t * (size_t)b->topk;
        int wanted = 0;
        for (int j = 0; j < b->dests[t]; j++) wanted |= shares_with(b, dest[j]);
        if (wanted)
            memcpy(out + t * stride, (const uint8_t *)b->payload + t * b->payload_stride,
                   (size_t)b->payload_bytes);
    }
}

static void send_rows(fx_buffer *b, int to, int shared) {
    uint8_t *row = (uint8_t *)b->outbox[to] + b->rows_at;
    int64_t stride = shared ? b->meta_bytes : wire_stride(b);
    int32_t results = 0;
    for (int r = 0; r < b->sent_rows[to]; r++, row += stride) {
        int32_t t = b->sent[b->sent_at[to] + r];
        size_t first = (size_t)t * (size_t)b->topk;
        float *weights = meta_weights(row);
        int16_t *slots = meta_slots(b, row);
        memcpy(row, &t, sizeof t);
        for (int j = 0; j < b->topk; j++) {
            int here = b->owner[first + j] == to;
            slots[j] = (int16_t)(here ? b->slot[first + j] : -1);
            weights[j] = here ? b->weight[first + j] : 0.0f;
            if (here) b->result[first + j] = results++;
        }
        if (to != b->rank && !shared) /* own rows are read where they are */
            memcpy(row + b->meta_bytes, (const uint8_t *)b->payload + t * b->payload_stride,
                   (size_t)b->payload_bytes);
    }
    if (to != b->rank) b->bytes_sent[to] += wire_stride(b) * b->sent_rows[to];
}

static void send_merged_rows(fx_buffer *b, int gateway) {
    uint8_t *row = (uint8_t *)b->outbox[gateway] + b->rows_at;
    int64_t stride = wire_stride(b);
    int32_t results[256];
    memset(results, 0, sizeof results);
    for (int r = 0; r < b->merged_rows[gateway]; r++, row += stride) {
        int32_t t = b->merged[b->merged_at[gateway] + r];
        size_t first = (size_t)t * (size_t)b->topk;
        float *weights = meta_weights(row);
        int16_t *slots = meta_slots(b, row);
        uint8_t *owners = meta_owners(b, row);
        memcpy(row, &t, sizeof t);
        for (int j = 0; j < b->topk; j++) {
            int32_t owner = b->owner[first + j];
            int there = owner >= 0 && b->via_out[owner] == gateway;
            slots[j] = (int16_t)(there ? b->slot[first + j] : -1);
            weights[j] = there ? b->weight[first + j] : 0.0f;
            owners[j] = (uint8_t)(there ? owner : 0);
            if (there) b->result[first + j] = results[owner]++;
        }
        memcpy(row + b->meta_bytes, (const uint8_t *)b->payload + t * b->payload_stride,
               (size_t)b->payload_bytes);
    }
    b->bytes_sent[gateway] += stride * b->merged_rows[gateway];
}

static void send_dispatch(fx_buffer *b, int to) {
    int gateway = b->via_out[to], merged = gateway == to;
    int shared = b->shares_tokens && shares_with(b, to);
    b->exchanges[to]++;
    if (gateway >= 0 && !merged) return; /* its rows are among those for the gateway */
    if (merged)
        send_merged_rows(b, to);
    else
        send_rows(b, to, shared);
    b->reads_tokens[to] |= (uint8_t)shared;
    b->wire_rows[to] = merged ? b->merged_rows[to] : b->sent_rows[to];
    raise_flag(b, to, b->dispatch_flag_at, (uint32_t)b->wire_rows[to],
               (uint32_t)b->payload_kind | (merged ? FX_MERGED : 0) | (shared ? FX_SHARED : 0),
               (uint32_t)b->payload_bytes, FX_DUE_DISPATCH);
}

/* Nothing is written to a peer unless all ids are good. Returns 0 or why not, with *bad = expert. */
int fx_send_dispatch(fx_buffer *b, uintptr_t payload, int64_t stride, int64_t bytes, int kind,
                     uintptr_t ids, int wide, uintptr_t weights, int tokens, int k,
                     uintptr_t table_rank, uintptr_t table_slot, int experts, int64_t *bad) {
    for (int t = 0; t < tokens; t++) {
        int why = route_token(b, t, (const void *)ids, wide, (const float *)weights, k,
                              (const int32_t *)table_rank, (const int32_t *)table_slot, experts, bad);
        if (why) return why;
    }
    b->tokens = tokens;
    b->payload = payload;
    b->payload_stride = stride;
    b->payload_bytes = bytes;
    b->payload_kind = kind;
    plan_rows(b);
    plan_merged(b);
    memset(b->come, 0, sizeof b->come);
    memset(b->dispatch_flag, 0, sizeof b->dispatch_flag);
    b->shares_tokens = fx_room_for_tokens(b) != 0;
    if (b->shares_tokens) share_payloads(b);
    for (int n = 0; n < b->active_count; n++) {
        int to = nth_peer(b, n);
        b->owed[to] = b->up[to] ? 0 : FX_OWED_DISPATCH;
        if (b->up[to]) send_dispatch(b, to);
    }
    return 0;
}

static int grow_plan(fx_buffer *b, int64_t rows, int slots) {
    if (rows > b->plan_rows) {
        size_t room = (size_t)(rows + rows / 2), pairs = room * (size_t)b->topk;
        int32_t *place = realloc(b->place, pairs * sizeof *place);
        if (place) b->place = place;
        float *weight = realloc(b->place_weight, pairs * sizeof *weight);
        if (weight) b->place_weight = weight;
        int32_t *token = realloc(b->place_token, room * sizeof *token);
        if (token) b->place_token = token;
        int32_t *row = realloc(b->place_row, room * sizeof *row);
        if (row) b->place_row = row;
        if (!place || !weight || !token || !row) return -1;
        b->plan_rows = (int64_t)room;
    }
    if (slots > b->cursor_slots) {
        int32_t *cursor = realloc(b->cursor, (size_t)slots * sizeof *cursor);
        if (!cursor) return -1;
        b->cursor = cursor;
        b->cursor_slots = slots;
    }
    return 0;
}

/* Copy a row's meta into the plan. `merged`: its entries for siblings are left out. Returns how many
 * are for this rank, or FX_NONSENSE. A payload that is shared lies where the token says. */
static int take_row(fx_buffer *b, int64_t row, uint8_t *meta, int merged, int slots,
                    int32_t *offsets) {
    size_t first = (size_t)row * (size_t)b->topk;
    int16_t slot_of[FX_MAX_TOPK];
    uint8_t owner_of[FX_MAX_TOPK];
    int here = 0;
    memcpy(b->place_token + row, meta, sizeof *b->place_token);
    if (b->place_token[row] < 0 || b->place_token[row] >= b->max_tokens) return FX_NONSENSE;
    memcpy(b->place_weight + first, meta_weights(meta), (size_t)b->topk * sizeof(float));
    memcpy(slot_of, meta_slots(b, meta), (size_t)b->topk * sizeof *slot_of);
    if (merged) memcpy(owner_of, meta_owners(b, meta), (size_t)b->topk);
    for (int j = 0; j < b->topk; j++) {
        int32_t slot = slot_of[j];
        int own = !merged || owner_of[j] == b->rank;
        if (slot < -1 || (slot >= 0 && !own && !is_sibling(b, owner_of[j]))) return FX_NONSENSE;
        if (!own) slot = -1;
        b->place[first + j] = slot;
        if (slot == -1) continue;
        if (slot >= slots) return FX_NONSENSE;
        offsets[slot + 1]++;
        here++;
    }
    return here;
}

/* After fx_wait: count rows per slot. Fills offsets [slots + 1]; returns the number of pairs of
 * (row, slot), or FX_NONSENSE, FX_WRONG_PAYLOAD with *bad = the peer, or FX_NO_MEMORY. */
int64_t fx_receive(fx_buffer *b, int slots, uintptr_t offsets_at, int64_t *bad) {
    int32_t *offsets = (int32_t *)offsets_at;
    int32_t count_of[256];
    int64_t most = 0, rows = 0;
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        const fx_flag *flag = (const fx_flag *)b->dispatch_flag[source];
        uint32_t count = flag->rows, mode = flag->mode;
        int merged = (mode & FX_MERGED) != 0;
        int direct_flag = flag == flag_from(b, source, b->dispatch_flag_at);
        *bad = source;
        if ((mode & ~(FX_MERGED | FX_SHARED)) != (uint32_t)b->payload_kind ||
            flag->bytes != (uint32_t)b->payload_bytes)
            return FX_WRONG_PAYLOAD;
        if (count > (uint32_t)b->max_tokens) return FX_NONSENSE;
        /* self: rows are taken from the payload by `sent`, which must be as long */
        if (source == b->rank && count != (uint32_t)b->sent_rows[source]) return FX_NONSENSE;
        /* the gateway gets the merged ones, and hands on nothing else */
        if (merged ? b->via_in[source] < 0 || direct_flag != (b->via_in[source] == b->rank)
                   : !direct_flag)
            return FX_NONSENSE;
        b->from_place[source] = direct_flag ? b->inbox[source] : b->gateway_inbox[source];
        if (!b->from_place[source]) return FX_NONSENSE;
        b->from_shared[source] = (mode & FX_SHARED) != 0;
        if (b->from_shared[source] && (merged || !shares_with(b, source))) return FX_NONSENSE;
        b->from_merged[source] = merged ? (int32_t)count : -1;
        count_of[source] = (int32_t)count;
        most += count;
    }
    if (grow_plan(b, most, slots)) return FX_NO_MEMORY;
    memset(offsets, 0, (size_t)(slots + 1) * sizeof *offsets);
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i], merged = b->from_merged[source] >= 0;
        int64_t stride = b->from_shared[source] ? b->meta_bytes : wire_stride(b);
        uint8_t *meta = (uint8_t *)b->from_place[source] + b->rows_at;
        *bad = source;
        b->from_at[source] = (int32_t)rows;
        for (int r = 0; r < count_of[source]; r++, meta += stride) {
            int here = take_row(b, rows, meta, merged, slots, offsets);
            if (here < 0) return FX_NONSENSE;
            if (merged && !here) continue; /* for siblings only */
            b->place_row[rows++] = r;
        }
        b->from_rows[source] = (int32_t)(rows - b->from_at[source]);
    }
    for (int s = 0; s < slots; s++) {
        b->cursor[s] = offsets[s];
        offsets[s + 1] += offsets[s];
    }
    return offsets[slots];
}

/* The place of every (row, slot) in the order of slots: fills weights, sources, tokens and the
 * addresses of the payloads [pairs]; remembers the places for combine. */
void fx_index(fx_buffer *b, uintptr_t weights_at, uintptr_t sources_at, uintptr_t tokens_at,
              uintptr_t rows_at) {
    float *weights = (float *)weights_at;
    int32_t *sources = (int32_t *)sources_at, *tokens = (int32_t *)tokens_at;
    int64_t *rows = (int64_t *)rows_at;
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i], own = source == b->rank, shared = b->from_shared[source];
        uintptr_t place = own    ? b->payload
                          : shared ? b->shared[source]
                                 : b->from_place[source] + (uintptr_t)(b->rows_at + b->meta_bytes);
        int64_t stride = own ? b->payload_stride : shared ? shared_stride(b) : wire_stride(b);
        for (int r = 0; r < b->from_rows[source]; r++) {
            size_t row = (size_t)(b->from_at[source] + r), first = row * (size_t)b->topk;
            int32_t t = own ? b->sent[b->sent_at[source] + r] : b->place_token[row];
            uintptr_t payload =
                place + (uintptr_t)((own || shared ? t : b->place_row[row]) * stride);
            for (int j = 0; j < b->topk; j++) {
                int32_t slot = b->place[first + j];
                if (slot < 0) continue;
                int32_t at = b->cursor[slot]++;
                b->place[first + j] = at;
                weights[at] = b->place_weight[first + j];
                sources[at] = source;
                tokens[at] = t;
                rows[at] = (int64_t)payload;
                if (own) b->result[(size_t)t * (size_t)b->topk + j] = at;
            }
        }
    }
}

/* Copy a part of each payload together: out [count, bytes]. */
void fx_gather(uintptr_t rows_at, int64_t count, int64_t offset, int64_t bytes, uintptr_t out_at) {
    const int64_t *rows = (const int64_t *)rows_at;
    uint8_t *out = (uint8_t *)out_at;
    for (int64_t i = 0; i < count; i++)
        memcpy(out + i * bytes, (const uint8_t *)rows[i] + offset, (size_t)bytes);
}

/* ---- combine -------------------------------------------------------------------------------- */

/* The results of the r-th row of a source, with their weights; how many. */
static int results_of(const fx_buffer *b, int source, int r, const uint8_t *y, const uint8_t **rows,
                      float *weights) {
    size_t first = (size_t)(b->from_at[source] + r) * (size_t)b->topk;
    int n = 0;
    for (int j = 0; j < b->topk; j++) {
        int32_t at = b->place[first + j];
        if (at < 0) continue;
        rows[n] = y + (size_t)at * (size_t)b->row_bytes;
        weights[n++] = b->place_weight[first + j];
    }
    return n;
}

/* home: one row per (token, expert), as it is; else one weighted sum per row. Packed both ways. */
static void send_results(fx_buffer *b, int to, const uint8_t *y, int home) {
    uint8_t *results = (uint8_t *)b->outbox[to] + b->results_at;
    size_t stride = (size_t)b->result_stride;
    int32_t count = 0;
    for (int r = 0; r < b->from_rows[to]; r++) {
        const uint8_t *rows[FX_MAX_TOPK];
        float weights[FX_MAX_TOPK];
        int n = results_of(b, to, r, y, rows, weights);
        if (home) {
            for (int j = 0; j < n; j++, results += stride)
                memcpy(results, rows[j], (size_t)b->row_bytes);
            count += n;
        } else {
            sum_rows(b, results, rows, weights, n);
            results += stride;
            count++;
        }
    }
    b->from_results[to] = count;
    if (to != b->rank) b->bytes_sent[to] += (int64_t)stride * count;
}

/* Of each result, in the order in which `send_results` with `home` has them, which of the shared rows
 * it is. */
static void share_results(fx_buffer *b, int to) {
    int32_t *at = (int32_t *)(b->outbox[to] + (uintptr_t)b->results_at);
    const int32_t *place = b->place + (size_t)b->from_at[to] * (size_t)b->topk;
    size_t pairs = (size_t)b->from_rows[to] * (size_t)b->topk;
    for (size_t i = 0; i < pairs; i++)
        if (place[i] >= 0) *at++ = place[i];
    b->reads_results[to] = 1;
    b->bytes_sent[to] += b->result_stride * b->from_rows[to];
}

/* For what came merged: sums in float32, each at the index of its merged row, in the own outbox,
 * where the gateway takes them. */
static void leave_partials(fx_buffer *b, int source, const uint8_t *y) {
    uint8_t *partials = (uint8_t *)b->outbox[source] + b->partials_at;
    for (int r = 0; r < b->from_rows[source]; r++) {
        const uint8_t *rows[FX_MAX_TOPK];
        float weights[FX_MAX_TOPK];
        int n = results_of(b, source, r, y, rows, weights);
        int32_t at = b->place_row[b->from_at[source] + r];
        sum_to_partial(b, partials + at * b->partial_stride, rows, weights, n);
    }
}

void fx_send_combine(fx_buffer *b, uintptr_t y, int home) {
    memset(b->come, 0, sizeof b->come);
    b->home = (uint8_t)home;
    b->merging = 0;
    b->shares_results = y == b->shared[b->rank] + (uintptr_t)b->shared_results_at && may_share(b);
    uint32_t version = *shared_version_of(b, b->rank);
    for (int n = 0; n < b->active_count && !home; n++) {
        int source = b->active[n];
        if (b->from_merged[source] < 0) continue;
        leave_partials(b, source, (const uint8_t *)y);
        b->merging |= b->via_in[source] == b->rank;
    }
    for (int n = 0; n < b->active_count; n++) {
        int to = nth_peer(b, n);
        if (!home && b->from_merged[to] >= 0) continue; /* the gateway answers */
        int shared = b->shares_results && shares_with(b, to);
        if (shared)
            share_results(b, to);
        else if (to != b->rank) /* own rows are summed from y itself */
            send_results(b, to, (const uint8_t *)y, home);
        raise_flag(b, to, b->combine_flag_at, (uint32_t)b->from_rows[to],
                   (uint32_t)home | (shared ? FX_SHARED : 0), version, FX_DUE_COMBINE);
    }
}

/* The partial sums of a merged row, by rank; how many. What a source may have written into its rows
 * since they were checked leads nowhere else. */
static int partials_of(const fx_buffer *b, int source, int at, const uint8_t **rows,
                       float *weights) {
    uint8_t *meta = (uint8_t *)b->inbox[source] + b->rows_at + at * wire_stride(b);
    int16_t slot_of[FX_MAX_TOPK];
    uint8_t owner_of[FX_MAX_TOPK];
    int ranks[FX_MAX_TOPK], n = 0;
    memcpy(slot_of, meta_slots(b, meta), (size_t)b->topk * sizeof *slot_of);
    memcpy(owner_of, meta_owners(b, meta), (size_t)b->topk);
    for (int j = 0; j < b->topk; j++) {
        int owner = owner_of[j], i = n;
        if (slot_of[j] < 0 || (owner != b->rank && !is_sibling(b, owner))) continue;
        while (i > 0 && ranks[i - 1] > owner) i--;
        if (i > 0 && ranks[i - 1] == owner) continue;
        memmove(ranks + i + 1, ranks + i, (size_t)(n - i) * sizeof *ranks);
        ranks[i] = owner;
        n++;
    }
    for (int i = 0; i < n; i++) {
        uintptr_t outbox = ranks[i] == b->rank ? b->outbox[source]
                                               : b->sibling_outbox[ranks[i] * 256 + source];
        rows[i] = (const uint8_t *)outbox + b->partials_at + at * b->partial_stride;
        weights[i] = 1.0f;
    }
    return n;
}

static void send_merged_results(fx_buffer *b, int to) {
    uint8_t *results = (uint8_t *)b->outbox[to] + b->results_at;
    int32_t count = b->from_merged[to];
    for (int r = 0; r < count; r++, results += b->result_stride) {
        const uint8_t *rows[FX_MAX_TOPK];
        float weights[FX_MAX_TOPK];
        int n = partials_of(b, to, r, rows, weights);
        sum_partials(b, results, rows, weights, n);
    }
    b->from_results[to] = count;
    b->bytes_sent[to] += b->result_stride * count;
    raise_flag(b, to, b->combine_flag_at, (uint32_t)count, FX_MERGED, 0, FX_DUE_COMBINE);
}

/* As a gateway, once all siblings have left their sums: answer for the machine. Whether there is
 * something to be sent now. A sibling that combines in another mode is named by fx_reduce. */
static int answer_merged(fx_buffer *b) {
    if (!b->merging) return 0;
    for (int i = 0; i < b->sibling_count; i++)
        if (!b->come[b->siblings[i]]) return 0;
    b->merging = 0;
    for (int i = 0; i < b->sibling_count; i++)
        if (flag_from(b, b->siblings[i], b->combine_flag_at)->mode & ~FX_SHARED) return 0;
    for (int i = 0; i < b->active_count; i++) {
        int to = b->active[i];
        if (b->via_in[to] == b->rank && b->from_merged[to] >= 0) send_merged_results(b, to);
    }
    return 1;
}

/* Weights [tokens, k] that are only known now; for the sums at home. */
void fx_set_weights(fx_buffer *b, uintptr_t weights, int k) {
    for (int t = 0; t < b->tokens; t++)
        memcpy(b->weight + (size_t)t * (size_t)b->topk, (const float *)weights + (size_t)t * k,
               (size_t)k * sizeof(float));
}

/* The result of a pair at its owner, own or shared; or NULL: there is none. */
static const uint8_t *result_of(const fx_buffer *b, int owner, size_t pair, uintptr_t y) {
    size_t at = (size_t)b->result[pair];
    if (owner == b->rank) return (const uint8_t *)y + at * (size_t)b->row_bytes;
    int32_t there;
    memcpy(&there, (const int32_t *)(b->inbox[owner] + (uintptr_t)b->results_at) + at,
           sizeof there);
    if (there < 0 || there >= b->shared_results) return NULL;
    return (const uint8_t *)b->shared[owner] + b->shared_results_at +
           (size_t)there * (size_t)b->row_bytes;
}

/* Each partial sum of a token: by the rank that has the results, where it shares them, else read.
 * Returns a rank that says nonsense, or -1. */
static int terms_of_ranks(const fx_buffer *b, int t, uintptr_t y, const uint8_t *is_shared,
                          const uint8_t *is_merged, fx_terms *terms) {
    size_t first = (size_t)t * (size_t)b->topk;
    int n = 0, sums = 0;
    for (int j = 0; j < b->dests[t]; j++) {
        int32_t owner = b->dest[first + j];
        int32_t row = is_merged[owner] ? b->merged_row[first + j] : b->dest_row[first + j];
        if (!b->is_active[owner] || row < 0) continue;
        if (owner == b->rank || is_shared[owner]) {
            for (int k = 0; k < b->topk; k++) {
                if (b->owner[first + k] != owner) continue;
                terms->rows[n] = result_of(b, owner, first + k, y);
                if (!terms->rows[n]) return owner;
                terms->weights[n++] = b->weight[first + k];
            }
        } else {
            int from = is_merged[owner] ? b->via_out[owner] : owner;
            terms->rows[n] = (const uint8_t *)b->inbox[from] + b->results_at +
                             (size_t)row * (size_t)b->result_stride;
            terms->weights[n++] = 1.0f;
        }
        terms->ends[sums++] = n;
    }
    terms->count = n;
    terms->sums = sums;
    return -1;
}

/* The same with a single sum, in router order. */
static int terms_at_home(const fx_buffer *b, int t, uintptr_t y, const uint8_t *is_shared,
                         fx_terms *terms) {
    size_t first = (size_t)t * (size_t)b->topk;
    int n = 0;
    for (int j = 0; j < b->topk; j++) {
        int32_t owner = b->owner[first + j];
        if (owner < 0) continue;
        terms->rows[n] = owner == b->rank || is_shared[owner]
                             ? result_of(b, owner, first + j, y)
                             : (const uint8_t *)b->inbox[owner] + b->results_at +
                                   (size_t)b->result[first + j] * (size_t)b->result_stride;
        if (!terms->rows[n]) return owner;
        terms->weights[n++] = b->weight[first + j];
    }
    terms->count = n;
    return -1;
}

/* Whether a rank has gone on, and written over what it had shared for this combine. */
static int written_over(const fx_buffer *b, const uint8_t *is_shared, int64_t *bad) {
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        *bad = source;
        if (is_shared[source] && __atomic_load_n(shared_version_of(b, source), __ATOMIC_ACQUIRE) !=
                                   flag_from(b, source, b->combine_flag_at)->bytes)
            return 1;
    }
    return 0;
}

/* After fx_wait: the sums of all tokens. Returns 0, or what is wrong with peer *bad. What a rank
 * that was masked meanwhile owes is left out and marked as lost. */
int fx_reduce(fx_buffer *b, uintptr_t y, uintptr_t out, int home, int64_t *bad) {
    uint8_t is_merged[256] = {0}; /* its results are in those of its gateway */
    uint8_t is_shared[256] = {0};
    for (int i = 0; i < b->active_count; i++) {
        int source = b->active[i];
        int gateway = b->via_out[source], merged = has_merged_results(b, gateway);
        const fx_flag *flag = flag_from(b, merged ? gateway : source, b->combine_flag_at);
        *bad = merged ? gateway : source;
        int shared = !merged && shares_with(b, source) && (flag->mode & FX_SHARED);
        if (flag->mode != (merged ? FX_MERGED : (uint32_t)home | (shared ? FX_SHARED : 0)) ||
            (merged && home))
            return FX_WRONG_MODE;
        if (flag->rows != (uint32_t)(merged ? b->merged_rows[gateway] : b->sent_rows[source]))
            return FX_WRONG_ROWS;
        is_merged[source] = (uint8_t)merged;
        is_shared[source] = (uint8_t)shared;
    }
    b->lost_pairs = 0;
    for (int t = 0; t < b->tokens; t++) {
        size_t first = (size_t)t * (size_t)b->topk;
        uint8_t *sum = (uint8_t *)out + (size_t)t * (size_t)b->row_bytes;
        fx_terms terms;
        for (int j = 0; j < b->topk; j++) {
            int32_t owner = b->owner[first + j];
            if (owner >= 0 && !b->is_active[owner]) owner = b->owner[first + j] = -3 - owner;
            b->lost_pairs += owner < -1;
        }
        int liar = home ? terms_at_home(b, t, y, is_shared, &terms)
                        : terms_of_ranks(b, t, y, is_shared, is_merged, &terms);
        if (liar >= 0) {
            *bad = liar;
            return FX_WRONG_ROWS;
        }
        if (home)
            sum_rows(b, sum, terms.rows, terms.weights, terms.count);
        else
            sum_of_sums(b, sum, &terms);
    }
    return written_over(b, is_shared, bad) ? FX_WRITTEN_OVER : 0;
}

/* After fx_reduce: weight [tokens], choices [tokens, k] and ranks [256] of what is lost. */
void fx_loss(fx_buffer *b, int k, uintptr_t weight_at, uintptr_t choices_at, uintptr_t ranks_at) {
    float *weight = (float *)weight_at;
    uint8_t *choices = (uint8_t *)choices_at, *ranks = (uint8_t *)ranks_at;
    memset(ranks, 0, 256);
    for (int t = 0; t < b->tokens; t++) {
        size_t first = (size_t)t * (size_t)b->topk;
        weight[t] = 0.0f;
        for (int j = 0; j < k; j++) {
            int32_t owner = b->owner[first + j];
            choices[(size_t)t * (size_t)k + j] = owner < -1;
            if (owner >= -1) continue;
            weight[t] += b->weight[first + j];
            if (owner <= -3) ranks[-3 - owner] = 1;
        }
    }
}
