/* Products with weights that are smaller in memory than x: MXFP4, int8 and int4. Included by ops.c.
 *
 * A few rows of a matrix are unpacked to x's dtype, into memory that stays in the cache, and go
 * through the products that whole weights go through. So a row's bits are those of the same product
 * with the dequantized matrix, alone or in any company. Where x has few rows, few_rows.c computes
 * the same in registers.
 */

enum { WHOLE = 0, MXFP4 = 1, INT8 = 2, INT4 = 3 };

enum { SOME = 16 }; /* weight rows that are unpacked at once; 64 for tile registers */

/* ---- MXFP4: see flexpert/kernels/mxfp4.py ------------------------------------------------- */

/* The 16 values as bfloat16, which holds each times any scale, but for the least subnormals. */
static const uint16_t E2M1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                  0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

/* Scales with which no value leaves the normal numbers: exponents may be added up. */
INLINE int adds_up(uint8_t scale) { return scale >= 2 && scale <= 252; }

/* The 16 values times a scale. */
INLINE void scaled_values(uint8_t scale, uint16_t *values) {
    float factor = __builtin_nanf("");
    if (scale < 255) {
        const uint32_t bits = scale ? (uint32_t)scale << 23 : 1u << 22; /* 2^-127 is subnormal */
        memcpy(&factor, &bits, 4);
    }
    for (int i = 0; i < 16; i++) values[i] = to_bf16(from_bf16(E2M1[i]) * factor);
}

/* ---- int4: see flexpert/kernels/group_int4.py --------------------------------------------- */

enum { INT4_ZERO = 255 }; /* bits of a scale that are the zero point */

/* What a code stands for, less the rounding to x's dtype; no NaN. */
INLINE float int4_value(uint32_t scale, int code) {
    const uint32_t bits = scale & ~(uint32_t)INT4_ZERO;
    float by;
    memcpy(&by, &bits, 4);
    return (float)(code - (int)(scale & INT4_ZERO)) * by;
}

INLINE void int4_row_f32(const uint8_t *w, const uint32_t *scales, long k, long group, float *to) {
    for (long i = 0; i < k; i += group)
        for (long j = i; j < i + group; j++)
            to[j] = int4_value(scales[i / group], w[j / 2] >> (j % 2 * 4) & 15);
}

/* ---- blocks of 32 codes to bf16 ----------------------------------------------------------- */

/* Codes one block behind the other. scales: MXFP4's, a byte for each block, or int4's, a word for
 * each `per` blocks. */
#define CODES_OF(NAME, TARGET, BLOCK_OF)                                                           \
    TARGET static void codes_##NAME(const uint8_t *w, const char *scales, long blocks, long per,   \
                                    int format, uint16_t *to) {                                    \
        uint16_t values[16] = {0};                                                                 \
        if (format == MXFP4) {                                                                     \
            mxfp4_##NAME(w, (const uint8_t *)scales, blocks, to);                                  \
            return;                                                                                \
        }                                                                                          \
        for (long b = 0; b < blocks; scales += 4) {                                                \
            uint32_t scale;                                                                        \
            memcpy(&scale, scales, 4);                                                             \
            int4_##NAME(scale, values);                                                            \
            for (const long end = b + per; b < end; b++, w += 16, to += 32) BLOCK_OF               \
        }                                                                                          \
    }

INLINE void int4_portable(uint32_t scale, uint16_t *values) {
    for (int i = 0; i < 16; i++) {
        const float value = int4_value(scale, i);
        uint32_t u;
        memcpy(&u, &value, 4);
        values[i] = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
}

INLINE void block_portable(const uint8_t *w, const uint16_t *values, uint16_t *to) {
    for (int i = 0; i < 16; i++) {
        to[2 * i] = values[w[i] & 15];
        to[2 * i + 1] = values[w[i] >> 4];
    }
}

static void mxfp4_portable(const uint8_t *w, const uint8_t *scales, long blocks, uint16_t *to) {
    for (long b = 0; b < blocks; b++, w += 16, to += 32) {
        uint16_t values[16];
        scaled_values(scales[b], values);
        block_portable(w, values, to);
    }
}

CODES_OF(portable, , { block_portable(w, values, to); })

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

AVX2 INLINE void block_avx2(const uint8_t *w, __m256i values, uint16_t *to) {
    const __m128i a = _mm256_castsi256_si128(values), c = _mm256_extracti128_si256(values, 1);
    const __m128i byte = _mm_set1_epi16(255); /* 16 values in two tables of bytes */
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(c, byte));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(c, 8));
    const __m128i both = _mm_loadu_si128((const __m128i *)w), low4 = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(both, low4);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(both, 4), low4);
    const __m128i code[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    for (int h = 0; h < 2; h++) {
        const __m128i l = _mm_shuffle_epi8(lows, code[h]), u = _mm_shuffle_epi8(highs, code[h]);
        _mm_storeu_si128((__m128i *)(to + 16 * h), _mm_unpacklo_epi8(l, u));
        _mm_storeu_si128((__m128i *)(to + 16 * h + 8), _mm_unpackhi_epi8(l, u));
    }
}

AVX2 static void mxfp4_avx2(const uint8_t *w, const uint8_t *scales, long blocks, uint16_t *to) {
    const __m256i table = _mm256_loadu_si256((const __m256i *)E2M1);
    const __m256i nonzero = _mm256_andnot_si256(
        _mm256_cmpeq_epi16(_mm256_slli_epi16(table, 1), _mm256_setzero_si256()), _mm256_set1_epi16(-1));
    for (long b = 0; b < blocks; b++, w += 16, to += 32) {
        __m256i values;
        if (adds_up(scales[b])) {
            const __m256i add = _mm256_set1_epi16((short)((scales[b] - 127) * 128));
            values = _mm256_add_epi16(table, _mm256_and_si256(add, nonzero));
        } else {
            uint16_t slow[16];
            scaled_values(scales[b], slow);
            values = _mm256_loadu_si256((const __m256i *)slow);
        }
        block_avx2(w, values, to);
    }
}

AVX2 INLINE void int4_avx2(uint32_t scale, uint16_t *values) { int4_portable(scale, values); }

CODES_OF(avx2, AVX2, { block_avx2(w, _mm256_loadu_si256((const __m256i *)values), to); })

/* values: twice, because five bits choose: the fifth is of the other half of a byte. */
AVX512 INLINE void block_avx512(const uint8_t *w, __m512i values, uint16_t *to) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
    const __m512i codes = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, values));
}

AVX512 static void mxfp4_avx512(const uint8_t *w, const uint8_t *scales, long blocks, uint16_t *to) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)E2M1));
    for (long b = 0; b < blocks; b++, w += 16, to += 32) {
        __m512i values;
        if (adds_up(scales[b])) {
            const __m512i add = _mm512_set1_epi16((short)((scales[b] - 127) * 128));
            values = _mm512_mask_add_epi16(table, 0xfefefefeu, table, add);
        } else {
            uint16_t slow[16];
            scaled_values(scales[b], slow);
            values = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)slow));
        }
        block_avx512(w, values, to);
    }
}

/* The 16 values of a group in float32, rounded as `to_bf16` does. scale: in each lane. */
AVX512 INLINE __m512 int4_values(__m512i scale) {
    const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i zero = _mm512_set1_epi32(INT4_ZERO), one = _mm512_set1_epi32(1);
    const __m512i moved = _mm512_sub_epi32(codes, _mm512_and_si512(scale, zero));
    const __m512 by = _mm512_castsi512_ps(_mm512_andnot_si512(zero, scale));
    const __m512i u = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(moved), by));
    const __m512i up = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), up);
    return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32((int)0xffff0000u)));
}

AVX512 INLINE void int4_avx512(uint32_t scale, uint16_t *values) {
    const __m512i bits = _mm512_castps_si512(int4_values(_mm512_set1_epi32((int)scale)));
    _mm256_storeu_si256((__m256i *)values, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

CODES_OF(avx512, AVX512, {
    block_avx512(w, _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values)), to);
})
#endif
#undef CODES_OF

/* ---- int8: see flexpert/kernels/row_int8.py ----------------------------------------------- */

INLINE void int8_row(const int8_t *w, float scale, long k, uint16_t *to) {
    for (long i = 0; i < k; i++) to[i] = to_bf16((float)w[i] * scale);
}

INLINE void int8_row_f32(const int8_t *w, float scale, long k, float *to) {
    for (long i = 0; i < k; i++) to[i] = (float)w[i] * scale;
}

/* ---- a product ---------------------------------------------------------------------------- */

typedef struct {
    const char *x;
    const intptr_t *weights, *scales, *biases;
    const int32_t *begins, *ends;
    char *y;
    long groups, k, n, first, last; /* rows of the weights, and those that are wanted */
    int dtype, format;
    long shared; /* elements of a row that share a scale, of int4 */
    int fixed;   /* see weight_table */
} packed_args;

typedef void (*codes_row)(const uint8_t *, const char *, long, long, int, uint16_t *);

/* Weight rows o … o + rows - 1 as bf16 or f32. */
INLINE void unpack_rows(const packed_args *a, const char *w, const char *scales, long o, long rows,
                        int dtype, codes_row row, char *to) {
    const long k = a->k;
    if (a->format == INT8) {
        for (long r = 0; r < rows; r++) {
            const int8_t *from = (const int8_t *)w + (o + r) * k;
            const float scale = ((const float *)scales)[o + r];
            if (dtype == BFLOAT16) int8_row(from, scale, k, (uint16_t *)to + r * k);
            else int8_row_f32(from, scale, k, (float *)to + r * k);
        }
        return;
    }
    /* rows follow each other without a gap, scales do, too */
    const uint8_t *from = (const uint8_t *)w + o * k / 2;
    const long blocks = rows * (k / 32);
    const char *by = scales + (a->format == INT4 ? o * (k / a->shared) * 4 : o * (k / 32));
    if (dtype == BFLOAT16) {
        row(from, by, blocks, a->shared / 32, a->format, (uint16_t *)to);
        return;
    }
    if (a->format == INT4) {
        int4_row_f32(from, (const uint32_t *)by, rows * k, a->shared, (float *)to);
        return;
    }
    for (long b = 0; b < blocks; b += SOME) {
        uint16_t part[32 * SOME];
        const long live = blocks - b < SOME ? blocks - b : SOME;
        row(from + 16 * b, by + b, live, 1, MXFP4, part);
        for (long i = 0; i < 32 * live; i++) ((float *)to)[32 * b + i] = from_bf16(part[i]);
    }
}

/* A few rows times 16 weight rows, in registers; see few_rows.c. 0: not done. */
typedef int (*few_product)(const packed_args *a, long g, long o, long rows);

static int few_never(const packed_args *a, long g, long o, long rows) {
    (void)a, (void)g, (void)o, (void)rows;
    return 0;
}

#if defined(__x86_64__)
#include "few_rows.c"
#endif

/* As `grouped_body`. scratch: SOME rows of weights. */
INLINE void packed_body(const packed_args *a, char *scratch, int dtype, int level, codes_row row,
                        few_product few) {
    const long width = dtype == BFLOAT16 ? 2 : 4, k = a->k, n = a->n;
    for (long g = 0; g < a->groups; g++) {
        const long begin = a->begins[g], rows = a->ends[g] - begin;
        if (rows <= 0) continue;
        const char *w = (const char *)a->weights[g], *scales = (const char *)a->scales[g];
        for (long o = a->first; o < a->last; o += SOME) {
            const long outs = a->last - o < SOME ? a->last - o : SOME;
            if (dtype == BFLOAT16 && outs == SOME && few(a, g, o, rows)) continue;
            unpack_rows(a, w, scales, o, outs, dtype, row, scratch);
            linear_group(a->x + begin * k * width, scratch,
                         a->biases ? (const char *)a->biases[g] + o * width : NULL,
                         a->y + (begin * n + o) * width, rows, k, outs, n, dtype, level);
        }
    }
}

#ifdef HAS_AMX
enum { TILES_OUT = 64, STEPS = 4, MOST_PACKED = 2 << 20, AHEAD = 128 };

/* The order in which a block of MXFP4 comes apart with the fewest instructions: each of its 16-bit
 * words is shifted by 0, 4, 8 and 12 bits. x is brought into the same order, so that sums are of the
 * same products, in an order of their own. */
static const uint16_t ORDER[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                   2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};

/* What to add to the values of up to 128 elements of each of up to 64 rows, twice in 32 bits; 0: a
 * scale does not add up. Memory operands, because a register has to be broadcast by the one unit
 * that also looks the values up. */
AMX INLINE int amx_exponents(const uint8_t *scales, long stride, long rows, long blocks,
                             uint32_t add[STEPS][TILES_OUT]) {
    uint32_t four[TILES_OUT] __attribute__((aligned(64)));
    for (long r = 0; r < TILES_OUT; r++) {
        four[r] = 0x7f7f7f7f;
        if (r < rows && blocks == STEPS) memcpy(&four[r], scales + r * stride, STEPS);
        else if (r < rows) memcpy(&four[r], scales + r * stride, blocks);
    }
    __mmask16 beyond = 0;
    for (long r = 0; r < TILES_OUT; r += 16) {
        __m512i bytes = _mm512_load_si512(four + r);
        UNROLL for (int b = 0; b < STEPS; b++, bytes = _mm512_srli_epi32(bytes, 8)) {
            const __m512i e = _mm512_and_si512(bytes, _mm512_set1_epi32(255));
            const __m512i times = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(127)), 7);
            beyond |= _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(e, _mm512_set1_epi32(2)),
                                              _mm512_set1_epi32(250)); /* see `adds_up` */
            _mm512_store_si512(add[b] + r,
                               _mm512_or_si512(_mm512_and_si512(times, _mm512_set1_epi32(0xffff)),
                                               _mm512_slli_epi32(times, 16)));
        }
    }
    return beyond == 0;
}

/* One block in that order. values: the 16 values times its scale, twice, because five bits choose:
 * the fifth belongs to the next element. */
AMX INLINE void amx_block(const uint8_t *w, __m512i values, char *to) {
    const __m512i shifts = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi16(4))),
        _mm256_setr_m128i(_mm_set1_epi16(8), _mm_set1_epi16(12)), 1);
    const __m512i words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)w));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts), values));
}

/* Up to 128 elements of each of up to 64 weight rows as bf16, 32 to each place; see `amx_unpack`.
 * Memory further on in the row is fetched ahead: rows are too many for the hardware to see. */
AMX INLINE void amx_mxfp4(const uint8_t *w, const uint8_t *scales, long k, long rows, long blocks,
                          char *to, long apart, long up) {
    uint32_t add[STEPS][TILES_OUT] __attribute__((aligned(64)));
    if (!amx_exponents(scales, k / 32, rows, blocks, add)) {
        for (long r = 0; r < rows; r++)
            for (long b = 0; b < blocks; b++) {
                uint16_t values[16];
                scaled_values(scales[r * (k / 32) + b], values);
                amx_block(w + r * (k / 2) + 16 * b,
                          _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values)),
                          to + r * up + b * apart);
            }
        return;
    }
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)E2M1));
#define BLOCKS(COUNT)                                                                              \
    for (long r = 0; r < rows; r++, w += k / 2, to += up) {                                        \
        _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);                                        \
        UNROLL for (int b = 0; b < COUNT; b++)                                                     \
            amx_block(w + 16 * b,                                                                  \
                      _mm512_mask_add_epi16(table, 0xfefefefeu, table,                             \
                                            _mm512_set1_epi32((int)add[b][r])),                    \
                      to + b * apart);                                                             \
    }
    if (blocks == STEPS) BLOCKS(STEPS)
    else if (blocks == 3) BLOCKS(3)
    else if (blocks == 2) BLOCKS(2)
    else BLOCKS(1)
#undef BLOCKS
}

AMX INLINE void amx_int8(const int8_t *w, float scale, long k, char *to, long apart) {
    const __m512 by = _mm512_set1_ps(scale);
    _mm_prefetch((const char *)w + 256, _MM_HINT_T0);
    _mm_prefetch((const char *)w + 320, _MM_HINT_T0);
    for (long i = 0; i < k; i += 32, to += apart) {
        const __mmask32 live = k - i < 32 ? (1u << (k - i)) - 1 : ~0u;
        const __m256i q = _mm256_maskz_loadu_epi8(live, w + i);
        const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(q)));
        const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(q, 1)));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, by), _mm512_mul_ps(a, by));
        if (apart == 64) _mm512_mask_storeu_epi16(to, live, both);
        else _mm512_storeu_si512(to, both);
    }
}

/* Elements i … i + count - 1, 128 at most, of `rows` weight rows from `o` on, 64 at most: 32 elements
 * to each place, places of a row `apart` bytes apart, rows `up`. What int8 lacks of 32 is zeros,
 * unless places lie one behind the other. */
AMX INLINE void amx_unpack(const packed_args *a, long g, long o, long rows, long i, long count,
                           char *to, long apart, long up) {
    const long k = a->k; /* not read again behind each store */
    if (a->format == INT8) {
        const int8_t *w = (const int8_t *)a->weights[g] + o * k + i;
        const float *scales = (const float *)a->scales[g] + o;
        for (long r = 0; r < rows; r++, w += k, to += up) amx_int8(w, scales[r], count, to, apart);
    } else {
        amx_mxfp4((const uint8_t *)a->weights[g] + (o * k + i) / 2,
                  (const uint8_t *)a->scales[g] + (o * k + i) / 32, k, rows, count / 32, to, apart, up);
    }
}

/* 64 outs and up to 16 rows, as `amx_4_by_1`, whose bits these are. Weights go from memory to the
 * nearest cache, as tiles, and are used one round later: a tile that is loaded at once would wait
 * for what has just been stored. */
AMX static void amx_few(const packed_args *a, long g, long o, const char *x, char *c) {
    char tiles[2][STEPS * 4 * BLOCK] __attribute__((aligned(64)));
    const long depth = 32 * STEPS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < a->k + depth; i += depth) {
        if (i < a->k) {
            char *to = tiles[i / depth % 2];
            const long count = a->k - i < depth ? a->k - i : depth;
            amx_unpack(a, g, o, TILES_OUT, i, count, to, 4 * BLOCK, 64);
        }
        if (i == 0) continue;
        const char *from = tiles[(i / depth + 1) % 2];
        const long left = a->k - i + depth, steps = left < depth ? (left + 31) / 32 : STEPS;
        for (long s = 0; s < steps; s++, x += BLOCK, from += 4 * BLOCK) {
            _tile_loadd(7, x, 64);
            _tile_loadd(4, from, 64);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(5, from + BLOCK, 64);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, from + 2 * BLOCK, 64);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(4, from + 3 * BLOCK, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + BLOCK, 64);
    _tile_stored(2, c + 2 * BLOCK, 64);
    _tile_stored(3, c + 3 * BLOCK, 64);
}

/* 64 outs and any rows, which are packed. scratch: 64 weight rows. */
AMX static void amx_outs(const packed_args *a, long g, long o, const char *packed, long rows,
                         const char *bias, char *y, char *scratch) {
    const long outs = a->n - o < TILES_OUT ? a->n - o : TILES_OUT;
    if (rows <= 16 && outs == TILES_OUT) {
        char c[4 * BLOCK] __attribute__((aligned(64)));
        amx_few(a, g, o, packed, c);
        for (int t = 0; t < 4; t++)
            amx_store(c + t * BLOCK, bias ? bias + t * 32 : NULL, y + t * 32, rows, 16, a->n);
        return;
    }
    for (long i = 0; i < a->k; i += 32 * STEPS)
        amx_unpack(a, g, o, outs, i, a->k - i < 32 * STEPS ? a->k - i : 32 * STEPS, scratch + i * 2, 64,
                   a->k * 2);
    amx_panel(packed, scratch, bias, y, rows, a->k, outs, a->n);
}

/* As `amx_grouped`; x is packed once for all weights, as far as its memory goes. */
AMX static int amx_packed(const packed_args *a) {
    const long k = a->k, strip = (k + 31) / 32 * BLOCK;
    long most = 0, strips = MOST_PACKED / (strip ? strip : 1) / 2 * 2;
    for (long g = 0; g < a->groups; g++)
        if (a->ends[g] - a->begins[g] > most) most = a->ends[g] - a->begins[g];
    if (most == 0) return 0;
    if (strips < 2) strips = 2;
    if (strips * 16 > most) strips = (most + 15) / 16;
    const long panel = (TILES_OUT * k * 2 + 63) / 64 * 64;
    char *scratch = aligned_alloc(64, panel + strips * strip);
    if (!scratch) return -1;
    char *packed = scratch + panel;
    _tile_loadconfig(&TILES);
    for (long g = 0; g < a->groups; g++) {
        const long all = a->ends[g] - a->begins[g], most = a->format == INT8 ? 4 : 2;
        if (!a->fixed && all > 0 && all <= most && (a->last - a->first) % SOME == 0) {
            /* in registers: memory gives weights no faster than they are taken apart there */
            long o = a->first;
            while (o < a->last && few_avx512_bf16(a, g, o, all)) o += SOME;
            if (o >= a->last) continue;
        }
        for (long r = a->begins[g]; r < a->ends[g]; r += strips * 16) {
            const long rows = a->ends[g] - r < strips * 16 ? a->ends[g] - r : strips * 16;
            for (long h = 0; h < rows; h += 16)
                amx_pack(a->x + (r + h) * k * 2, rows - h < 16 ? rows - h : 16, k,
                         a->format == MXFP4 ? ORDER : NULL, packed + h / 16 * strip);
            for (long o = a->first; o < a->last; o += TILES_OUT)
                amx_outs(a, g, o, packed, rows,
                         a->biases ? (const char *)a->biases[g] + o * 2 : NULL,
                         a->y + (r * a->n + o) * 2, scratch);
        }
    }
    _tile_release();
    free(scratch);
    return 0;
}
#endif
