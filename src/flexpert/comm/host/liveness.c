/* Notices the end of a thread of another process at once.
 *
 * The system unmaps the memory of a process before it closes its descriptors: a process with much
 * memory that is killed keeps its sockets for a tenth of a second. But first of all it marks the
 * robust mutexes that its threads hold, and wakes who waits for one.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* cdef: begin */
int fx_liveness_hold(uintptr_t at);
int fx_liveness_await(uintptr_t at);
/* cdef: end */

/* Lock a mutex made at `at` (64 zero bytes that other processes see) until the calling thread ends.
 * 0 or an errno. */
int fx_liveness_hold(uintptr_t at) {
    pthread_mutexattr_t kind;
    int error = pthread_mutexattr_init(&kind);
    if (!error) error = pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    if (!error) error = pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    if (!error) error = pthread_mutex_init((pthread_mutex_t *)at, &kind);
    return error ? error : pthread_mutex_lock((pthread_mutex_t *)at);
}

/* Sleep until the thread that holds it has ended: 1; or until it is held by nobody: 0.
 *
 * Nothing but one word is read: whatever else the other process writes there does no harm here. */
int fx_liveness_await(uintptr_t at) {
    uint32_t *word = (uint32_t *)at; /* the lock of a mutex: its owner, and two bits of the system's */
    for (;;) {
        uint32_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
        if (seen & FUTEX_OWNER_DIED) {
            syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); /* the system wakes one */
            return 1;
        }
        if (!(seen & FUTEX_TID_MASK)) return 0;
        uint32_t waited = seen | FUTEX_WAITERS; /* else nobody is woken */
        if (seen != waited && !__atomic_compare_exchange_n(word, &seen, waited, 0, __ATOMIC_SEQ_CST,
                                                           __ATOMIC_SEQ_CST))
            continue;
        if (syscall(SYS_futex, word, FUTEX_WAIT, waited, NULL, NULL, 0) && errno != EAGAIN &&
            errno != EINTR)
            return 0;
    }
}
