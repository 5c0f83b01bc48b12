/* Starts a kernel whose arguments but a few are known, with as little of the host as that takes.
 *
 * Nothing of CUDA is needed to compile this: the functions of the driver that it calls are given as
 * addresses.
 */
#include <stddef.h>
#include <stdint.h>

/* cdef: begin */
#define FX_WORDS 48

/* launch, get_context, set_context: cuLaunchKernel, cuCtxGetCurrent, cuCtxSetCurrent.
 * context: in which function was loaded. threads: of a program. shared: bytes of its memory.
 * words: arguments of the kernel; the i-th is word[place[i]], in its low bytes.
 * pointers: so many of the first words must be multiples of 16. */
typedef struct {
    uintptr_t launch, get_context, set_context, function, context;
    uint32_t threads, shared, words, pointers;
    uint8_t place[FX_WORDS];
    uint64_t word[FX_WORDS];
} fx_launch;

int fx_start(fx_launch *kernel, unsigned programs, uintptr_t stream);
/* cdef: end */

typedef int (*launch_function)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned block_x, unsigned block_y, unsigned block_z,
                               unsigned shared, void *stream, void **arguments, void **extra);
typedef int (*get_function)(void **context);
typedef int (*set_function)(void *context);

/* The driver's answer, 0 if it was launched; -1: a pointer is not aligned, and nothing was done. The
 * driver copies the words before this returns. The thread may use another device, or none so far. */
int fx_start(fx_launch *kernel, unsigned programs, uintptr_t stream) {
    uint64_t bits = 0;
    for (uint32_t i = 0; i < kernel->pointers; i++) bits |= kernel->word[i];
    if (bits & 15) return -1;
    void *context = NULL;
    int status = ((get_function)kernel->get_context)(&context);
    if (status) return status;
    int elsewhere = (uintptr_t)context != kernel->context;
    set_function set_context = (set_function)kernel->set_context;
    if (elsewhere && (status = set_context((void *)kernel->context))) return status;
    void *arguments[FX_WORDS];
    for (uint32_t i = 0; i < kernel->words; i++) arguments[i] = &kernel->word[kernel->place[i]];
    launch_function launch = (launch_function)kernel->launch;
    status = launch((void *)kernel->function, programs, 1, 1, kernel->threads, 1, 1, kernel->shared,
                    (void *)stream, arguments, NULL);
    if (elsewhere) set_context(context);
    return status;
}
