/* A decode step as a list of operations, walked without Python.
 *
 * An operation is WIDTH words of 64 bits: what it is, sizes, and for each operand an address and
 * strides in elements. Who made the list has put in sizes and addresses for this number of rows.
 * What one step of serving has beside them (block tables, where keys go) is in `step`.
 *
 * Elementwise operations compute in float32 and round to the dtype of the result, as torch does;
 * whole vectors always, so that an element's bits do not depend on where it lies. Layers of experts are
 * in experts.c. Included by ops.c.
 */

#include <math.h>

enum { DIMS = 5, WIDTH = 32, CHUNK = 256 };

enum { /* dtypes beside FLOAT32 and BFLOAT16 */ INT64 = 2, INT32 = 3, BOOL = 4 };

enum {
    OP_INPUTS, OP_COPY, OP_NEG, OP_SILU, OP_SIGMOID, OP_EXP, OP_COS, OP_SIN, OP_RSQRT, OP_TANH,
    OP_RELU, OP_GELU, OP_GELU_TANH, OP_SQUARE, OP_SQRT, OP_RECIPROCAL, OP_SOFTPLUS,
    OP_ADD, OP_SUB, OP_MUL, OP_DIV, OP_MAX, OP_MIN, OP_CLAMP,
    OP_SUM, OP_MEAN, OP_SOFTMAX,
    OP_LINEAR, OP_NORM, OP_ROWS, OP_ATTENTION, OP_TOPK, OP_EXPERTS
};

/* Words of an operation. */
enum { AT_OP, AT_DTYPES, AT_DIMS, AT_SIZES, AT_OUT = 8, AT_A = 14, AT_B = 20, AT_SCALAR = 26, AT_EXTRA };

/* Words of a step. */
enum {
    STEP_QUERY_START, STEP_CONTEXT_LEN, STEP_BLOCK_TABLES, STEP_SLOTS, STEP_SEQUENCES,
    STEP_MAX_BLOCKS, STEP_TOKENS, STEP_POSITIONS, STEP_SAMPLES, STEP_MOE
};

static const int ITEM[] = {4, 2, 8, 4, 1};

INLINE double scalar_of(const int64_t *op, int at) {
    double value;
    memcpy(&value, op + at, sizeof value);
    return value;
}

/* `n` elements, `stride` apart, as floats; what follows up to a whole vector is 0. */
INLINE void gather(const char *from, int64_t stride, int dtype, long n, float *to) {
    const long padded = (n + 15) / 16 * 16;
    if (dtype == FLOAT32 && stride == 1) {
        memcpy(to, from, n * 4);
    } else if (dtype == BFLOAT16 && stride == 1) {
        const uint16_t *p = (const uint16_t *)from;
        for (long i = 0; i < n; i++) to[i] = from_bf16(p[i]);
    } else if (stride == 0) {
        float one = dtype == FLOAT32    ? *(const float *)from
                    : dtype == BFLOAT16 ? from_bf16(*(const uint16_t *)from)
                    : dtype == INT64    ? (float)*(const int64_t *)from
                    : dtype == INT32    ? (float)*(const int32_t *)from
                                        : (float)*(const uint8_t *)from;
        for (long i = 0; i < n; i++) to[i] = one;
    } else {
        for (long i = 0; i < n; i++) {
            const char *p = from + i * stride * ITEM[dtype];
            to[i] = dtype == FLOAT32    ? *(const float *)p
                    : dtype == BFLOAT16 ? from_bf16(*(const uint16_t *)p)
                    : dtype == INT64    ? (float)*(const int64_t *)p
                    : dtype == INT32    ? (float)*(const int32_t *)p
                                        : (float)*(const uint8_t *)p;
        }
    }
    for (long i = n; i < padded; i++) to[i] = 0.0f;
}

INLINE void scatter(const float *from, char *to, int64_t stride, int dtype, long n) {
    if (dtype == FLOAT32 && stride == 1) {
        memcpy(to, from, n * 4);
    } else if (dtype == BFLOAT16 && stride == 1) {
        long i = 0;
        for (; i + 16 <= n; i += 16) {
            const u16x16 rounded = round16(load_f32(from + i));
            memcpy(to + i * 2, &rounded, sizeof rounded);
        }
        for (; i < n; i++) ((uint16_t *)to)[i] = to_bf16(from[i]);
    } else if (dtype == FLOAT32) {
        for (long i = 0; i < n; i++) ((float *)to)[i * stride] = from[i];
    } else {
        for (long i = 0; i < n; i++) ((uint16_t *)to)[i * stride] = to_bf16(from[i]);
    }
}

INLINE f32x16 sigmoid16(f32x16 x) {
    const f32x16 small = exp16(-fmax16(x, -x)), whole = 1.0f / (1.0f + small);
    const i32x16 negative = (i32x16)x >> 31;
    return (f32x16)(((i32x16)(small * whole) & negative) | ((i32x16)whole & ~negative));
}

/* NaN stays. */
INLINE f32x16 clamp16(f32x16 x, f32x16 low, f32x16 high) {
    const i32x16 below = x < low, above = x > high;
    x = (f32x16)(((i32x16)low & below) | ((i32x16)x & ~below));
    return (f32x16)(((i32x16)high & above) | ((i32x16)x & ~above));
}

#define VECTORS(EXPRESSION)                                                                        \
    for (long i = 0; i < n; i += 16) {                                                             \
        const f32x16 x = load_f32(a + i);                                                          \
        const f32x16 y = EXPRESSION;                                                               \
        memcpy(a + i, &y, sizeof y);                                                               \
    }                                                                                              \
    break
#define SCALARS(EXPRESSION)                                                                        \
    for (long i = 0; i < n; i++) {                                                                 \
        const float x = a[i];                                                                      \
        a[i] = EXPRESSION;                                                                         \
    }                                                                                              \
    break
#define PAIRS(EXPRESSION)                                                                          \
    for (long i = 0; i < n; i += 16) {                                                             \
        const f32x16 x = load_f32(a + i), z = load_f32(b + i);                                     \
        const f32x16 y = EXPRESSION;                                                               \
        memcpy(a + i, &y, sizeof y);                                                               \
    }                                                                                              \
    break

/* a = op(a, b), a vector at a time. */
INLINE void compute(int op, float *a, const float *b, long n, float alpha) {
    switch (op) {
    case OP_NEG: VECTORS(-x);
    case OP_SILU: VECTORS(x * sigmoid16(x));
    case OP_SIGMOID: VECTORS(sigmoid16(x));
    case OP_RELU: VECTORS(fmax16(x, (f32x16){0}));
    case OP_SQUARE: VECTORS(x * x);
    case OP_RECIPROCAL: VECTORS(1.0f / x);
    case OP_EXP: SCALARS(expf(x));
    case OP_COS: SCALARS(cosf(x));
    case OP_SIN: SCALARS(sinf(x));
    case OP_RSQRT: SCALARS(1.0f / __builtin_sqrtf(x));
    case OP_SQRT: SCALARS(__builtin_sqrtf(x));
    case OP_TANH: SCALARS(tanhf(x));
    case OP_GELU: SCALARS(0.5f * x * (1.0f + erff(x * 0.70710678118654752f)));
    case OP_GELU_TANH: SCALARS(0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x))));
    case OP_SOFTPLUS: SCALARS(x > 20.0f ? x : log1pf(expf(x)));
    case OP_ADD: PAIRS(x + z * alpha);
    case OP_SUB: PAIRS(x - z * alpha);
    case OP_MUL: PAIRS(x * z);
    case OP_DIV: PAIRS(x / z);
    case OP_MAX: PAIRS(fmax16(x, z));
    case OP_MIN: PAIRS(-fmax16(-x, -z));
    case OP_CLAMP: PAIRS(clamp16(x, z, splat(alpha)));
    }
}
#undef VECTORS
#undef SCALARS
#undef PAIRS

/* Elements as they are. */
INLINE void move(const char *from, int64_t from_stride, char *to, int64_t to_stride, int item, long n) {
    if (from_stride == 1 && to_stride == 1) {
        memcpy(to, from, n * item);
        return;
    }
    for (long i = 0; i < n; i++) memcpy(to + i * to_stride * item, from + i * from_stride * item, item);
}

INLINE void elementwise(const int64_t *op) {
    const int what = (int)op[AT_OP], dims = (int)op[AT_DIMS];
    const int to = op[AT_DTYPES] & 255, da = op[AT_DTYPES] >> 8 & 255, db = op[AT_DTYPES] >> 16 & 255;
    const int64_t *size = op + AT_SIZES, *so = op + AT_OUT + 1, *sa = op + AT_A + 1, *sb = op + AT_B + 1;
    const int last = dims - 1;
    const float alpha = (float)scalar_of(op, AT_EXTRA);
    const int plain = what == OP_COPY && to == da, second = what >= OP_ADD && what <= OP_CLAMP;
    float a[CHUNK] __attribute__((aligned(64))), b[CHUNK] __attribute__((aligned(64)));
    int64_t at[DIMS] = {0};
    for (int d = 0; d < dims; d++)
        if (size[d] == 0) return;
    if (second && !op[AT_B]) {
        const float value = (float)scalar_of(op, AT_SCALAR);
        for (int i = 0; i < CHUNK; i++) b[i] = value;
    }
    for (;;) {
        int64_t o = 0, p = 0, q = 0;
        for (int d = 0; d < last; d++) o += at[d] * so[d], p += at[d] * sa[d], q += at[d] * sb[d];
        char *out = (char *)op[AT_OUT] + o * ITEM[to];
        const char *x = (const char *)op[AT_A] + p * ITEM[da];
        const char *z = (const char *)op[AT_B] + q * ITEM[db];
        if (plain) {
            move(x, sa[last], out, so[last], ITEM[to], size[last]);
        } else {
            for (int64_t begin = 0; begin < size[last]; begin += CHUNK) {
                const long n = size[last] - begin < CHUNK ? size[last] - begin : CHUNK;
                gather(x + begin * sa[last] * ITEM[da], sa[last], da, n, a);
                if (second && op[AT_B]) gather(z + begin * sb[last] * ITEM[db], sb[last], db, n, b);
                if (what != OP_COPY) compute(what, a, b, n, alpha);
                scatter(a, out + begin * so[last] * ITEM[to], so[last], to, n);
            }
        }
        int d = last - 1;
        while (d >= 0 && ++at[d] == size[d]) at[d--] = 0;
        if (d < 0) return;
    }
}

/* Over the last of two dimensions: [rows, n] → [rows], or [rows, n] of a softmax. */
INLINE void reduce(const int64_t *op) {
    const int what = (int)op[AT_OP], to = op[AT_DTYPES] & 255, from = op[AT_DTYPES] >> 8 & 255;
    const int64_t rows = op[AT_SIZES], n = op[AT_SIZES + 1];
    const int64_t *so = op + AT_OUT + 1, *sa = op + AT_A + 1;
    float a[CHUNK] __attribute__((aligned(64)));
    for (int64_t r = 0; r < rows; r++) {
        const char *x = (const char *)op[AT_A] + r * sa[0] * ITEM[from];
        char *out = (char *)op[AT_OUT] + r * so[0] * ITEM[to];
        float sum = 0.0f, top = -__builtin_inff();
        if (what == OP_SOFTMAX)
            for (int64_t begin = 0; begin < n; begin += CHUNK) {
                const long some = n - begin < CHUNK ? n - begin : CHUNK;
                gather(x + begin * sa[1] * ITEM[from], sa[1], from, some, a);
                for (long i = 0; i < some; i++) top = a[i] > top ? a[i] : top;
            }
        for (int pass = 0; pass < (what == OP_SOFTMAX ? 2 : 1); pass++)
            for (int64_t begin = 0; begin < n; begin += CHUNK) {
                const long some = n - begin < CHUNK ? n - begin : CHUNK;
                gather(x + begin * sa[1] * ITEM[from], sa[1], from, some, a);
                if (what == OP_SOFTMAX)
                    for (long i = 0; i < some; i += 16) {
                        const f32x16 e = exp16(load_f32(a + i) - top) * (pass ? sum : 1.0f);
                        memcpy(a + i, &e, sizeof e);
                    }
                if (pass == 0) {
                    for (long i = 0; i < some; i++) sum += a[i];
                } else {
                    scatter(a, out + begin * so[1] * ITEM[to], so[1], to, some);
                }
                if (what == OP_SOFTMAX && pass == 0 && begin + some == n) sum = 1.0f / sum;
            }
        if (what == OP_SOFTMAX) continue;
        if (what == OP_MEAN) sum /= (float)n;
        scatter(&sum, out, 1, to, 1);
    }
}

/* Rows of a table by their numbers; -1: a number that is no row. */
INLINE int take_rows(const int64_t *op) {
    const int64_t rows = op[AT_SIZES], bytes = op[AT_SIZES + 1], most = op[AT_EXTRA];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t id = ((const int64_t *)op[AT_A])[r * op[AT_A + 1]];
        if (id < 0 || id >= most) return -1;
        memcpy((char *)op[AT_OUT] + r * op[AT_OUT + 1], (const char *)op[AT_B] + id * op[AT_B + 1], bytes);
    }
    return 0;
}

/* Inputs, from where this step has them to where the operations look: tokens, positions, samples. */
INLINE void take_inputs(const int64_t *op, const int64_t *step) {
    memcpy((char *)op[AT_OUT], (const char *)step[STEP_TOKENS], op[AT_SIZES] * 8);
    memcpy((char *)op[AT_A], (const char *)step[STEP_POSITIONS], op[AT_SIZES] * 8);
    memcpy((char *)op[AT_B], (const char *)step[STEP_SAMPLES], op[AT_SIZES + 1] * 8);
}

#include "selection.c"

/* Words of an attention: after what it is and the dtype, these. */
enum {
    ATT_OUT = 2, ATT_QUERY, ATT_KEY, ATT_VALUE, ATT_KEY_CACHE, ATT_VALUE_CACHE, ATT_SINKS, ATT_STRIDES,
    ATT_BLOCK_SIZE = ATT_STRIDES + 6, ATT_HEADS, ATT_KV_HEADS, ATT_KEY_DIM, ATT_VALUE_DIM, ATT_VALUE_ROW, ATT_WINDOW,
    ATT_SCALING, ATT_SOFTCAP
};

INLINE attention_args attention_of(const int64_t *op, const int64_t *step) {
    const int64_t *stride = op + ATT_STRIDES;
    return (attention_args){
        .query = (const char *)op[ATT_QUERY],
        .key = (const char *)op[ATT_KEY],
        .value = (const char *)op[ATT_VALUE],
        .key_cache = (char *)op[ATT_KEY_CACHE],
        .value_cache = (char *)op[ATT_VALUE_CACHE],
        .query_start = (const int32_t *)step[STEP_QUERY_START],
        .context_len = (const int32_t *)step[STEP_CONTEXT_LEN],
        .block_tables = (const int32_t *)step[STEP_BLOCK_TABLES],
        .slot_mapping = (const int64_t *)step[STEP_SLOTS],
        .sinks = (const char *)op[ATT_SINKS],
        .out = (char *)op[ATT_OUT],
        .query_stride = {stride[0], stride[1]},
        .key_stride = {stride[2], stride[3]},
        .value_stride = {stride[4], stride[5]},
        .sequences = step[STEP_SEQUENCES],
        .max_blocks = step[STEP_MAX_BLOCKS],
        .block_size = op[ATT_BLOCK_SIZE],
        .heads = op[ATT_HEADS],
        .kv_heads = op[ATT_KV_HEADS],
        .key_dim = op[ATT_KEY_DIM],
        .value_dim = op[ATT_VALUE_DIM],
        .value_row = op[ATT_VALUE_ROW],
        .window = op[ATT_WINDOW],
        .scaling = (float)scalar_of(op, ATT_SCALING),
        .softcap = (float)scalar_of(op, ATT_SOFTCAP),
        .dtype = (int)op[AT_DTYPES],
    };
}

static long attention_scratch(const attention_args *a) {
    const long kd = (a->key_dim + 31) / 32 * 32, vd = (a->value_dim + 31) / 32 * 32;
    return (KEY_TILE + PANEL) * (kd + vd) * (long)sizeof(float);
}

enum { NO_ROOM = -1, NO_ROW = -2 };

/* What an instruction set has a copy of. */
INLINE int simple(const int64_t *op, const int64_t *step) {
    const int64_t what = op[AT_OP];
    if (what == OP_INPUTS) take_inputs(op, step);
    else if (what == OP_ROWS) return take_rows(op) ? NO_ROW : 0;
    else if (what == OP_TOPK) topk(op);
    else if (what >= OP_SUM && what <= OP_SOFTMAX) reduce(op);
    else elementwise(op);
    return 0;
}
