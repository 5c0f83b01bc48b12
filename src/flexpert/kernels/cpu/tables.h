/* What Python fills in and C reads. Addresses are numbers; who filled them in keeps what they lead to. */
#ifndef FLEXPERT_TABLES_H
#define FLEXPERT_TABLES_H

/* cdef: begin */
typedef struct { /* equally shaped weights, see WeightTable */
    intptr_t weights, scales, biases; /* [groups] addresses each; 0: there are none */
    long groups, in_features, out_features;
    int format;  /* as in packed_args; 0: of the dtype of what they are multiplied with */
    long shared;
    int fixed;   /* a row has the same bits in any company, though a few rows were faster alone */
} weight_table;

typedef struct { /* operations for any number of rows, see RowProgram */
    long operations, buffers;
    intptr_t words;  /* [operations, WIDTH, 2] int64: a number is the first + rows times the second */
    intptr_t owners; /* [operations, WIDTH] int32: the buffer that an address is in; -1: it is none */
    intptr_t sizes;  /* [buffers, 2] int64: bytes, in the same way */
    long source, result; /* buffers that the caller has */
} row_program;

typedef struct { /* of one layer in one epoch */
    intptr_t table_rank, table_slot, split, counts; /* split, counts: or 0 */
    long entries, slots, period, experts;           /* period: rows of split; experts: columns of counts */
    weight_table up, down;
    int ready;                                      /* 0: Python is to do this layer */
} moe_layer;

typedef struct { /* all layers of a rank */
    intptr_t exchange, buffer; /* an fx_exchange_of and its first argument */
    intptr_t layers;           /* of the epoch: [count] moe_layer */
    long count;
    int home;
    int64_t walked, compute_ns; /* counted */
    intptr_t memory;            /* scratch */
    int64_t size;
} moe_step;
/* cdef: end */

#endif
