/* Threads that share one large product: they sleep between products, and are made at the first one.
 *
 * Work is cut into pieces, each of which is done whole by one thread: what a piece computes does not
 * depend on how many there are. Whoever asks works along, and sleeps until the last piece is done.
 * One product at a time: a thread that finds the pool in use computes alone. Included by ops.c.
 */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

typedef void (*piece_of)(void *work, long piece);

static struct {
    pthread_mutex_t lock;      /* of what follows */
    pthread_cond_t begun, over;
    piece_of run;              /* NULL: nothing to do */
    void *work;
    long pieces, active;       /* active: helpers at work on it */
    unsigned long number;      /* of the work */
    int helpers, wanted;       /* threads made, and how many may help */
    atomic_long next;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER,
          .over = PTHREAD_COND_INITIALIZER};
static pthread_mutex_t pool_use = PTHREAD_MUTEX_INITIALIZER; /* held by who has work in it */

static void pool_pieces(piece_of run, void *work, long pieces) {
    for (;;) {
        const long piece = atomic_fetch_add(&pool.next, 1);
        if (piece >= pieces) return;
        run(work, piece);
    }
}

static void *pool_helper(void *given) {
    const long index = (long)(intptr_t)given;
    unsigned long seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.run || pool.number == seen || index >= pool.wanted)
            pthread_cond_wait(&pool.begun, &pool.lock);
        seen = pool.number;
        const piece_of run = pool.run;
        void *work = pool.work;
        const long pieces = pool.pieces;
        pool.active++;
        pthread_mutex_unlock(&pool.lock);
        pool_pieces(run, work, pieces);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.active) pthread_cond_signal(&pool.over);
    }
    return NULL;
}

/* Threads do not live on in a child. */
static void pool_forked(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.begun, NULL);
    pthread_cond_init(&pool.over, NULL);
    pthread_mutex_init(&pool_use, NULL);
    pool.helpers = 0;
    pool.active = 0;
    pool.run = NULL;
}

/* As many helpers as are wanted, if they can be had; signals go to other threads. Under the lock. */
static void pool_grow(void) {
    static int watched;
    if (!watched && !pthread_atfork(NULL, NULL, pool_forked)) watched = 1;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.helpers < pool.wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_helper, (void *)(intptr_t)pool.helpers)) break;
        pthread_detach(thread);
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* All pieces, by as many threads as there are. */
static void pool_share(piece_of run, void *work, long pieces) {
    if (pool.wanted < 1 || pieces < 2 || pthread_mutex_trylock(&pool_use)) {
        for (long piece = 0; piece < pieces; piece++) run(work, piece);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    if (pool.helpers < pool.wanted) pool_grow();
    pool.run = run;
    pool.work = work;
    pool.pieces = pieces;
    pool.number++;
    atomic_store(&pool.next, 0);
    pthread_cond_broadcast(&pool.begun);
    pthread_mutex_unlock(&pool.lock);
    pool_pieces(run, work, pieces);
    pthread_mutex_lock(&pool.lock);
    pool.run = NULL; /* who wakes up now comes too late */
    while (pool.active) pthread_cond_wait(&pool.over, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool_use);
}
