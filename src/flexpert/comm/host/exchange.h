/* One MoE layer's exchange as another C extension asks for it: shared with kernels/cpu.
 *
 * Python hands the address of the function over (`HostBuffer.native`), so neither extension links
 * the other.
 */
#ifndef FLEXPERT_EXCHANGE_H
#define FLEXPERT_EXCHANGE_H

#include <stdint.h>

/* What the experts here make of the rows that came: x, y [rows, hidden], sorted by slot; rows of slot
 * s are offsets[s] … offsets[s + 1] - 1. Not called without rows. Nonzero: there is no memory. */
typedef int (*fx_compute)(void *of, const void *x, const int32_t *offsets, int64_t rows, void *y);

typedef struct {
    const void *x;        /* [tokens, hidden] of the buffer's dtype, contiguous */
    const int64_t *ids;   /* [tokens, k], -1: none */
    const float *weights; /* [tokens, k] */
    const int32_t *table_rank, *table_slot; /* [experts], see ExpertTable */
    void *out;            /* [tokens, hidden]: the weighted sums */
    int32_t tokens, k, experts, slots;
    int32_t home;         /* results are summed at home, else one sum a rank */
    fx_compute compute;
    void *of;             /* goes to compute */
} fx_layer;

enum {
    FX_WALKED = 0,
    FX_LEFT = 1,      /* nothing was sent: Python is to do this one */
    FX_STOPPED = -16, /* in the middle of it; Python knows why, and raises it */
};

/* FX_WALKED, FX_LEFT or FX_STOPPED. */
typedef int (*fx_exchange_of)(void *buffer, const fx_layer *layer);

#endif
